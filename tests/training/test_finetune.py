"""Fine-tuning: the loss of a batch, what a run learns, stopped runs, and a step that two processes share."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_data import CONFIGS, LINES, TOWERS, networks, write_folder
from training_runs import command, launch_torchrun, metadata_of_state, output_of, start_two, state

from sdxl_ref.cli import main
from sdxl_ref.pipelines.adapting import adapters
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.training import finetune
from sdxl_ref.training.diffusion import Objective
from sdxl_ref.weights.checkpoint import build
from sdxl_ref.weights.opening import open_checkpoint

SAME_LOSS = 1e-6  # relative: captions encoded alone for the cache, together otherwise
SAME_GRADIENT = 1e-6  # relative, in float64, but for the loss, whose squares are float32
LEARNED = 0.8  # of the loss at first: 30 steps on four pictures bring it to about half


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_text_gives_the_loss_of_text_that_is_encoded_on_the_way(kind: str, tmp_path: Path) -> None:
    n = networks(kind)
    data = n.dataset(write_folder(tmp_path / "data", LINES), tmp_path / "cache")
    uncached = n.dataset(tmp_path / "data", tmp_path / "cache", cache_text=False)
    unet = peers.randomise(build("unet", n.config), 0)
    towers: dict[str, nn.Module] = {name: n.parts[name] for name in TOWERS[kind]}
    objective = Objective(drop=0.5)
    corruption = objective.draw((3, 4, 16, 16), torch.Generator().manual_seed(0))
    assert corruption.dropped.any()
    assert not corruption.dropped.all()
    noise = torch.randn(3, 4, 16, 16)
    cached_loss = finetune.FineTuningLoss({"unet": unet}, objective, data.dropped_text())
    loss = finetune.FineTuningLoss({"unet": unet, **towers}, objective)
    indices = [2, 0, 3]
    with torch.no_grad():
        ours = float(cached_loss(data.batch(indices), noise, corruption))
        other = float(loss(uncached.batch(indices), noise, corruption))
    assert ours == pytest.approx(other, rel=SAME_LOSS)


def test_the_adapter_on_a_pipeline_brings_the_loss_down(refiner_file: Path, pictures: Path, tmp_path: Path) -> None:
    """Trained for a while on four pictures, a refiner denoises them better than before."""
    options = ["--steps", "30", "--learning-rate", "0.01", "--rank", "8", "--layers", ".", "--drop-captions", "0"]
    assert main(command(refiner_file, pictures, tmp_path, *options, "--batch-size", "4")) == 0
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    losses = [float(row[1]) for row in rows]
    assert np.mean(losses[-10:]) < LEARNED * np.mean(losses[:10])
    pipe = ImageToImagePipeline.from_pretrained(refiner_file)
    [(_, adapter)] = adapters(pipe).load(tmp_path / "lora_peft.safetensors")
    assert "layers matched" in str(adapter)


@pytest.mark.parametrize(
    "options", [["--rank", "2"], ["--full", "--ema", "0.5", "--accumulate", "2"]], ids=["lora", "full"]
)
def test_stopped_and_gone_on_equals_undisturbed_bit_for_bit(
    options: list[str], refiner_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*options, "--steps", "4", "--save-every", "1"]
    assert main(command(refiner_file, pictures, tmp_path / "whole", *words)) == 0
    calls = 0
    step_loss = finetune.FineTuning.__call__

    def stopping(self: finetune.FineTuning, step: int, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C
        return step_loss(self, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.FineTuning, "__call__", stopping)
        assert main(command(refiner_file, pictures, tmp_path / "parts", *words)) == 1
    assert not list((tmp_path / "parts").glob("lora*")) + list((tmp_path / "parts").glob("finetuned*"))
    assert main(command(refiner_file, pictures, tmp_path / "parts", *words)) == 0
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 1  # the state and the results
    for name in names:
        whole = load_file(tmp_path / "whole" / name)
        parts = load_file(tmp_path / "parts" / name)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("launch", "options"),
    [
        pytest.param("processes", ["--full"], id="full"),
        pytest.param("processes", ["--rank", "2", "--text-encoders"], id="lora"),
        pytest.param("torchrun", ["--full"], id="full by torchrun", marks=pytest.mark.sweep),
        pytest.param("torchrun", ["--rank", "2", "--text-encoders"], id="lora by torchrun", marks=pytest.mark.sweep),
    ],
)
def test_two_processes_make_the_step_of_one(
    launch: str, options: list[str], refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """After one step AdamW's first moment is a tenth of the gradient (clipped: the same factor for all).

    In float64: in float32 a batch of 2 is rounded otherwise than two of 1, by 2e-6 on these random weights.
    """
    words = [*options, "--steps", "1", "--accumulate", "2", "--dtype", "float64"]
    assert main(command(refiner_file, pictures, tmp_path / "one", *words, "--batch-size", "2")) == 0
    shared = command(refiner_file, pictures, tmp_path / "two", *words, "--batch-size", "1")
    if launch == "torchrun":
        torchrun = launch_torchrun(shared)
        output, errors = torchrun.communicate(timeout=300)
        assert torchrun.returncode == 0, errors
    else:
        output, statuses = output_of(start_two(shared, tmp_path / "printed"), tmp_path / "printed")
        assert statuses == [0, 0], output
    assert output.count("plan: 1 steps of 4 pictures") == 1  # only the first process tells
    one = state(tmp_path / "one")
    two = state(tmp_path / "two")
    keys = [key for key in one if key.startswith("exp_avg.")]
    assert keys
    gradients = [torch.cat([moments[key].flatten() for key in keys]) for moments in (one, two)]
    distance = peers.distance(gradients[1], gradients[0])
    print(f"distance of the gradients of two processes to one's: {distance:.1e}")
    assert distance <= SAME_GRADIENT
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 2


def test_a_refiner_of_v_is_trained_and_its_checkpoint_says_so(
    refiner_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """`--prediction v` is part of the run's identity, and in the configuration of its result."""
    words = command(refiner_file, pictures, tmp_path / "v", "--full", "--steps", "1", "--learning-rate", "0.001")
    assert main([*words, "--prediction", "v"]) == 0
    assert main(words) == 2  # of another network
    result = tmp_path / "v" / "finetuned.safetensors"
    assert open_checkpoint(result).config == replace(CONFIGS["refiner"], prediction="v")
    assert main(command(result, pictures, tmp_path / "more", "--steps", "1", "--rank", "2")) == 0
    for folder in ("v", "more"):  # what the file says needs no option
        assert json.loads(metadata_of_state(tmp_path / folder)["identity"])["objective"]["prediction"] == "v"
