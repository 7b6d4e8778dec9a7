"""What fine-tuning leaves: adapters that fit and are finite, checkpoints in the official layout and their dtypes."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import sample
from safetensors.torch import load_file
from training_data import CONFIGS
from training_runs import command, save_model, start

from sdxl_ref.adapters import lora
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.training import results
from sdxl_ref.training.state import STATE
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.opening import open_checkpoint

SAME_CHANGE = {"rtol": 1e-4, "atol": 1e-7}  # alpha is a factor in one form, and multiplied into `up` in the other


class Trained(NamedTuple):
    """A folder with adapters, and what was printed while they were trained."""

    folder: Path
    printed: str


@pytest.fixture(scope="module", params=list(CONFIGS))
def trained(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The text encoders learn too."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--steps", "4", "--learning-rate", "0.01", "--rank", "2", "--alpha", "1"]
    options += ["--convolutions", "--text-encoders"]
    words = command(request.getfixturevalue(f"{request.param}_file"), pictures, folder, *options)
    with redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0
    return Trained(folder, printed.getvalue())


def test_from_a_folder_of_pictures_to_two_adapters_that_say_the_same(
    trained: Trained, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["trained"]
    assert "4 pictures by size (height x width): 128x128: 4" in trained.printed
    assert "training a LoRA of rank 2 on " in trained.printed
    assert f"plan: 4 steps of 1 pictures, t in 0..{199 if kind == 'refiner' else 999}" in trained.printed
    config = CONFIGS[kind]
    kohya, peft = (lora.fit(lora.read(trained.folder / name), config) for name in results.ADAPTERS.values())
    parts = {"unet", "text_encoder_2"} if kind == "refiner" else {"unet", "text_encoder", "text_encoder_2"}
    for adapter in (kohya, peft):
        assert not adapter.missing
        assert not adapter.misshapen
        assert {place.part for place in adapter.layers} == parts
    assert kohya.layers.keys() == peft.layers.keys()
    for place, factors in kohya.layers.items():
        assert torch.allclose(factors.delta(), peft.layers[place].delta(), **SAME_CHANGE)
        assert float(factors.delta().abs().max()) > 0


@pytest.mark.parametrize("trained", ["base"], indirect=True)
def test_an_adapter_is_not_put_on_the_other_of_the_pair(trained: Trained, refiner_file: Path) -> None:
    """Layers of the same name and shape are in both: what the file says of itself decides."""
    pipe = ImageToImagePipeline.from_pretrained(refiner_file)
    with pytest.raises(InputError, match="was made for 'stable-diffusion-xl-v1-base/lora', by its header"):
        pipe.load_lora_weights(trained.folder / "lora_kohya.safetensors")


def test_an_adapter_that_is_not_finite_is_not_written(
    refiner_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    learned = results.learned

    def spoiled(factors: Any, averaged: Any) -> Any:
        adapter = learned(factors, averaged)
        next(iter(adapter.layers.values())).up[0, 0] = torch.inf
        return adapter

    monkeypatch.setattr(results, "learned", spoiled)
    assert main(command(refiner_file, pictures, tmp_path, "--steps", "1", "--rank", "2")) == 2
    assert "is not finite: use a lower learning rate" in capsys.readouterr().err
    assert not list(tmp_path.glob("lora_*"))


def test_a_full_fine_tune_is_a_checkpoint_in_the_official_layout(pictures: Path, tmp_path: Path) -> None:
    """Only the UNet has changed; dtypes are those of the source."""
    source = save_model(tmp_path / "half.safetensors", dtype=torch.float16)
    assert main(command(source, pictures, tmp_path, "--full", "--steps", "2", "--learning-rate", "0.01")) == 0
    before = load_file(source)
    after = load_file(tmp_path / "finetuned.safetensors")
    config = CONFIGS["refiner"]
    assert open_checkpoint(tmp_path / "finetuned.safetensors").config == config
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith(prefixes(config)["unet"])}


def test_a_full_result_that_its_dtype_cannot_hold_is_not_written(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "half.safetensors", dtype=torch.float16)
    options = ["--full", "--steps", "1", "--learning-rate", "1e6", "--weight-decay", "0"]
    assert main(command(source, pictures, tmp_path / "out", *options)) == 2
    assert "does not fit into torch.float16, the source's" in capsys.readouterr().err
    assert (tmp_path / "out" / STATE).exists()  # what was learned is not lost
    assert not (tmp_path / "out" / "finetuned.safetensors").exists()


def test_the_result_never_replaces_the_checkpoint(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_model(tmp_path / "finetuned.safetensors")
    before = path.read_bytes()
    assert main(command(path, pictures, tmp_path, "--full", "--steps", "1")) == 2
    assert "finetuned.safetensors: it is read: choose another place" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize("how", sample(["lora", "full"], "lora"))
def test_equal_runs_leave_equal_bytes(how: str, refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """In processes of their own: safetensors writes metadata in an order that is each process's own."""
    options = ["--steps", "2", *(["--full"] if how == "full" else ["--rank", "2"])]
    outs = [tmp_path / "0", tmp_path / "1"]
    processes = [start(command(refiner_file, pictures, out, *options), out.with_suffix(".txt")) for out in outs]
    for process, out in zip(processes, outs, strict=True):
        process.join(timeout=300)
        assert process.exitcode == 0, out.with_suffix(".txt").read_text()
    first, second = ({path.name: path.read_bytes() for path in out.glob("*.safetensors")} for out in outs)
    assert set(results.ADAPTERS.values() if how == "lora" else [results.CHECKPOINT]) <= set(first)
    assert first == second
