"""Open a folder in diffusers' layout: one subfolder a part, with its configuration and its weights, sharded or not.

Names and shapes are translated by `sdxl_ref.layouts` as tensors are read; nothing is converted beforehand. Source:
`DiffusionPipeline.from_pretrained` in diffusers, `PreTrainedModel.from_pretrained` in transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ref import layouts
from sdxl_ref.checkpoint import PICKLES, Checkpoint, build_empty, check, prefixes
from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

INDEX = "model_index.json"
EXTRAS_FILE = "official_extras.safetensors"  # what an official file holds and this layout has no place for
STEMS = ("diffusion_pytorch_model", "model")
Json = dict[str, Any]


@dataclass(frozen=True)
class Folder(Checkpoint):
    """A checkpoint whose tensors lie in several files, under other names.

    `sources` has for each official key the files and names that it is made of, and the rule that makes it.
    """

    sources: Mapping[str, tuple[layouts.Rule | None, list[tuple[Path, str]]]] = None  # type: ignore[assignment]

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its official key; files stay mapped until the context ends."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def get(key: str) -> Tensor:
                rule, places = self.sources[key]
                found = []
                for path, name in places:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    found.append(opened[path].get_tensor(name))
                return found[0] if rule is None else rule.join(found).contiguous()

            yield get

    def sha256(self) -> str:
        """Of all the files of weights, one behind the other in the order of their names."""
        return sha256_of(*sorted({path for _, places in self.sources.values() for path, _ in places}))


def sha256_of(*paths: Path, start: int = 0) -> str:
    """Of files, one behind the other, each from byte `start` on; read once, in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def part_rules(part: str, config: ModelConfig) -> tuple[dict[str, Tensor], list[layouts.Rule]]:
    """The state of a part by official name, on the meta device, and the rule of each of its tensors."""
    network = build_empty(part, config)
    state = network.state_dict()
    return state, layouts.rules(layouts.PARTS[part], state, getattr(network, "config", None))


def open_folder(folder: Path, variant: str | None = None) -> Folder:
    """Open a folder with a `model_index.json`. `variant` picks files such as `model.fp16.safetensors`.

    InputError for another architecture, missing or damaged files, an index that points elsewhere, and as
    `open_checkpoint` raises it.
    """
    config = model_config(folder)
    sources: dict[str, tuple[layouts.Rule | None, list[tuple[Path, str]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, prefix in prefixes(config).items():
        _, rules = part_rules(part, config)
        names = tensors(folder / part, variant)
        for rule in rules:
            others = [names.pop(found_name(name, names), None) for name in rule.other]
            if others and None not in others:
                sources[prefix + rule.official] = rule, [(path, name) for path, name, _ in filter(None, others)]
                shapes[prefix + rule.official] = joined(rule, [shape for _, _, shape in filter(None, others)])
        left = [name for name in names if not name.endswith("position_ids")]
        shapes |= {f"{part}/{name}": () for name in left}  # reported as unexpected
    extras = folder / EXTRAS_FILE
    metadata: dict[str, str] = {}
    if extras.exists():
        for name, (path, _, shape) in headers(extras).items():
            sources[name], shapes[name] = (None, [(path, name)]), shape
        with safe_open(extras, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    check(config, shapes, folder)
    return Folder(folder, config, shapes, metadata, "", sources)


def found_name(name: str, names: Mapping[str, Any]) -> str:
    """`CLIPTextModel` is written without `text_model.` since transformers 5, and with it before."""
    return name if name in names else name.removeprefix("text_model.")


def joined(rule: layouts.Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that `rule.join` gives tensors of these shapes."""
    first = shapes[0]
    if rule.kind == "transpose":
        return first[::-1]
    if rule.kind == "pointwise":
        return (*first, 1, 1) if len(first) == 2 else first
    return (sum(shape[0] for shape in shapes), *first[1:]) if len(shapes) > 1 else first


def tensors(folder: Path, variant: str | None) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Every tensor of a part: where it lies, its name there, its shape."""
    middle = f".{variant}" if variant else ""
    single = [folder / f"{stem}{middle}.safetensors" for stem in STEMS]
    indices = [folder / f"{stem}.safetensors.index{middle}.json" for stem in STEMS]
    found = [path for path in (*single, *indices) if path.is_file()]
    if len(found) != 1:
        raise InputError(_no_single_file(folder, variant, found))
    if found[0].suffix == ".safetensors":
        return headers(found[0])
    return sharded(found[0])


def _no_single_file(folder: Path, variant: str | None, found: list[Path]) -> str:
    wanted = f"weights of variant {variant!r}" if variant else "weights"
    if found:
        return f"expected one file of {wanted} in {folder}, found {', '.join(path.name for path in found)}: remove one"
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = sorted({name.split(".")[1] for name in there if name.endswith(".safetensors") and name.count(".") > 1})
    hint = (
        f"there is the variant {variants[0].split('-')[0]!r}: name it"
        if variants and not variant
        else "complete the folder"
    )
    if any(name.endswith(PICKLES) for name in there):
        hint = "pickles are not opened: get the safetensors files"
    return f"expected {wanted} as safetensors in {folder}, found {', '.join(there[:4]) or 'nothing'}: {hint}"


def sharded(index: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """The tensors of an index, each in the shard that it names, which has to lie beside it."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{index}: expected a weight_map from tensors to shards, found none")
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for shard in sorted(set(map(str, weights.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {shard!r}: expected a safetensors file in the same folder")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} names the shard {shard}, which is not there: complete the folder")
        found |= headers(index.parent / shard)
    absent = [name for name in weights if name not in found or found[name][0].name != weights[name]]
    if absent:
        raise InputError(f"{index} names {len(absent)} tensors that its shards do not hold: {', '.join(absent[:3])}")
    return found


def headers(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: (path, key, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {path}: {error}") from error


def read_json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(found).__name__}")
    return found


def model_config(folder: Path) -> ModelConfig:
    """The sizes of all parts, from their `config.json`."""
    index = read_json(folder / INDEX)
    present = [name for name in ("text_encoder", "text_encoder_2") if index.get(name, [None])[0]]
    if "text_encoder_2" not in present or "unet" not in index or "vae" not in index:
        names = ", ".join(key for key in index if not key.startswith("_"))
        raise InputError(f"{folder} is no SDXL pipeline: expected unet, vae and text_encoder_2, found {names}")
    try:
        unet = unet_config(read_json(folder / "unet" / "config.json"))
        vae = vae_config(read_json(folder / "vae" / "config.json"))
        encoders = tuple(text_config(read_json(folder / name / "config.json")) for name in present)
        return ModelConfig(
            unet, encoders, vae, 8 * int(read_json(folder / "unet" / "config.json").get("sample_size", 128))
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{folder}: a config.json lacks or garbles a field of an SDXL model ({error!r})") from error


def unet_config(c: Json) -> UNetConfig:
    """diffusers' `UNet2DConditionModel` -> ours; InputError for another kind of UNet."""
    expected = {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "use_linear_projection": True,
    }
    for key, value in expected.items():
        if c.get(key) != value:
            raise InputError(f"the UNet is not SDXL's: expected {key} {value!r}, found {c.get(key)!r}")
    widths, heads = c["block_out_channels"], c["attention_head_dim"]  # which means the number of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    attention = tuple(2**i for i, kind in enumerate(c["down_block_types"]) if kind.startswith("CrossAttn"))
    depth = c["transformer_layers_per_block"]
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=widths[0],
        num_res_blocks=c["layers_per_block"],
        channel_mult=tuple(width // widths[0] for width in widths),
        attention_resolutions=attention[::-1],
        num_head_channels=widths[-1] // heads[-1],
        transformer_depth=depth if isinstance(depth, int) else tuple(depth),
        context_dim=c["cross_attention_dim"],
        adm_in_channels=c["projection_class_embeddings_input_dim"],
    )


def vae_config(c: Json) -> VAEConfig:
    """diffusers' `AutoencoderKL` -> ours."""
    widths = c["block_out_channels"]
    return VAEConfig(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=c["layers_per_block"],
        z_channels=c["latent_channels"],
        embed_dim=c["latent_channels"],
        in_channels=c["in_channels"],
        out_ch=c["out_channels"],
        scale_factor=c["scaling_factor"],
    )


def text_config(c: Json) -> TextEncoderConfig:
    """transformers' `CLIPTextConfig` -> ours."""
    return TextEncoderConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        layers=c["num_hidden_layers"],
        embed_dim=c["projection_dim"],
        activation=c["hidden_act"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
    )
