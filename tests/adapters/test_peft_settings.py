"""PEFT's configuration of an adapter: every key that `LoraConfig` has, and scales by PEFT's own rule, live."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import networks, put_on, with_peft
from cases import sample
from peft import LoraConfig
from safetensors.torch import save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.factors import Factors
from sdxl_ref.adapters.peft_settings import CONFIG_FILE, HEADER_KEY, HONOURED, NO_EFFECT, REFUSED, peft_settings
from sdxl_ref.config import InputError

LAYER = "encoder.layers.1.self_attn.q_proj"
PATTERNS: dict[str, tuple[int, dict[str, Any]]] = {  # the number of scales, and patterns of alphas and ranks
    "the end of a name": (2, {"alpha_pattern": {"self_attn.q_proj": 16.0}}),
    "a whole name, anchored": (2, {"alpha_pattern": {f"^{LAYER}": 16.0}}),
    "an anchored expression": (2, {"alpha_pattern": {r"^encoder\..*\.q_proj": 16.0}}),
    "two fit, the narrow one first": (3, {"alpha_pattern": {LAYER: 16.0, "q_proj": 2.5}}),
    "two fit, the wide one first": (2, {"alpha_pattern": {".*q_proj": 2.5, LAYER: 16.0}}),
    "alternatives in one": (2, {"alpha_pattern": {"1.self_attn.q_proj|0.self_attn.k_proj": 16.0}}),
    "the start of a name is no end": (1, {"alpha_pattern": {"encoder": 16.0}}),
    "part of a word is no end": (1, {"alpha_pattern": {"_proj": 16.0}}),
    "ranks": (3, {"rank_pattern": {LAYER: 2, "k_proj": 3}}),
    "all, and the root of the rank": (
        3,
        {"rank_pattern": {LAYER: 2}, "alpha_pattern": {"q_proj": 6.0}, "use_rslora": True},
    ),
}  # keys in the order of the alphabet: diffusers and PEFT sort them in their files


def saved(tmp_path: Path, **options: Any) -> Any:
    """CLIP-L with a random adapter by PEFT, and what diffusers' pipeline saves of it."""
    from diffusers import StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    clip: Any = networks(peers.SMALL_BASE)["text_encoder"]
    peer = with_peft(peers.transformers_clip(clip), ["q_proj", "k_proj"], **options)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=get_peft_model_state_dict(peer),
        text_encoder_lora_adapter_metadata=peer.peft_config["default"].to_dict(),
    )
    return peer


@torch.no_grad()
def distance(peer: Any, folder: Path) -> float:
    """Of the peer's context and ours, with the adapter of a folder."""
    clip = networks(peers.SMALL_BASE)["text_encoder"]
    put_on({"text_encoder": clip}, (lora.load(folder, peers.SMALL_BASE), 1.0))
    tokens = torch.full((1, 77), 49407)
    tokens[0, 0] = 49406
    return peers.distance(clip(tokens), peer(tokens, output_hidden_states=True).hidden_states[-2])


@pytest.mark.parametrize("name", sample(PATTERNS, *[*PATTERNS][::3]))
def test_every_layer_has_pefts_scale(name: str, tmp_path: Path) -> None:
    count, options = PATTERNS[name]
    peer = saved(tmp_path, **options)
    scales = {f"text_encoder.{name}": m.scaling["default"] for name, m in peer.named_modules() if hasattr(m, "scaling")}
    factors: Any = lora.read(tmp_path)
    assert {name: own.alpha / own.rank for name, own in factors.items()} == pytest.approx(scales)
    assert distance(peer, tmp_path) <= 1e-5
    assert len(set(scales.values())) == count


def alpha(texts: dict[str, str], layer: str = "unet.mid_block.to_q", rank: int = 4) -> float | None:
    settings = peft_settings(texts)
    return None if settings is None else settings.alpha(layer, rank)


def test_where_a_configuration_stands() -> None:
    """In the header as diffusers keeps it, in the header field by field, or beside the file; the header counts."""
    beside = {CONFIG_FILE: json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2})}
    assert alpha({}) is None
    assert alpha({"format": "pt", "lora": "x"}) is None
    assert alpha(beside) == 2
    assert alpha({HEADER_KEY: json.dumps({"unet.lora_alpha": 3, "text_encoder.lora_alpha": 5})} | beside) == 3
    assert alpha({HEADER_KEY: json.dumps({"text_encoder.lora_alpha": 5})}) is None
    assert alpha({HEADER_KEY: json.dumps({"lora_alpha": 6})}) == 6
    flat = {"lora_alpha": "7", "r": "4", "use_rslora": "True", "alpha_pattern": '{"to_k": 9}', "title": "x"}
    assert alpha(flat | beside) == 14
    assert alpha(flat, "unet.a.to_k") == 18
    assert alpha({"unet.lora_alpha": "7", "text_encoder.lora_alpha": "5"}) == 7
    assert alpha({CONFIG_FILE: json.dumps({"r": 4})}) == LoraConfig().lora_alpha


def test_names_that_patterns_are_compared_with() -> None:
    """Without the part where each has a configuration; as PEFT wrapped them in a configuration beside the file."""
    config = {"lora_alpha": 1, "alpha_pattern": {"^mid_block.*": 2, "^unet.mid_block.*": 3}}
    by_part = {HEADER_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    assert alpha(by_part) == 2
    assert alpha({CONFIG_FILE: json.dumps(config)}) == 3
    assert alpha({CONFIG_FILE: json.dumps(config)}, "mid_block.to_q") == 2


# --- every key ------------------------------------------------------------------------------------------------------


def test_every_key_of_pefts_configuration_is_in_one_table() -> None:
    """A key that a new PEFT brings is noticed here."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    tables = [*HONOURED, *NO_EFFECT, *REFUSED]
    assert len(tables) == len(set(tables))
    assert fields <= set(tables)
    assert set(tables) - fields == set()
    written = LoraConfig(target_modules=["to_q"]).to_dict()
    assert alpha({CONFIG_FILE: json.dumps(written, default=list)}, rank=8) == written["lora_alpha"]


ASKS_FOR = {  # a value of each refused key that changes what the adapter does
    "init_lora_weights": "pissa",
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["conv_out"],
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 2},
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_done_here_is_refused_by_name(key: str, tmp_path: Path) -> None:
    down, up = torch.ones(2, 128), torch.ones(128, 2)
    state = {"mid_block.attentions.0.proj_in.lora_A.weight": down, "mid_block.attentions.0.proj_in.lora_B.weight": up}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"r": 2, "lora_alpha": 2, key: ASKS_FOR[key]}))
    message = rf"the adapter_config.json beside it asks for {key}=.*: {REFUSED[key]}, which is not done here"
    with pytest.raises(InputError, match=message):
        lora.load(tmp_path, peers.SMALL_REFINER)
    with pytest.raises(InputError, match=message.replace("the adapter_config.json beside it", "its header .*")):
        alpha({HEADER_KEY: json.dumps({f"unet.{key}": ASKS_FOR[key]})})
    off = getattr(LoraConfig(), key)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"r": 2, "lora_alpha": 2, key: off}))
    assert lora.load(tmp_path, peers.SMALL_REFINER).is_whole


@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_an_adapter_is_refused_where_its_beginning_changes_the_base(initial: Any) -> None:
    """PEFT, live: whether the layer's own weight is what it was."""
    from peft import inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    before = model[0].weight.detach().clone()
    peer = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=initial), model)
    is_changed = not torch.equal(peer[0].base_layer.weight, before)
    texts = {CONFIG_FILE: json.dumps({"r": 4, "lora_alpha": 2, "init_lora_weights": initial})}
    if is_changed:
        with pytest.raises(InputError, match="for weights that were changed before its training"):
            alpha(texts)
    else:
        assert alpha(texts) == 2


@pytest.mark.parametrize("options", [{"fan_in_fan_out": True}, {"lora_dropout": 0.5}, {"megatron_core": "x"}], ids=str)
def test_what_has_no_effect_in_peft_either(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        peer = saved(tmp_path, **options)
    assert distance(peer.eval(), tmp_path) <= 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA", "r": 4, "alpha": 2}, "asks for PEFT's LOHA, which is not done here: expected LORA"),
        ({"a_key_of_the_future": 1}, "asks for a_key_of_the_future=1: a key that is not known here, which is not done"),
        ({"lora_alpha": "many"}, "expected a finite number for lora_alpha, found 'many'"),
        ({"lora_alpha": 10**400}, "expected a finite number for lora_alpha, found 1000"),
        ({"lora_alpha": None}, "expected a finite number for lora_alpha, found None"),
        ({"use_rslora": "x"}, "expected use_rslora true or false, found 'x'"),
        ({"lora_alpha": True}, "expected a finite number for lora_alpha, found True"),
        ({"alpha_pattern": {"to_q": None}}, "expected a finite number for alpha_pattern, found None"),
        ({"alpha_pattern": [1]}, "expected alpha_pattern to be names and numbers"),
        ({"alpha_pattern": {"(": 1}}, "expected a regular expression, found '\\('"),
        ({"r": 8}, "has rank 4, and 8 by the adapter_config.json beside it: expected one rank"),
        ({"r": 4, "rank_pattern": {"to_q": 2}}, "has rank 4, and 2 by the adapter_config.json beside it"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        alpha({CONFIG_FILE: json.dumps(config)})


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000], ids=["empty", "list", "half", "null", "deep"])
def test_texts_that_are_no_configuration(text: str) -> None:
    for key in (HEADER_KEY, CONFIG_FILE):
        with pytest.raises(InputError, match=f"{key} is no "):
            alpha({key: text})


def test_keys_of_the_future_that_are_off_do_no_harm() -> None:
    assert alpha({CONFIG_FILE: json.dumps({"r": 4, "lora_alpha": 3, "new": None, "newer": False, "newest": []})}) == 3


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", [r"(.|..)+\d", r"((.|.)*)*\d"])
def test_a_file_with_a_pattern_that_tracks_back_is_refused_in_less_than_a_second(
    field: str, pattern: str, tmp_path: Path
) -> None:
    state = {}
    for i in range(200):
        layer = f"unet.up_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q"
        state |= {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    metadata = {HEADER_KEY: json.dumps({"unet.r": 2, "unet.lora_alpha": 2, f"unet.{field}": {pattern: 2}})}
    save_file(state, tmp_path / "x.safetensors", metadata)
    start = time.process_time()
    with pytest.raises(InputError, match=rf"{field} of its header .* takes too long: write it without"):
        lora.read(tmp_path / "x.safetensors")
    assert time.process_time() - start < 1


def test_a_scale_is_of_the_layer_and_not_of_the_file(tmp_path: Path) -> None:
    """A tensor `alpha` beside the factors counts, whatever a configuration says."""
    layer = "unet.conv_in"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{layer}.lora_B.weight": torch.ones(32, 2, 1, 1)}
    state[f"{layer}.alpha"] = torch.tensor(5.0)
    save_file(state, tmp_path / "x.safetensors", {HEADER_KEY: json.dumps({"unet.r": 2, "unet.lora_alpha": 1})})
    [factors] = lora.read(tmp_path / "x.safetensors").values()
    assert isinstance(factors, Factors)
    assert factors.alpha == 5
