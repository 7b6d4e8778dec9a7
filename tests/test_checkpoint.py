"""Checkpoints: bit-equal round trips, what a file is told to be, the official key lists, memory, and every error."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_ref.checkpoint import CONFIG_KEY, KNOWN_FILES, build, build_empty, open_checkpoint, prefixes
from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.ecosystem import ImageToImagePipeline
from sdxl_ref.saving import save_checkpoint

OPENCLIP = TextEncoderConfig(width=64, heads=1, layers=2, embed_dim=48, vocab_size=96)
CLIP = TextEncoderConfig(width=128, heads=2, layers=3, embed_dim=128, activation="quick_gelu", vocab_size=96)
# In canonical form and with 64 channels a head everywhere, so that the shapes tell all of it.
REFINER = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=64,
        num_res_blocks=1,
        channel_mult=(1, 2, 3),
        attention_resolutions=(2,),
        num_head_channels=64,
        transformer_depth=(1, 2, 3),
        context_dim=64,
        adm_in_channels=48 + 5 * 256,
    ),
    text_encoders=(OPENCLIP,),
    vae=VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
)
BASE = ModelConfig(
    unet=replace(
        REFINER.unet,
        num_res_blocks=2,
        channel_mult=(1, 2),
        attention_resolutions=(1, 2),
        transformer_depth=(1, 2),
        context_dim=128 + 64,
        adm_in_channels=48 + 6 * 256,
    ),
    text_encoders=(CLIP, OPENCLIP),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2),
)
CONFIGS = {"refiner": REFINER, "base": BASE}
kinds = pytest.mark.parametrize("kind", CONFIGS)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
LOGIT_SCALE = {
    "refiner": "conditioner.embedders.0.model.logit_scale",
    "base": "conditioner.embedders.1.model.logit_scale",
}


def parts_of(config: ModelConfig) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {part: build(part, config) for part in prefixes(config)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file of each kind, float32, with its configuration in the metadata."""
    folder = tmp_path_factory.mktemp("files")
    for kind, config in CONFIGS.items():
        save_checkpoint(folder / f"{kind}.safetensors", config, parts_of(config), torch.float32)
    return {kind: folder / f"{kind}.safetensors" for kind in CONFIGS}


@pytest.fixture
def state(files: dict[str, Path]) -> dict[str, Tensor]:
    return load_file(files["refiner"])


def metadata(config: ModelConfig = REFINER) -> dict[str, str]:
    return {CONFIG_KEY: config.to_json()}


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(state), path, metadata)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return str(caught.value)


# --- loading ------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_comes_back_bit_by_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, path = CONFIGS[kind], tmp_path / "a.safetensors"
    parts = parts_of(config)
    save_checkpoint(path, config, parts, dtype)
    found = open_checkpoint(path)
    assert found.config == config
    assert found.note == ""
    for part, network in parts.items():
        saved, loaded = network.state_dict(), found.load(part, dtype)
        assert not loaded.training
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
        assert list(loaded.state_dict()) == list(saved)
        for key, tensor in loaded.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, saved[key].to(dtype)), key


def test_the_keys_in_a_file_are_the_official_ones(files: dict[str, Path], state: dict[str, Tensor]) -> None:
    parts = parts_of(REFINER)
    for prefix, part in (
        ("model.diffusion_model.", "unet"),
        ("first_stage_model.", "vae"),
        ("conditioner.embedders.0.model.", "text_encoder_2"),
    ):
        assert {k for k in state if k.startswith(prefix)} == {prefix + k for k in parts[part].state_dict()}
    base = open_checkpoint(files["base"]).shapes
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in base
    assert "conditioner.embedders.1.model.ln_final.weight" in base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loading_casts(files: dict[str, Path], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    vae = open_checkpoint(files["refiner"]).load("vae", dtype)
    for key, tensor in vae.state_dict().items():
        assert torch.equal(tensor, state["first_stage_model." + key].to(dtype))


def test_a_loaded_part_runs(files: dict[str, Path]) -> None:
    """On the same input, to the same bits as the network that was saved."""
    z = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = parts_of(REFINER)["vae"].eval().decode(z)  # type: ignore[operator]
        assert torch.equal(open_checkpoint(files["refiner"]).load("vae").decode(z), expected)  # type: ignore[operator]


@kinds
def test_a_missing_logit_scale_is_the_logarithm_of_100(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files[kind])
    del state[LOGIT_SCALE[kind]]
    for name, meta in (("with.safetensors", metadata(CONFIGS[kind])), ("without.safetensors", None)):
        found = open_checkpoint(write(tmp_path / name, state, meta))
        scale = found.load("text_encoder_2").state_dict()["logit_scale"]
        assert scale.item() == pytest.approx(math.log(100))
        assert found.load("text_encoder_2", torch.float16).state_dict()["logit_scale"].dtype == torch.float16


def test_a_logit_scale_in_the_file_is_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    state[LOGIT_SCALE["refiner"]] = torch.tensor(1.25)
    found = open_checkpoint(write(tmp_path / "a.safetensors", state, metadata()))
    assert found.load("text_encoder_2").state_dict()["logit_scale"] == 1.25


EXTRAS = {
    "denoiser.sigmas": torch.ones(1000),
    "conditioner.embedders.0.model.attn_mask": torch.zeros(77, 77),
    "conditioner.embedders.1.model.attn_mask": torch.zeros(77, 77),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
}


@kinds
@pytest.mark.parametrize("with_config", [True, False])
def test_what_official_files_also_carry(kind: str, with_config: bool, files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files[kind])
    extras = {k: v for k, v in EXTRAS.items() if kind == "base" or not ("embedders.1" in k or "transformer" in k)}
    found = open_checkpoint(
        write(tmp_path / "a.safetensors", state | extras, metadata(CONFIGS[kind]) if with_config else None)
    )
    assert_same(found.config, CONFIGS[kind])
    unet = found.load("unet").state_dict()
    assert all(torch.equal(tensor, state["model.diffusion_model." + key]) for key, tensor in unet.items())


@pytest.mark.parametrize(
    "key", ["denoiser.sigma", "model_emas.x", "xdenoiser.sigmas", "optimizer.step", "model.attn_mask"]
)
def test_no_other_extra(key: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state | {key: torch.zeros(1)}, metadata())
    assert f"1 unexpected: {key}" in error_of(path)


def test_hashes(files: dict[str, Path], state: dict[str, Tensor], tmp_path: Path) -> None:
    found = open_checkpoint(files["refiner"])
    assert found.sha256() == hashlib.sha256(files["refiner"].read_bytes()).hexdigest()
    vae = [state[key].numpy().tobytes() for key in sorted(state) if key.startswith("first_stage_model.")]
    tensors = hashlib.sha256(b"".join(vae)).hexdigest()
    assert found.vae_name("") == found.vae_name("0" * 64) == f"unknown, tensors sha256 {tensors}"
    names = [(name, found.vae_name(digest)) for digest, (name, _) in KNOWN_FILES.items()]
    assert names == [
        (name, f"{'0.9' if name.endswith('0.9vae') else '1.0'}, tensors sha256 {tensors}") for name, _ in names
    ]
    assert len(names) == 4
    state["model.diffusion_model.out.2.bias"] += 1
    assert open_checkpoint(write(tmp_path / "a.safetensors", state, metadata())).vae_name("") == found.vae_name("")
    state["first_stage_model.decoder.conv_out.bias"] += 1
    assert open_checkpoint(write(tmp_path / "a.safetensors", state, metadata())).vae_name("") != found.vae_name("")


def test_saving_replaces_a_file_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full_disk(state: Any, target: Path, *_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("sdxl_ref.saving.save_file", full_disk)
    with pytest.raises(InputError, match=r"could not write .*a\.safetensors: no space left"):
        save_checkpoint(path, REFINER, parts_of(REFINER), torch.float16)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


# --- what a file is -----------------------------------------------------------------------------------------------


def assert_same(found: ModelConfig, expected: ModelConfig) -> None:
    """Equal but for the order of `attention_resolutions`, which has no meaning."""

    def canonical(config: ModelConfig) -> dict[str, Any]:
        raw = asdict(config)
        raw["unet"]["attention_resolutions"] = sorted(raw["unet"]["attention_resolutions"])
        return raw

    assert canonical(found) == canonical(expected)


@kinds
def test_without_a_configuration_the_shapes_tell(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "a.safetensors", load_file(files[kind])))
    assert found.note == f"no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
    assert found.name == f"SDXL-like {kind}"
    assert found.config.kind == kind
    assert_same(found.config, CONFIGS[kind])


@pytest.mark.parametrize("official", [REFINER_1_0, BASE_1_0], ids=["refiner", "base"])
def test_the_shapes_of_the_official_models_tell_the_official_sizes(official: ModelConfig) -> None:
    from sdxl_ref.identify import config_from_shapes

    inferred = config_from_shapes(expected_shapes(official))
    depth = official.unet.depths[:-1]
    levels = [d if official.unet.has_attention(i) else 1 for i, d in enumerate(depth)]
    unet = replace(official.unet, transformer_depth=(*levels, official.unet.depths[-1]))
    assert_same(inferred, replace(official, unet=unet))


@pytest.mark.parametrize(
    "change",
    [
        {"unet": replace(REFINER.unet, model_channels=96, num_head_channels=32)},
        {"text_encoders": (replace(OPENCLIP, width=96),), "unet": replace(REFINER.unet, context_dim=96)},
    ],
    ids=["unet", "text"],
)
def test_other_head_sizes_need_the_configuration(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(REFINER, **change)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, config, parts_of(config), torch.float16)
    assert open_checkpoint(path).config == config
    line = error_of(write(path, load_file(path)))
    assert "the shapes do not tell the sizes: put them into the metadata, sdxl_ref.config" in line
    assert "no heads of 64 channels" in line or "must divide" in line


def test_a_configuration_of_another_model_is_found_out(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = replace(REFINER, unet=replace(REFINER.unet, context_dim=32))
    line = error_of(write(tmp_path / "a.safetensors", state, metadata(other)))
    assert "of another shape" in line
    assert "(expected 128x32, found 128x64)" in line


def odd_configurations() -> list[tuple[str, str]]:
    """(what is odd, JSON) with each value of a real configuration replaced in turn, and JSON of other kinds."""
    odd = [None, 0, -1, 1.5, "x", [0]]
    found: list[tuple[str, Any]] = [(f"whole {value!r}", value) for value in odd]

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            for value in odd:
                raw = json.loads(REFINER.to_json())
                place = raw
                for step in path:
                    place = place[step]
                place[key] = value
                found.append((f"{'.'.join(map(str, (*path, key)))} {value!r}", raw))
            if isinstance(node[key], dict | list):
                walk(node[key], (*path, key))

    walk(json.loads(REFINER.to_json()), ())
    return [(name, json.dumps(raw)) for name, raw in found] + [("no JSON", "{"), ("empty", "")]


UNSEEN = ("text_encoders.0.heads", "vae.scale_factor", "unet.num_head_channels")  # no shape tells whether it is right
IDLE = ("unet.transformer_depth.0 0", "vae.scale_factor 1.5")  # the depth of a level without attention; a fair factor


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("seen", [True, False])
def test_an_odd_configuration_is_bad_input(seen: bool, files: dict[str, Path], tmp_path: Path) -> None:
    """Every one of them is refused in one InputError: none builds, or none fits the tensors."""
    shapes, path = open_checkpoint(files["refiner"]).shapes, tmp_path / "a.safetensors"
    cases = [each for each in odd_configurations() if each[0].startswith(UNSEEN) != seen]
    if seen:
        cases = random.Random(0).sample(cases, 80)
    failures = []
    for name, text in cases:
        try:
            open_checkpoint(sparse_file(path, shapes, {CONFIG_KEY: text}))
            if not name.startswith(IDLE):
                failures.append(f"{name}: accepted")
        except InputError:
            pass
        except Exception as error:
            failures.append(f"{name}: {error!r}")
    assert failures == []


ABSURD = [
    ("unet", "num_head_channels", 64.0, "num_head_channels must be whole numbers from 1 to a million, found 64.0"),
    ("unet", "num_res_blocks", True, "num_res_blocks must be whole numbers from 1 to a million, found True"),
    ("unet", "num_res_blocks", 10**6, "expected networks of at most 1000 blocks, found 9000000"),
    ("unet", "transformer_depth", 10**6, "expected networks of at most 1000 blocks, found 3000003"),
    ("unet", "attention_resolutions", [2, -4], "attention_resolutions must be whole numbers from 1"),
    ("unet", "context_dim", 10**18, "context_dim must be whole numbers from 1 to a million, found 10000"),
    ("text_encoders", "layers", 10**6, "expected networks of at most 1000 blocks, found 1000000"),
    ("text_encoders", "heads", -1, "heads must be whole numbers from 1 to a million, found -1"),
    ("vae", "num_res_blocks", 10**6, "expected networks of at most 1000 blocks, found 2000000"),
    *(("vae", "scale_factor", value, "a scale_factor above 0") for value in (0, -1, math.nan, math.inf, True)),
    ("", "resolution", math.inf, "resolution must be a multiple of 8 up to 10000, found inf"),
    ("", "resolution", 8 * 10**9, "resolution must be a multiple of 8 up to 10000, found 8000000000"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), ABSURD)
def test_an_absurd_configuration_is_told_at_once(
    part: str, field: str, value: Any, message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    raw = json.loads(REFINER.to_json())
    place = raw[part] if part else raw
    (place[0] if part == "text_encoders" else place)[field] = value
    path = write(tmp_path / "a.safetensors", state, {CONFIG_KEY: json.dumps(raw)})
    began = time.perf_counter()
    line = error_of(path)
    assert time.perf_counter() - began < 5  # building a million blocks takes minutes
    assert line.startswith("expected a configuration written by sdxl_ref, found ")
    assert message in line
    assert "\n" not in line


# --- the official lists -------------------------------------------------------------------------------------------

OFFICIAL = Path(__file__).parent / "official"
RELEASED = {"refiner": (REFINER_1_0, "sd_xl_refiner_1.0.tsv"), "base": (BASE_1_0, "sd_xl_base_1.0.tsv")}
released = pytest.mark.parametrize("kind", RELEASED)


def listed_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Every key and shape as the official code builds them, from the lists beside the tests."""
    lines = (line.split("\t") for line in (OFFICIAL / RELEASED[kind][1]).read_text().splitlines())
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in lines}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    states = {prefix: build_empty(part, config).state_dict() for part, prefix in prefixes(config).items()}
    return {prefix + key: tuple(t.shape) for prefix, state in states.items() for key, t in state.items()}


@released
def test_full_size_keys_and_shapes_are_the_official_ones(kind: str) -> None:
    listed, ours = listed_shapes(kind), expected_shapes(RELEASED[kind][0])
    assert len(listed) == {"refiner": 1859, "base": 2515}[kind]
    assert set(listed) - set(ours) == {"denoiser.sigmas"}  # the schedule, which is computed
    assert set(ours) - set(listed) == set()
    assert {key: (shape, listed[key]) for key, shape in ours.items() if shape != listed[key]} == {}


@released
def test_full_size_parameter_counts(kind: str) -> None:
    config = RELEASED[kind][0]
    counts = {part: sum(p.numel() for p in build_empty(part, config).parameters()) for part in prefixes(config)}
    common = {"vae": 83_653_863, "text_encoder_2": 694_659_841}
    refiner, base = {"unet": 2_259_526_660}, {"unet": 2_567_463_684, "text_encoder": 123_060_480}
    assert counts == common | (refiner if kind == "refiner" else base)


def test_an_empty_build_takes_no_memory_and_no_randomness() -> None:
    state = torch.get_rng_state()
    network = build_empty("unet", REFINER_1_0)
    assert all(p.is_meta for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A file of full length whose data are one hole: right header, no disk, no memory. float16."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in sorted(shapes):
        begin, end = end, end + 2 * math.prod(shapes[key])
        header[key] = {"dtype": "F16", "shape": list(shapes[key]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@released
def test_a_file_of_full_size_is_told_by_its_header(kind: str, tmp_path: Path) -> None:
    found = open_checkpoint(sparse_file(tmp_path / "a.safetensors", listed_shapes(kind)))
    assert found.config == RELEASED[kind][0]
    assert found.name == f"SD-XL 1.0 {kind} (by its keys and shapes)"
    assert found.note == ""


@released
def test_a_file_of_full_size_with_one_key_less(kind: str, tmp_path: Path) -> None:
    shapes = listed_shapes(kind)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.3.attn2.to_k.weight"
    del shapes[key]
    line = error_of(sparse_file(tmp_path / "a.safetensors", shapes))
    assert line.endswith(f"looks like an SDXL {kind}, but its tensors do not fit: 1 missing: {key}")


def test_a_base_is_no_refiner(tmp_path: Path, files: dict[str, Path]) -> None:
    for path in (sparse_file(tmp_path / "a.safetensors", listed_shapes("base")), files["base"]):
        with pytest.raises(InputError, match=r"expected a refiner .*found an SDXL base"):
            ImageToImagePipeline.from_single_file(path)


# --- what is no checkpoint ----------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.safetensors") == f"no such checkpoint: {tmp_path}/none.safetensors"


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\0" * 8, b"hello, I am no safetensors file", b"PK\3\4" + b"x" * 100]
)
def test_no_safetensors(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert error_of(path).startswith(f"expected a whole safetensors file, could not read {path}: ")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999999])
def test_a_truncated_file(share: float, files: dict[str, Path], tmp_path: Path) -> None:
    data, path = files["refiner"].read_bytes(), tmp_path / "a.safetensors"
    path.write_bytes(data[: int(len(data) * share)])
    assert "expected a whole safetensors file" in error_of(path)


def test_a_file_with_something_after_its_end(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["refiner"].read_bytes() + b"\0" * 8)
    assert "expected a whole safetensors file" in error_of(path)


def entry(begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIES: dict[str, Any] = {
    "past the end": {"a": entry(0, 16), "b": entry(16, 99_999_984, (24_999_992,))},
    "overlapping": {"a": entry(0, 16), "b": entry(8, 24)},
    "the same place": {"a": entry(0, 16), "b": entry(0, 16)},
    "wrong length": {"a": entry(0, 32)},
    "a hole": {"a": entry(0, 16), "b": entry(20, 36)},
    "not from the start": {"a": entry(8, 24), "b": entry(24, 40)},
    "backwards": {"a": entry(16, 0)},
    "negative": {"a": entry(-16, 0)},
    "negative shape": {"a": entry(0, 16, (-4,))},
    "immense shape": {"a": entry(0, 16, (2**62, 2**62))},
    "unknown dtype": {"a": entry(0, 16, dtype="F99")},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": [1, 2, 3],
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": entry(0, 16)},
    "no json": b"{'a'",
    "no text": b"\xff\xfe\xfd\xfc",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header(lie: str, tmp_path: Path) -> None:
    text = LIES[lie] if isinstance(LIES[lie], bytes) else json.dumps(LIES[lie]).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 40)
    assert error_of(path).startswith(f"expected a whole safetensors file, could not read {path}: ")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 99])
def test_a_header_of_another_length(length: int, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + files["refiner"].read_bytes()[8:])
    assert "expected a whole safetensors file" in error_of(path)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(k) for k in list(state) if k.startswith(key)] and None


def changed(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: value})


NORM = "first_stage_model.decoder.norm_out.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without(NORM), f"1 missing: {NORM}"),
        (changed(NORM, torch.ones(33)), f"1 of another shape: {NORM} (expected 32, found 33)"),
        (changed(NORM, torch.ones(32, 1)), f"1 of another shape: {NORM} (expected 32, found 32x1)"),
        (changed(NORM, torch.tensor(1.0)), f"1 of another shape: {NORM} (expected 32, found scalar)"),
        (
            changed(LOGIT_SCALE["refiner"], torch.ones(1)),
            "1 of another shape: conditioner.embedders.0.model.logit_scale",
        ),
        (changed("first_stage_model.loss.x", torch.ones(1)), "1 unexpected: first_stage_model.loss.x"),
        (without("conditioner.embedders.0.model.ln_final"), "2 missing: conditioner.embedders.0.model.ln_final."),
        (without("first_stage_model.decoder."), "missing: first_stage_model.decoder."),
    ],
)
def test_keys_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], None], problem: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    change(state)
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert f"{tmp_path}/a.safetensors looks like an SDXL refiner, but its tensors do not fit: " in line
    assert problem in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_of_whole_numbers_are_refused(dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    state |= {NORM: state[NORM].to(dtype), "model_ema.num_updates": torch.tensor(7)}  # the latter is no weight
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert line == f"{tmp_path}/a.safetensors: expected weights in floating point, found 1 others, as {NORM}"


def test_several_problems_in_one_line_with_their_counts(state: dict[str, Tensor], tmp_path: Path) -> None:
    without("first_stage_model.decoder.mid.")(state)
    state |= {"lora.a": torch.ones(1), NORM: torch.ones(2)}
    line = error_of(write(tmp_path / "a.safetensors", state, metadata()))
    assert "missing: first_stage_model.decoder.mid." in line
    assert "1 unexpected: lora.a" in line
    assert f"1 of another shape: {NORM} (expected 32, found 2)" in line
    assert "\n" not in line
    assert len(line) < 1500  # of many keys, the first few


@pytest.mark.parametrize(
    "keys",
    [
        [
            "model.diffusion_model.input_blocks.0.0.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ],
        ["unet.conv_in.weight"],
        ["lora_unet_down_blocks_1.lora_down.weight", "lora_te1_text_model.alpha"],
        ["encoder.conv_in.weight"],
        [],
    ],
    ids=["SD 1.5", "diffusers", "LoRA", "VAE", "nothing"],
)
def test_another_models_keys(keys: list[str], tmp_path: Path) -> None:
    line = error_of(write(tmp_path / "a.safetensors", {key: torch.zeros(320, 4, 3, 3) for key in keys}))
    assert "is no SDXL checkpoint in the official layout" in line
    assert LABEL in line
    assert (", ".join(sorted({key.split(".")[0] for key in keys})) or "no tensors") in line


@pytest.mark.parametrize("prefix", ["first_stage_model.", "conditioner.", "model.diffusion_model.middle_block."])
def test_without_a_configuration_a_missing_part_is_named(prefix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    without(prefix)(state)
    error_of(write(tmp_path / "a.safetensors", state))


READ = (  # what the sizes are read from
    FIRST,
    LABEL,
    "model.diffusion_model.out.2.weight",
    "model.diffusion_model.input_blocks.3.0.out_layers.3.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "conditioner.embedders.0.model.token_embedding.weight",
    "conditioner.embedders.0.model.text_projection",
    "conditioner.embedders.0.model.positional_embedding",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.down.1.block.0.conv1.weight",
    "first_stage_model.post_quant_conv.weight",
    "first_stage_model.decoder.conv_out.weight",
)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_without_a_configuration_odd_shapes_are_bad_input(files: dict[str, Path], tmp_path: Path) -> None:
    """Any shape may be a lie: one InputError, no other exception."""
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    right = dict(open_checkpoint(files["refiner"]).shapes)
    failures = []
    for key in [*READ, *rng.sample(sorted(right), 3)]:
        for shape in [(), (0,), (7, 7), (64,) * 5]:
            try:
                open_checkpoint(sparse_file(path, right | {key: shape}))
                failures.append(f"{key} {shape}: accepted")
            except InputError:
                pass
            except Exception as error:
                failures.append(f"{key} {shape}: {error!r}")
    assert failures == []


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl", ".CKPT"])
def test_a_pickle_is_refused_unopened(suffix: str, tmp_path: Path) -> None:
    """By its name: this file is no pickle at all, and nothing opens it."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"no pickle")
    opened: list[str] = []
    watch = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watch and event == "open" else None)
    line = error_of(path)
    watch.clear()
    assert line.startswith(f"{path} is a pickle, which can run any code when opened: expected a safetensors file")
    assert str(path) not in opened


def test_a_pickle_under_another_name_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"state_dict": {LABEL: torch.zeros(1)}}, path)
    assert "expected a whole safetensors file" in error_of(path)


def test_a_folder_with_one_file_is_that_file(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(files["refiner"].read_bytes())
    (tmp_path / "README.md").write_text("hello")
    assert open_checkpoint(tmp_path).path == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "none"),
        (["model.bin", "README.md"], "none"),
        (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"),
    ],
)
def test_a_folder_without_one_file(names: list[str], found: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    line = error_of(tmp_path)
    assert line == f"expected one .safetensors file in the folder {tmp_path}, found {found}: name the file"


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time, torch
from sdxl_ref.checkpoint import open_checkpoint, prefixes

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

open_checkpoint(sys.argv[1]).load("vae")  # what loads once and stays: libraries, allocator
before = peak = anonymous()
thread = threading.Thread(target=watch)
thread.start()
found = open_checkpoint(sys.argv[2])
parts = [found.load(part, getattr(torch, sys.argv[3])) for part in prefixes(found.config)]
running = False
thread.join()
weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
assert all(str(p.dtype) == "torch." + sys.argv[3] for part in parts for p in part.parameters())
print(max(peak, anonymous()) - before, weights)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 210 MB in float16."""
    config = replace(
        REFINER,
        unet=replace(REFINER.unet, model_channels=192, num_res_blocks=1, context_dim=512),
        text_encoders=(replace(OPENCLIP, width=512, heads=8, vocab_size=20_000),),
    )
    path = tmp_path_factory.mktemp("large") / "a.safetensors"
    save_checkpoint(path, config, parts_of(config), torch.float16)
    assert 150e6 < path.stat().st_size < 300e6
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(("dtype", "copies"), [("float16", 0.2), ("float32", 1.1), ("bfloat16", 1.1)])
def test_loading_takes_one_copy_of_the_weights_at_most(
    dtype: str, copies: float, files: dict[str, Path], large_file: Path
) -> None:
    """Anonymous memory at its peak; in the file's own dtype the weights stay mapped from the file."""
    command = [sys.executable, "-c", MEASURE, str(files["refiner"]), str(large_file), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights = map(int, result.stdout.split())
    assert weights == pytest.approx(large_file.stat().st_size * (2 if dtype == "float32" else 1), rel=0.01)
    assert grown <= copies * weights
    assert grown >= (0.9 if copies > 1 else 0) * weights  # the measure sees the copy
