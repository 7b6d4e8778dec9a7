"""`sdxl-ref train`: from a folder of pictures to an adapter or a checkpoint; several processes; what stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed

from sdxl_ref import lora
from sdxl_ref.checkpoint import build, open_checkpoint, prefixes
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import ImageToImagePipeline
from sdxl_ref.saving import save_checkpoint
from sdxl_ref.training.loop import STATE, locked

CONFIGS = {
    kind: replace(config, resolution=128)
    for kind, config in (("refiner", peers.SMALL_REFINER), ("base", peers.SMALL_BASE))
}
CAPTIONS = ("a red cup", "a blue cup", "two cups", "no cup")


def model(path: Path, kind: str = "refiner") -> Path:
    config = CONFIGS[kind]
    parts = {part: peers.randomise(build(part, config), 0) for part in prefixes(config)}
    save_checkpoint(path, config, parts, torch.float32)
    return path


def pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = ((128, 128),) * 4) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, (size, caption) in enumerate(zip(sizes, CAPTIONS, strict=True)):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": caption, "aesthetic_score": 5.0 + i})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "refiner.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


def command(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = {"checkpoint": checkpoint, "data": data, "out": out, "device": "cpu", "warm-up": 0}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["train", *words, *more]


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / STATE)


@pytest.mark.parametrize("kind", CONFIGS)
def test_from_a_folder_of_pictures_to_an_adapter_in_use(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text encoders learn too; both files say the same, and change what the pipeline paints."""
    path, out = model(tmp_path / "model.safetensors", kind), tmp_path / "out"
    more = [
        "--steps",
        "4",
        "--learning-rate",
        "0.01",
        "--rank",
        "2",
        "--alpha",
        "1",
        "--convolutions",
        "--text-encoders",
    ]
    assert main(command(path, data, out, *more)) == 0
    printed = capsys.readouterr().out
    assert "4 pictures by size (height x width): 128x128: 4" in printed
    assert "training a LoRA of rank 2 on " in printed
    assert f"plan: 4 steps of 1 pictures, t in 0..{199 if kind == 'refiner' else 999}" in printed
    config = CONFIGS[kind]
    fitted = [lora.fit(lora.read(out / f"lora_{form}.safetensors"), config) for form in ("kohya", "peft")]
    assert not any(adapter.missing or adapter.misshapen for adapter in fitted)
    parts = {"unet", "text_encoder_2", *["text_encoder"] * (kind == "base")}
    for adapter in fitted:
        assert {place.part for place in adapter.layers} == parts
    kohya, peft = (adapter.layers for adapter in fitted)
    assert kohya.keys() == peft.keys()
    assert all(torch.allclose(kohya[place].delta(), peft[place].delta(), rtol=1e-4, atol=1e-7) for place in kohya)
    assert all(float(factors.delta().abs().max()) > 0 for factors in kohya.values())


def test_the_adapter_on_a_pipeline_brings_the_loss_down(refiner: Path, data: Path, tmp_path: Path) -> None:
    """One picture, one noise: trained for a while, the refiner denoises the training pictures better than before."""
    more = ["--steps", "60", "--learning-rate", "0.003", "--rank", "8", "--layers", ".", "--drop-captions", "0"]
    assert main(command(refiner, data, tmp_path, *more, "--batch-size", "4")) == 0
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    losses = [float(row[1]) for row in rows]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    pipe = ImageToImagePipeline.from_single_file(refiner)
    [told] = lora.put_on([pipe], [str(tmp_path / "lora_peft.safetensors")])
    assert "layers matched" in told


@pytest.mark.parametrize(
    "more", [["--rank", "2"], ["--full", "--ema", "0.5", "--accumulate", "2"]], ids=["lora", "full"]
)
def test_stopped_and_gone_on_equals_undisturbed_bit_for_bit(
    more: list[str], refiner: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*more, "--steps", "4", "--save-every", "1"]
    assert main(command(refiner, data, tmp_path / "whole", *words)) == 0
    from sdxl_ref.training import finetune

    calls, run = [0], finetune.FineTuning.__call__

    def stopping(self: finetune.FineTuning, step: int, generator: torch.Generator) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C
        return run(self, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.FineTuning, "__call__", stopping)
        assert main(command(refiner, data, tmp_path / "parts", *words)) == 1
    assert not list((tmp_path / "parts").glob("lora*")) + list((tmp_path / "parts").glob("finetuned*"))
    assert main(command(refiner, data, tmp_path / "parts", *words)) == 0
    whole, parts = (state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        one, other = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_fine_tune_is_a_checkpoint_in_the_official_layout(refiner: Path, data: Path, tmp_path: Path) -> None:
    """Only the UNet has changed; dtypes are those of the source."""
    config = CONFIGS["refiner"]
    source = tmp_path / "half.safetensors"
    save_checkpoint(source, config, {p: open_checkpoint(refiner).load(p) for p in prefixes(config)}, torch.float16)
    assert main(command(source, data, tmp_path, "--full", "--steps", "2", "--learning-rate", "0.01")) == 0
    before, after = load_file(source), load_file(tmp_path / "finetuned.safetensors")
    assert open_checkpoint(tmp_path / "finetuned.safetensors").config == config
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    prefix = prefixes(config)["unet"]
    assert changed == {key for key in before if key.startswith(prefix)}


def launch(words: list[str], processes: int) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*torchrun, "-m", "sdxl_ref", *words], env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("more", [["--full"], ["--rank", "2", "--text-encoders"]], ids=["full", "lora"])
def test_two_processes_make_the_step_of_one(more: list[str], refiner: Path, data: Path, tmp_path: Path) -> None:
    """After one step AdamW's first moment is a tenth of the gradient (clipped: the same factor for all).

    In float64: in float32 a batch of 2 is rounded otherwise than two of 1, by 2e-6 on these random weights.
    """
    words = [*more, "--steps", "1", "--accumulate", "2", "--dtype", "float64"]
    assert main(command(refiner, data, tmp_path / "one", *words, "--batch-size", "2")) == 0
    together = launch(command(refiner, data, tmp_path / "two", *words, "--batch-size", "1"), 2)
    output, errors = together.communicate(timeout=300)
    assert together.returncode == 0, errors
    assert output.count("plan: 1 steps of 4 pictures") == 1  # only the first process tells
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    keys = [key for key in one if key.startswith("exp_avg.")]
    assert keys
    whole = [torch.cat([each[key].flatten() for key in keys]) for each in (one, two)]
    distance = peers.distance(whole[1], whole[0])
    print(f"distance of the gradients of two processes to one's: {distance:.1e}")
    assert distance <= 1e-6
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 2


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in listing.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_dead_process_stops_the_run_which_goes_on_when_started_again(
    refiner: Path, data: Path, tmp_path: Path
) -> None:
    words = command(refiner, data, tmp_path, "--rank", "2", "--steps", "40", "--save-every", "2")
    together = launch(words, 2)
    log = tmp_path / "log.csv"
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert together.poll() is None, together.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    last = max(children(together.pid))  # the second process
    os.kill(last, signal.SIGKILL)
    _, errors = together.communicate(timeout=120)
    assert together.returncode != 0
    told = [line for line in errors.splitlines() if line.startswith("sdxl-ref: ")]
    print(told)
    assert len(told) == 1
    assert "start it again with the same command" in told[0]
    with safe_open(tmp_path / STATE, framework="pt") as file:
        reached = int(file.metadata()["step"])
    assert 4 <= reached < 40
    assert main([*words, "--batch-size", "2"]) == 0  # one process with the batch of both
    assert (tmp_path / "lora_kohya.safetensors").exists()
    with safe_open(tmp_path / STATE, framework="pt") as file:
        assert file.metadata()["step"] == "40"


def test_a_kill_while_it_saves_leaves_the_old_state_whole(refiner: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments of a run that saves after each step: there is always a state, it is whole, and the run
    that goes on from it ends as an undisturbed one."""
    words = command(refiner, data, tmp_path / "killed", "--rank", "64", "--layers", ".", "--steps", "30")
    words += ["--save-every", "1"]
    rng, found = np.random.default_rng(0), set()
    for _ in range(6):
        alone = subprocess.Popen([sys.executable, "-m", "sdxl_ref", *words], stderr=subprocess.DEVNULL)
        path = tmp_path / "killed" / STATE
        before = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.monotonic() + 120
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert alone.poll() is None or path.exists()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.3)))
        alone.kill()
        alone.wait()
        with safe_open(path, framework="pt") as file:
            found.add(int(file.metadata()["step"]))
            assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
    assert len(found) > 1
    assert main(words) == 0
    whole = [str(tmp_path / "whole") if word == str(tmp_path / "killed") else word for word in words]
    assert main(whole) == 0
    one, other = (state(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert sorted((tmp_path / "killed").rglob("*")) == [  # nothing half written is left
        tmp_path / "killed" / path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole").rglob("*"))
    ]


BAD = {
    "an empty folder": ({}, lambda folder: (folder / "metadata.jsonl").write_text(""), "is empty"),
    "a line without text": (
        {},
        lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}'),
        "line 1: expected text",
    ),
    "a damaged picture": ({}, lambda folder: (folder / "0.png").write_bytes(b"\x89PNG broken"), "--skip-bad"),
    "no such data": ({"data": "nowhere"}, None, "no such folder of pictures: nowhere"),
    "a rank of 0": ({"rank": "0"}, None, "rank of a LoRA must be at least 1, found 0"),
    "layers that match nothing": ({"layers": "attn9"}, None, "no layer has a name with 'attn9' in it"),
    "a rank for a full run": ({"full": None, "rank": "4"}, None, "--rank is a LoRA's"),
    "steps past the range": ({"timesteps": "0 1000"}, None, "must lie in 0 to 999"),
    "no steps": ({"steps": "0"}, None, "steps must be a number from 1 to 1e9, found 0"),
    "an endless rate": ({"learning-rate": "inf"}, None, "learning rate must be a number from 0 to 1e9, found inf"),
    "an alpha of 0": ({"alpha": "0"}, None, "alpha of a LoRA must be a finite number above 0, found 0"),
    "no pictures a batch": ({"batch-size": "0"}, None, "--batch-size must be at least 1, found 0"),
    "the pair without its half": ({"checkpoint": "pocket"}, None, "expected one of pocket-refiner, pocket-base"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, spoil, message = BAD[case]
    folder = pictures(tmp_path / "pictures")
    if spoil:
        spoil(folder)
    words = {"checkpoint": str(refiner), "data": str(folder), "out": str(tmp_path / "out"), "device": "cpu"} | options
    line = ["train"]
    for name, value in words.items():
        line += [f"--{name}", *(value.split(" ") if name == "timesteps" else [value] if value is not None else [])]
    assert main(line) == 2
    error = capsys.readouterr().err
    told = [each for each in error.splitlines() if each.startswith("sdxl-ref: error: ")]
    print(told[0])
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_run_is_not_gone_on_with_by_another(
    refiner: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(refiner, data, tmp_path / "out", "--steps", "1", "--rank", "2")
    assert main(words) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    cached = {path: path.read_bytes() for path in (tmp_path / "out" / "cache").iterdir()}
    for more in (["--rank", "3"], ["--learning-rate", "0.5"], ["--timesteps", "0", "99"], ["--batch-size", "2"]):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert "go on with the same, or use another folder" in capsys.readouterr().err
    other = pictures(tmp_path / "other", ((256, 128),) * 4)
    assert main([word if word != str(data) else str(other) for word in words]) == 2
    assert all(path.read_bytes() == content for path, content in cached.items())  # hours of work on a large set
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}


def test_what_is_in_the_folder_is_not_overwritten(
    refiner: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results whose state was deleted, and a folder in which another run is at work."""
    words = command(refiner, data, tmp_path, "--steps", "1", "--rank", "2")
    adapter = tmp_path / "lora_peft.safetensors"
    adapter.write_bytes(b"precious")
    assert main(words) == 2
    assert "lora_peft.safetensors, but no state of the run that wrote it: move it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [adapter.name]
    assert adapter.read_bytes() == b"precious"
    adapter.unlink()
    with locked(tmp_path):
        assert main(words) == 2
    assert "another run is at work in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_layers_that_match_nothing_are_refused_before_anything_is_made(
    refiner: Path, data: Path, tmp_path: Path
) -> None:
    assert main(command(refiner, data, tmp_path / "out", "--layers", "attn9")) == 2
    assert not (tmp_path / "out").exists()


def test_bad_input_is_told_once_by_two_processes(refiner: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"broken")
    together = launch(command(refiner, folder, tmp_path / "out"), 2)
    _, errors = together.communicate(timeout=300)
    assert together.returncode != 0
    [told] = [line for line in errors.splitlines() if line.startswith("sdxl-ref: ")]
    assert "0.png" in told
    assert "--skip-bad" in told


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), SystemExit),
        (distributed.DistNetworkError("reset"), SystemExit),
    ],
)
def test_only_a_lost_process_is_told_as_one(
    error: Exception, raised: type[BaseException], refiner: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from sdxl_ref.commands import train

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(train, "identity", fail)
    monkeypatch.setattr(train, "place_in_world", lambda: (0, 2))
    with pytest.raises(raised):
        main(command(refiner, data, tmp_path))


def test_half_of_torchruns_variables(
    refiner: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for count in ("2", ""):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert main(command(refiner, data, tmp_path)) == 2
        assert "expected torchrun's variables, found no RANK, LOCAL_RANK" in capsys.readouterr().err


def test_an_adapter_that_is_not_finite_is_not_written(
    refiner: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdxl_ref.training import finetune

    def spoiled(factors: Any, averaged: Any) -> Any:
        adapter = learned(factors, averaged)
        next(iter(adapter.layers.values())).up[0, 0] = torch.inf
        return adapter

    learned = finetune.learned
    monkeypatch.setattr(finetune, "learned", spoiled)
    assert main(command(refiner, data, tmp_path, "--steps", "1", "--rank", "2")) == 2
    assert "is not finite: use a lower learning rate" in capsys.readouterr().err
    assert not list(tmp_path.glob("lora_*"))


def test_the_result_never_replaces_the_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(tmp_path / "finetuned.safetensors")
    before = path.read_bytes()
    assert main(command(path, data, tmp_path, "--full", "--steps", "1")) == 2
    assert "the result would replace the checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not (tmp_path / STATE).exists()


def test_a_full_result_that_its_dtype_cannot_hold_is_not_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS["refiner"]
    parts = {part: peers.randomise(build(part, config), 0) for part in prefixes(config)}
    save_checkpoint(tmp_path / "half.safetensors", config, parts, torch.float16)
    rate = ["--learning-rate", "1e6", "--weight-decay", "0"]
    assert main(command(tmp_path / "half.safetensors", data, tmp_path / "out", "--full", "--steps", "1", *rate)) == 2
    assert "does not fit into torch.float16, the source's" in capsys.readouterr().err
    assert (tmp_path / "out" / STATE).exists()  # what was learned is not lost
    assert not (tmp_path / "out" / "finetuned.safetensors").exists()


def test_bfloat16_weights_are_warned_of(
    refiner: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(refiner, data, tmp_path, "--full", "--steps", "1", "--dtype", "bfloat16")) == 0
    assert "note: steps below 1/512 of a weight are lost in bfloat16" in capsys.readouterr().out


def test_an_adapter_is_not_put_on_the_other_of_the_pair(refiner: Path, data: Path, tmp_path: Path) -> None:
    """Layers of the same name and shape are in both: what the file says of itself decides."""
    base = model(tmp_path / "base.safetensors", "base")
    assert main(command(base, data, tmp_path / "out", "--steps", "1", "--rank", "2")) == 0
    adapter = tmp_path / "out" / "lora_kohya.safetensors"
    pipe = ImageToImagePipeline.from_single_file(refiner)
    with pytest.raises(InputError, match="was made for an SDXL base, by its metadata: expected one for a refiner"):
        lora.put_on([pipe], [str(adapter)])


def test_a_refiner_without_scores_is_told_a_constant(
    refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "pictures")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a cup"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert main(command(refiner, folder, tmp_path / "out", "--steps", "1")) == 0
    assert "4 of 4 pictures have no aesthetic_score: 6.0 is used for them" in capsys.readouterr().out
