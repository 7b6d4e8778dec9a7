"""inspect, verify and diff, from the command line."""

import json
from pathlib import Path

import peers
import pytest
import torch
from adapter_files import random_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_ref.config import InputError
from sdxl_ref.weights import report
from sdxl_ref.weights.identity import KNOWN_FILES
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.streaming import HASH_KEY
from sdxl_ref.weights.tensor_files import sha256_of
from weights_convert.cli import main
from weights_convert.convert import convert, model_spec
from weights_convert.reports import diff


@pytest.fixture(scope="module")
def own(tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that a conversion wrote, to be read alone."""
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    convert(tiny_refiner_file, path, "official")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_inspect(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", own)
    assert status == 0
    assert "SDXL-like refiner" in out
    assert "modelspec.timestep_range: 0,199" in out
    found = json.loads(run(capsys, "inspect", own, "--json")[1])
    assert found["parts"]["unet"]["dtypes"] == ["float16"]
    state = load_file(own)
    expected = sum(t.numel() for key, t in state.items() if key.startswith("model.diffusion_model."))
    assert found["parts"]["unet"]["parameters"] == expected
    assert found["vae"].startswith("unknown, tensors sha256 ")


def test_inspect_names_the_autoencoder_where_its_file_is_known(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sha256 of an official file, of a folder's file of the VAE, and of a file that is nothing but a VAE."""
    convert(own, tmp_path / "folder", "diffusers")
    theirs = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    bare = {key: value for key, value in load_file(own).items() if key.startswith("first_stage_model.")}
    save_file({key.split(".", 1)[1]: value for key, value in bare.items()}, tmp_path / "bare.safetensors")
    save_file(bare, tmp_path / "prefixed.safetensors")
    alone = [tmp_path / "bare.safetensors", tmp_path / "prefixed.safetensors", theirs, theirs.parent]

    def named(path: Path) -> str:
        status, out, _ = run(capsys, "inspect", path, "--json")
        assert status == 0
        found = json.loads(out)
        assert found["parts"]["vae"]["tensors"] == len(bare)
        assert found["parts"]["vae"]["dtypes"] == ["float16"]
        assert (list(found["parts"]) == ["vae"]) == (path in alone)
        return found["vae"].split(",")[0]  # type: ignore[no-any-return]

    files = [own, tmp_path / "folder", *alone]
    assert [named(path) for path in files] == ["unknown"] * 6
    assert "VAE: unknown, file sha256 " in run(capsys, "inspect", theirs)[1]
    monkeypatch.setitem(KNOWN_FILES, sha256_of(own), ("some_file", "0.9"))
    monkeypatch.setattr(report, "OFFICIAL_SIZES", (own.stat().st_size,))
    for path in (*alone[:2], theirs):
        monkeypatch.setitem(report.VAES, sha256_of(path), f"the {path.stem}")
    assert [named(path) for path in files] == [
        "0.9", "the diffusion_pytorch_model", "the bare", "the prefixed", *["the diffusion_pytorch_model"] * 2
    ]  # fmt: skip


def test_verify_finds_damage(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", own)[0] == 0
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(data)
    status, out, _ = run(capsys, "verify", flipped)
    assert status == 1
    assert "ModelSpec hash" in out
    assert "NO" in out
    state = load_file(own)
    state["model.diffusion_model.out.2.bias"][0] = torch.nan
    metadata = {k: v for k, v in model_spec(open_checkpoint(own).config).items() if k != HASH_KEY}
    save_file(state, tmp_path / "nan.safetensors", metadata)
    status, out, _ = run(capsys, "verify", tmp_path / "nan.safetensors", "--json")
    assert status == 1
    verdict = json.loads(out)[-1]
    assert verdict == {
        "check": "finite values",
        "holds": False,
        "found": "1 tensors hold NaN or infinity: model.diffusion_model.out.2.bias",
    }


def test_diff_across_layouts(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(own, tmp_path / "folder", "diffusers")
    status, out, _ = run(capsys, "diff", own, tmp_path / "folder")
    assert status == 0
    assert "0 differ" in out
    state = load_file(own)
    key = "model.diffusion_model.out.2.weight"
    state[key] = state[key] * 1.5
    with safe_open(own, framework="pt") as file:
        save_file(state, tmp_path / "changed.safetensors", file.metadata())
    status, out, _ = run(capsys, "diff", tmp_path / "folder", tmp_path / "changed.safetensors", "--json")
    assert status == 1
    [change] = json.loads(out)["different"]
    assert change["key"] == key
    assert change["relative"] == pytest.approx(0.5, rel=1e-2)


def test_diff_of_values_that_are_no_numbers(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is NaN, infinity is infinity; where only one file has them the JSON says null, in valid JSON."""
    state = load_file(own)
    with safe_open(own, framework="pt") as file:
        metadata = file.metadata()
    bias, weight = "model.diffusion_model.out.2.bias", "model.diffusion_model.out.2.weight"
    state[bias][:2] = torch.tensor([torch.nan, torch.inf])
    save_file(state, tmp_path / "a.safetensors", metadata)
    save_file(state, tmp_path / "b.safetensors", metadata)
    status, out, _ = run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert status == 0
    assert json.loads(out)["different"] == []
    assert json.loads(out)["equal"] == len(state)
    state[bias][3] += 1
    state[weight][0, 0] = torch.nan
    save_file(state, tmp_path / "b.safetensors", metadata)
    status, out, _ = run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert status == 1

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = {each["key"]: each for each in json.loads(out, parse_constant=never)["different"]}
    assert found.keys() == {bias, weight}
    assert found[weight] == {"key": weight, "largest": None, "relative": None}
    assert found[bias]["largest"] == pytest.approx(1, rel=1e-2)
    status, out, _ = run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 1
    assert "nan" in out


def test_diff_tells_a_dtype_from_values_and_sorts_by_distance(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same values in a wider dtype, rounded ones in a narrower one, and others; the furthest first."""
    state = {key: value.float() + 1e-6 for key, value in load_file(own).items()}
    names = sorted(key for key in state if key.startswith("model.diffusion_model.output_blocks"))
    wider, narrower, bfloat, both, near, far = names[:6]
    with safe_open(own, framework="pt") as file:
        metadata = file.metadata()
    save_file(state, tmp_path / "a.safetensors", metadata)
    changes = {
        wider: state[wider].double(),
        narrower: state[narrower].half(),
        bfloat: state[bfloat].bfloat16(),
        both: state[both].half() * 2,
        near: state[near] * 1.001,
        far: state[far] * 1.5,
    }
    save_file(state | changes, tmp_path / "b.safetensors", metadata)
    status, out, _ = run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 1
    lines = out.splitlines()
    assert lines[0] == f"{len(state) - 6} tensors are equal, 3 differ"
    assert lines[1:5] == [
        f"1 of another dtype: {both}",
        f"1 of another dtype alone (F32 → F64, the same values): {wider}",
        f"1 of another dtype alone (F32 → F16, rounded): {narrower}",
        f"1 of another dtype alone (F32 → BF16, rounded): {bfloat}",
    ]
    assert lines[5].split() == ["tensor", "relative", "largest"]
    assert [line.split()[0] for line in lines[6:]] == [both, far, near]
    assert [float(line.split()[1]) for line in lines[6:]] == pytest.approx([1, 0.5, 0.001], rel=0.01)
    status, out, _ = run(capsys, "diff", tmp_path / "b.safetensors", tmp_path / "a.safetensors", "--json")
    found = json.loads(out)
    assert status == 1
    assert found["of another dtype alone"]["F16 → F32, rounded"] == [narrower]
    assert set(found["of another dtype"]) == {wider, narrower, bfloat, both}
    assert {each["key"] for each in found["different"]} == {both, near, far}


def test_diff_of_a_model_in_another_dtype_is_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(own)
    with safe_open(own, framework="pt") as file:
        save_file({key: value.float() for key, value in state.items()}, tmp_path / "a.safetensors", file.metadata())
    status, out, _ = run(capsys, "diff", own, tmp_path / "a.safetensors")
    assert status == 1
    first, second = out.splitlines()
    assert first == "0 tensors are equal, 0 differ"
    assert second.startswith(f"{len(state)} of another dtype alone (F16 → F32, the same values): ")


def test_diff_counts_what_it_does_not_show(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(own)
    with safe_open(own, framework="pt") as file:
        save_file({key: value + 1 for key, value in state.items()}, tmp_path / "a.safetensors", file.metadata())
    _, out, _ = run(capsys, "diff", own, tmp_path / "a.safetensors")
    assert out.splitlines()[-1] == f"and {len(state) - 40} others, which differ less"


def test_one_part_alone_is_verified_and_compared(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever layout; not with another part, nor with a whole model."""
    for part in ("vae", "unet"):
        convert(own, tmp_path / f"{part}.safetensors", "official", part=part)
        convert(own, tmp_path / part, "diffusers", part=part)
        assert run(capsys, "diff", tmp_path / f"{part}.safetensors", tmp_path / part)[0] == 0
        status, out, _ = run(capsys, "verify", tmp_path / part)
        assert status == 0
        assert f"tensors of an SDXL {'UNet' if part == 'unet' else 'autoencoder'}" in out
    for second in (tmp_path / "unet", own):
        status, _, err = run(capsys, "diff", tmp_path / "vae", second)
        assert status == 2
        assert "they have no tensors to compare" in err


# --- the pocket pair ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pocket-base", "pocket-refiner"])
def test_the_pocket_pair_by_its_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As every command takes them, and `pocket` where the other file tells which."""
    target = tmp_path / "a.safetensors"
    for words in (
        ["inspect", name],
        ["verify", name],
        ["convert", name, target, "--to", "official", "--vae", name],
        ["diff", name, name],
        ["diff", name, "pocket"],
        ["diff", "pocket", name],
        ["convert", name, target, "--to", "official", "--vae", "pocket", "--openclip", "pocket", "--force"],
        ["convert", name, tmp_path / "vae", "--to", "diffusers", "--part", "vae"],
    ):
        status, _, err = run(capsys, *words)
        assert (status, err) == (0, ""), words
    status, _, err = run(capsys, "diff", "pocket", "pocket")
    assert status == 2
    assert "the pocket pair is two models" in err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_refiner_file: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"x")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    for words in (
        ["inspect", tmp_path / "none.safetensors"],
        ["inspect", tmp_path / "x.ckpt"],
        ["verify", tmp_path / "x.safetensors"],
        ["convert", tiny_refiner_file, tmp_path / "out"],
        ["convert", tiny_refiner_file, tmp_path / "out", "--to", "onnx"],
        ["diff", tiny_refiner_file],
        ["unknown"],
        [],
    ):
        status, out, err = run(capsys, *words)
        assert status == 2, words
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("weights-convert: error: ")


def test_adapters_are_not_compared_and_what_to_do_is_told(tiny_refiner_file: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        random_file(peers.TINY_REFINER, tmp_path / name)
    for pair in (("a", "b"), ("a", tiny_refiner_file.with_suffix("")), (tiny_refiner_file.with_suffix(""), "b")):
        first, second = (tmp_path / f"{name}.safetensors" for name in pair)
        with pytest.raises(InputError, match=r"found an adapter \(LoRA\), .*weights-convert lora merge") as caught:
            diff(first, second)
        assert "--lora" not in str(caught.value)
