"""The recipe at toy length: every stage runs, goes on, and ends in two files that open; and its exact parts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ref.checkpoint import build, open_checkpoint
from sdxl_ref.config import InputError
from sdxl_ref.pocket import recipe
from sdxl_ref.pocket.examples import FACTS, Reader, example
from sdxl_ref.pocket.models import BASE, CONFIGS, start
from sdxl_ref.pocket.recipe import STAGES, Recipe, normalise
from sdxl_ref.pocket.scenes import COLOURS, PASTEL, SHAPES, Scene, Thing
from sdxl_ref.training.loop import Settings, locked

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=3, learning_rate=1e-3, warm_up=1)
    monkeypatch.setattr(recipe, "SETTINGS", dict.fromkeys(recipe.SETTINGS, settings))
    monkeypatch.setattr(
        recipe, "OBJECTIVES", {stage: dict.fromkeys(objectives, 2) for stage, objectives in recipe.OBJECTIVES.items()}
    )
    few = {stage: (side, 2, min(varied, 1), kl) for stage, (side, _, varied, kl) in recipe.AUTOENCODER.items()}
    monkeypatch.setattr(recipe, "AUTOENCODER", few)
    monkeypatch.setattr(recipe, "CAPTIONS", 2)


@pytest.mark.usefixtures("short")
def test_all_stages(tmp_path: Path) -> None:
    made = Recipe(tmp_path, CPU, scenes=50)
    for stage in STAGES:
        made.run(stage, stop=2 if stage == "base" else None)
        assert (tmp_path / "base.safetensors").exists() == (STAGES.index(stage) > STAGES.index("base"))
        made.run(stage)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if "pocket" not in path.name}
    for stage in STAGES:  # what is done is not done again
        made.run(stage)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert set(json.loads((tmp_path / "times.json").read_text())) == set(STAGES)
    for kind, config in CONFIGS.items():
        path = tmp_path / f"pocket_{kind}.safetensors"
        assert open_checkpoint(path).config == config
        assert path.stat().st_size <= 25e6
        assert {str(t.dtype) for t in load_file(path).values()} == {"torch.float16"}
    base, refiner = (load_file(tmp_path / f"{kind}.safetensors") for kind in CONFIGS)
    shared = [key for key in refiner if key.startswith("text_encoder_2.")]
    assert shared  # the towers are frozen: both files have those of their own stage
    assert all(torch.equal(base[key], refiner[key]) for key in shared)


def test_a_stage_without_the_one_before_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage 'towers' first"):
        Recipe(tmp_path, CPU, scenes=10).run("base")


@pytest.mark.usefixtures("short")
def test_a_stage_goes_on_only_with_what_it_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recipe.__init__, "__defaults__", (50,))

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["recipe", "--out", str(tmp_path), *words])
        recipe.main()

    command("--stage", "towers", "--stage", "vae")
    command("--stage", "vae-more", "--stop", "1")
    whole = (tmp_path / "vae.safetensors").read_bytes()
    other = {name: t + 1 for name, t in load_file(tmp_path / "vae.safetensors").items()}
    save_file(other, tmp_path / "vae.safetensors")
    for told in (r"another learned from: vae \(", r"could not read .*vae\.safetensors .*run the stage 'vae' again"):
        with pytest.raises(SystemExit, match="2"):
            command("--stage", "vae-more")
        error = capsys.readouterr().err
        assert re.search(told, error)
        assert "Traceback" not in error
        (tmp_path / "vae.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "vae.safetensors").write_bytes(whole)
    command("--stage", "vae-more")
    assert (tmp_path / "vae-more.safetensors").exists()
    with locked(tmp_path / "vae-more"), pytest.raises(SystemExit, match="2"):
        command("--stage", "vae-more")
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stage base", "run the stage 'towers' first, to its end"),
        ("--stage write", "base.safetensors is not there: run the stage 'base' first"),
        ("--stage towers --stop 0", "expected a step of at least 1 to stop at, found 0"),
        ("--device toaster", "expected a device such as cpu or cuda, found 'toaster'"),
        ("--out FILE", "could not make the folder"),
        ("--stage vae", "told.json (Expecting value"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    np.save(tmp_path / "pixels.npy", np.zeros((3, 128, 128, 3), np.uint8))
    (tmp_path / "told.json").touch()
    (tmp_path / "times.json").touch()  # is no reason to stop
    given = words.replace("FILE", str(tmp_path / "file")).split()
    monkeypatch.setattr("sys.argv", ["recipe", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("short")
def test_a_stopped_stage_ends_the_command_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, stops in (("whole", [None]), ("pieces", ["1", "2", None])):
        for stop in stops:
            words = ["--stage", "towers", "--out", str(tmp_path / folder), *(["--stop", stop] if stop else [])]
            monkeypatch.setattr("sys.argv", ["recipe", *words])
            recipe.main()
            assert (tmp_path / folder / "towers.safetensors").exists() == (stop is None)
    assert "towers: stopped at step 2, goes on when started again" in capsys.readouterr().out
    whole, pieces = (load_file(tmp_path / folder / "towers.safetensors") for folder in ("whole", "pieces"))
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


def test_pictures_are_not_drawn_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"40000 pictures need 2\.0 GB in .*, found 0\.0 GB free"):
        Recipe(tmp_path, CPU).pictures()
    assert not list(tmp_path.iterdir())


def test_normalising_is_exact_and_leaves_the_pictures_alone() -> None:
    torch.manual_seed(0)
    vae = build("vae", BASE).double()
    images = torch.rand(6, 3, 64, 64, dtype=torch.float64) * 2 - 1
    before = vae.decode(vae.encode(images).mode())
    deviation = vae.encode(images).logvar
    normalise(vae, images)  # type: ignore[arg-type]
    posterior = vae.encode(images)
    z = posterior.mean * BASE.vae.scale_factor
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-9
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-9
    assert (vae.decode(posterior.mean) - before).abs().max() < 1e-9
    shift = posterior.logvar - deviation  # the same for every pixel of a channel
    assert shift.std(dim=(0, 2, 3)).max() < 1e-9


def test_examples_are_deterministic_and_tell_what_happened() -> None:
    first, again = [example(i) for i in range(60)], [example(i) for i in range(60)]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a[0], b[0])
        assert a[1:] == b[1:]
    soft = [each for each in first if each[2] == 64]
    assert 0 < len(soft) < 20
    assert {(each[2], each[3]) for each in first} == {(64, 2.5), (128, 6.0)}
    edges = [np.abs(np.diff(each[0].astype(float), axis=0)).max() for each in soft]
    assert max(edges) < 255  # no hard edge is left
    pale = example(0, look=PASTEL)
    assert pale[1:] == first[0][1:]
    assert pale[0].mean() > first[0][0].mean()  # the same scene, painted otherwise


def test_a_unet_starts_as_nothing() -> None:
    unet = start(build("unet", replace(BASE)))  # type: ignore[arg-type]
    config = BASE.unet
    x = torch.randn(1, 4, 16, 16)
    y = torch.randn(1, config.adm_in_channels)
    assert not unet(x, torch.tensor([5]), torch.randn(1, 77, config.context_dim), y).any()


def test_what_the_towers_learn_is_of_the_picture_not_of_its_wording() -> None:
    """Two captions of one picture have the same answers; the words of one are told apart by their places."""
    one = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "white", "plain")
    same = Scene((Thing("blue", "square"), Thing("red", "circle")), "below", "white", "plain")
    other = Scene((Thing("red", "circle"), Thing("blue", "square")), "below", "white", "plain")
    assert Reader.facts(one) == Reader.facts(same) != Reader.facts(other)
    single = Reader.facts(Scene((Thing("red", "circle"),), None, "black", "striped"))
    logits = Reader(8)(torch.randn(2, 8))
    assert [each.shape[1] for each in logits] == list(FACTS.values())
    for facts in (Reader.facts(one), single):
        assert all(0 <= fact < n for fact, n in zip(facts, FACTS.values(), strict=True))
    assert single[3:5] == [len(COLOURS), len(SHAPES)]
