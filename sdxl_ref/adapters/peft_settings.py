"""PEFT's configuration of an adapter: the scale of each layer, by PEFT's own rule, and what else it asks for.

It stands in one of three places: in a file's header as diffusers keeps it (one text for all parts, `unet.lora_alpha`),
in the header field by field, or in `adapter_config.json` beside the file. Source: PEFT 0.21's `LoraConfig`,
`get_pattern_key` and `LoraLayer.update_layer`.
"""

import json
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sdxl_ref.adapters.form import Settings
from sdxl_ref.config import InputError
from sdxl_ref.weights.patterns import Patterns

CONFIG_FILE = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations
PARTS = ("unet", "text_encoder", "text_encoder_2")
LARGEST = 1e30  # number: far beyond any rank or alpha, and of a size that float32 has
ALPHA = 8  # PEFT's, where a configuration has none

# Every key of LoraConfig is in one of the three tables.
HONOURED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
NO_EFFECT = {  # and why
    "task_type": "for language models",
    "auto_mapping": "which classes were adapted",
    "peft_version": "which version wrote it",
    "base_model_name_or_path": "a name",
    "revision": "a name",
    "inference_mode": "for training",
    "target_modules": "the file has the layers",
    "exclude_modules": "the file has the layers",
    "layers_to_transform": "the file has the layers",
    "layers_pattern": "the file has the layers",
    "lora_dropout": "for training",
    "fan_in_fan_out": "PEFT takes it back for linear layers, and no others here have a matrix",
    "megatron_config": "how layers are spread over devices",
    "megatron_core": "how layers are spread over devices",
    "loftq_config": "how it began: see init_lora_weights",
    "eva_config": "how it began: see init_lora_weights",
    "corda_config": "how it began: see init_lora_weights",
    "lora_ga_config": "how it began: see init_lora_weights",
    "velora_config": "for training: the same product afterwards",
    "qalora_group_size": "see use_qalora",
    "runtime_config": "is never in a file",
    "ensure_weight_tying": "no weights are tied in these networks",
}
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
REFUSED = {  # unless it is off, and why
    "init_lora_weights": "the adapter is for weights that were changed before its training",
    "bias": "biases in place of the model's own",
    "lora_bias": "biases of the adapter's own",
    "modules_to_save": "layers in place of the model's own",
    "trainable_token_indices": "rows of an embedding in place of the model's own",
    "target_parameters": "parameters that are no layer's weight",
    "layer_replication": "a model with layers that stand there twice",
    "use_qalora": "inputs that are averaged in groups",
    "use_bdlora": "factors in diagonal blocks",
    "monteclora_config": "factors that are drawn at random",
    "alora_invocation_tokens": "an adapter that sleeps until certain tokens come",
    "arrow_config": "a choice among several adapters for each token",
    "kasa_config": "the adapter is for weights that were changed before its training",
}
OFF: dict[str, Callable[[Any], bool]] = {  # where a value that is not false is off too
    "init_lora_weights": lambda value: value in KEEPS_THE_BASE,
    "bias": lambda value: value in (None, "none"),
}


class PartSettings:
    """A configuration of all layers, or of those of one part. InputError for what is not done here."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.source = source
        self.config = config
        peft_type = config.get("peft_type") or "LORA"
        if peft_type != "LORA":
            raise InputError(f"{source} asks for PEFT's {peft_type}, which is not done here: expected LORA")
        for key, value in config.items():
            check_key(key, value, source)
        for key in ("use_rslora", "use_dora"):
            if config.get(key) not in (None, True, False):
                raise InputError(f"{source}: expected {key} true or false, found {config[key]!r:.60}")
        self.alphas = self._numbers("alpha_pattern")
        self.ranks = self._numbers("rank_pattern")
        self.alpha_patterns = patterns(self.alphas, f"alpha_pattern of {source}")
        self.rank_patterns = patterns(self.ranks, f"rank_pattern of {source}")

    def alpha(self, layer: str, rank: int) -> float:
        """Such that alpha / rank is PEFT's scale of a layer, whose name is the one that PEFT gives it."""
        written = self._of_layer(layer, self.rank_patterns, self.ranks, self._number("r", rank))
        if written != rank:
            raise InputError(f"layer {layer} has rank {rank}, and {written:g} by {self.source}: expected one rank")
        alpha = self._of_layer(layer, self.alpha_patterns, self.alphas, self._number("lora_alpha", ALPHA))
        return alpha * (math.sqrt(rank) if self.config.get("use_rslora") else 1)

    def _of_layer(self, layer: str, keys: Patterns, numbers: Mapping[str, float], default: float) -> float:
        key = keys.first(layer)
        return default if key is None else numbers[key]

    def _number(self, key: str, default: float) -> float:
        return self._checked(key, self.config.get(key, default))

    def _numbers(self, key: str) -> dict[str, float]:
        pattern = self.config.get(key) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{self.source}: expected {key} to be names and numbers, found {pattern!r}")
        return {name: self._checked(key, value) for name, value in pattern.items()}

    def _checked(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < LARGEST:
            raise InputError(f"{self.source}: expected a finite number for {key}, found {value!r:.60}")
        return float(value)


def check_key(key: str, value: Any, source: str) -> None:
    """InputError for a key that changes what the adapter does and is not done here."""
    is_off = OFF.get(key, operator.not_)
    if key in HONOURED or key in NO_EFFECT or is_off(value):
        return
    why = REFUSED.get(key, "a key that is not known here")
    raise InputError(f"{source} asks for {key}={value!r}: {why}, which is not done here")


def patterns(numbers: Collection[str], source: str) -> Patterns:
    """PEFT's rule: the first key that is the end of a layer's name, or all of it, as a regular expression."""
    return Patterns({key: rf"(.*\.)?({key})$" for key in numbers}, source)


class PeftSettings(Settings):
    """Configurations by part, or one for all layers under the part `None`."""

    def __init__(self, configs: Mapping[str | None, Mapping[str, Any]], source: str) -> None:
        self.parts = {part: PartSettings(config, source) for part, config in configs.items()}
        self.source = source

    def alpha(self, layer: str, rank: int) -> float | None:
        """PEFT names a layer without the part where each part has a configuration of its own, else as the file does."""
        part, _, name = layer.partition(".")
        if part in self.parts:
            return self.parts[part].alpha(name, rank)
        return self.parts[None].alpha(layer, rank) if None in self.parts else None

    def check(self, layer: str, roles: Collection[str]) -> None:
        part, _, _ = layer.partition(".")
        settings = self.parts.get(part) or self.parts.get(None)
        if settings is None or not settings.config.get("use_dora"):
            return
        if "down" in roles and not {"lora_magnitude_vector", "dora_scale"} & set(roles):
            raise InputError(f"layer {layer} has no magnitude, and {self.source} says use_dora: the file is not whole")


def peft_settings(texts: Mapping[str, str]) -> PeftSettings | None:
    """The configuration of a file: diffusers' in its header, else PEFT's fields there, else the one beside it."""
    if HEADER_KEY in texts:
        return PeftSettings(by_part(parsed(texts[HEADER_KEY], HEADER_KEY)), f"its header ({HEADER_KEY})")
    fields = by_part({key: value_of(text) for key, text in texts.items() if key != CONFIG_FILE})
    told = {part: config for part, config in fields.items() if "lora_alpha" in config}
    if told:
        known = HONOURED + tuple(REFUSED)
        configs = {part: {key: config[key] for key in known if key in config} for part, config in told.items()}
        return PeftSettings(configs, "its header")
    if CONFIG_FILE in texts:
        return PeftSettings({None: parsed(texts[CONFIG_FILE], CONFIG_FILE)}, f"the {CONFIG_FILE} beside it")
    return None


def by_part(config: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """`{"unet.r": 4}` -> `{"unet": {"r": 4}}`; fields without a part are those of all, under None."""
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in config.items():
        part, _, name = key.partition(".")
        if part in PARTS and name:
            configs.setdefault(part, {})[name] = value
        else:
            configs.setdefault(None, {})[key] = value
    return configs


def parsed(text: str, name: str) -> dict[str, Any]:
    """A configuration's text. InputError where it is none."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} is no configuration: expected keys and values, found {text[:40]!r}")
    return config


def value_of(text: str) -> Any:
    """A field of the header: a number, a list and so on where it is one, else a word."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)
