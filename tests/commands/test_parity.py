"""`sdxl-ref parity`: a kit, a trace against it, two traces, a live peer; what is printed and written; bad input."""

import json
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import opened
from cases import sample
from safetensors import safe_open
from safetensors.torch import save_file
from short_kits import short_kits

from sdxl_ref import ImageToImagePipeline, parity
from sdxl_ref.cli import main
from sdxl_ref.config import InputError
from sdxl_ref.parity.kit import Kit
from sdxl_ref.parity.pipelines import compare_with_kit
from sdxl_ref.parity.report import Point, Report
from sdxl_ref.parity.report_page import page
from sdxl_ref.parity.sketch import Sketch
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.two_traces import compare_traces

READERS = Path(parity.__file__).parent / "readers"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def kit(tiny_refiner_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "kit"
    command = ["parity", "kit", "--checkpoint", str(tiny_refiner_file), "--out", str(folder), "--side", "64"]
    with short_kits():
        assert main(command) == 0
    return folder


@pytest.fixture(scope="module")
def traces(kit: Path, tiny_refiner_file: Path) -> dict[str, Path]:
    """Of ours, untouched and with a fault that is written into one module."""
    paths = {name: kit.parent / f"{name}.safetensors" for name in ("clean", "broken")}
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    parity.replay(pipe, kit, paths["clean"])
    pipe.unet.get_submodule("middle_block.1.norm").eps = 1e-2  # type: ignore[assignment]
    parity.replay(pipe, kit, paths["broken"])
    return paths


def test_a_kit_is_small_and_whole(kit: Path) -> None:
    assert {file.name for file in kit.iterdir()} == {"kit.safetensors", "budgets.tsv", "input.png"}
    assert sum(file.stat().st_size for file in kit.iterdir()) < 30e6
    trace = Trace.load(kit / "kit.safetensors")
    lines = [line.split("\t") for line in (kit / "budgets.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == [str(key) for key in trace.outputs()]
    assert all(0 < float(budget) < 1 for _, budget, _ in lines)
    assert set(trace.settings["budgets"]) == {"float32", "bfloat16", "float16"}


def test_a_trace_that_agrees(kit: Path, traces: dict[str, Path], capsys: Capture) -> None:
    assert main(["parity", "compare", str(traces["clean"]), "--kit", str(kit)]) == 0
    assert "agrees: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def differing(kit: Path, traces: dict[str, Path]) -> tuple[Path, str]:
    """The report of the broken trace, as report.json and report.html, and what was printed."""
    path = kit.parent / "report.html"
    command = ["parity", "compare", str(traces["broken"]), "--kit", str(kit), "--html", str(path)]
    with redirect_stdout(StringIO()) as out:
        assert main([*command, "--json", str(path.with_suffix(".json"))]) == 1
    return path, out.getvalue()


def test_a_trace_that_differs(differing: tuple[Path, str]) -> None:
    written, told = differing
    name = "unet/middle_block.1.norm"
    assert f"differs at {name}" in told
    report = json.loads(written.with_suffix(".json").read_text())
    assert report["verdict"] == "differs"
    assert report["first"] == name
    assert report["culprits"] == [name]
    point = next(point for point in report["points"] if point["name"] == name)
    assert {"relative_l2", "max_abs", "own", "inherited", "budget", "verdict"} <= set(point)
    assert point["verdict"] == "fault"
    assert point["own"] > point["budget"] > point["inherited"] / 8
    page = written.with_suffix(".html").read_text()
    assert name in page
    assert "http" not in re.sub('base64,[^"]+', "", page)  # one page, and nothing around it; pictures may spell it


@pytest.mark.parametrize("width", sample([1280, 390], 390))
def test_the_page_in_a_browser(width: int, differing: tuple[Path, str], tmp_path: Path) -> None:
    """A bar for each point, longer than the budget's line where one is at fault; pictures; nothing is cut off."""
    with opened(differing[0], width) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.locator("h1").inner_text().endswith(": differs")
        rows = shown.locator(".points tr").count() - 1
        assert rows == shown.locator(".points .bars").count() > 100
        for kind, is_beyond in (("fault", True), ("ok", False)):
            row = shown.locator(f"tr.{kind} .bars").first
            bar, line = (row.locator(tag).first.bounding_box() for tag in ("i", "b"))
            assert (bar["x"] + bar["width"] > line["x"]) is is_beyond
            assert bar["height"] > 3
        sizes = shown.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
        assert [natural for natural, _ in sizes] == [64, 64, 64]
        assert all(100 < shown <= width for _, shown in sizes)
        assert "times" in shown.locator("figcaption").last.inner_text()
        assert shown.locator("svg polyline").bounding_box()["width"] > 200
        assert shown.locator("code").first.inner_text() == "unet/middle_block.1.norm"
        assert shown.screenshot(path=tmp_path / "page.png", full_page=True)


def test_without_the_checkpoint_the_first_point_along_the_run_is_named(
    kit: Path, traces: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    moved = without_checkpoint(kit, tmp_path)
    assert main(["parity", "compare", str(traces["broken"]), "--kit", str(moved)]) == 1
    out = capsys.readouterr().out
    assert "own and inherited errors are not told apart" in out
    assert "differs at unet/middle_block.1.norm" in out


def without_checkpoint(kit: Path, folder: Path) -> Path:
    """The kit as it is on another machine."""
    moved = folder / "kit"
    shutil.copytree(kit, moved)
    trace = Trace.load(moved / "kit.safetensors")
    trace.settings["model"] = str(folder / "gone.safetensors")
    trace.save(moved / "kit.safetensors")
    return moved


def program(reader: str, folder: Path) -> list[str]:
    """How a reader is run; built first where it is compiled. Skips, in so many words, where that cannot be."""
    tool = {"reader.c": "cc", "reader.mjs": "node", "reader.rs": "rustc"}[reader]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not here: {reader} was not tried")
    if reader == "reader.mjs":
        return ["node", str(READERS / reader)]
    built = folder / f"{reader}.out"
    options = ["-O1", "-lm"] if tool == "cc" else ["--edition", "2021", "-O"]
    subprocess.run([tool, str(READERS / reader), "-o", str(built), *options], check=True, capture_output=True)
    return [str(built)]


@pytest.mark.parametrize("reader", ["reader.c", "reader.mjs", "reader.rs"])
def test_readers_in_other_languages_give_our_verdict(
    reader: str, kit: Path, traces: dict[str, Path], tmp_path: Path
) -> None:
    assert len((READERS / reader).read_text().splitlines()) < 100
    command = program(reader, tmp_path)
    moved = without_checkpoint(kit, tmp_path)
    for name, expected in (("clean", "agrees: "), ("broken", "differs at unet/middle_block.1.norm: ")):
        ours = main(["parity", "compare", str(traces[name]), "--kit", str(moved)])
        theirs = subprocess.run([*command, str(kit), str(traces[name])], capture_output=True, text=True)
        assert theirs.returncode == ours
        assert theirs.stdout.startswith(expected)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(traces["clean"].read_bytes()[:100])
    assert subprocess.run([*command, str(kit), str(cut)], capture_output=True).returncode == 2


def test_two_traces(traces: dict[str, Path], capsys: Capture) -> None:
    assert main(["parity", "compare", str(traces["clean"]), str(traces["clean"])]) == 0
    assert main(["parity", "compare", str(traces["clean"]), str(traces["broken"])]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs at ")]
    assert told == ["differs at unet/middle_block.1.norm"]  # and not what holds it


def test_arrays_with_other_names_and_layout(
    kit: Path, traces: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    trace = Trace.load(traces["clean"])
    for key in (Key("unet/middle_block.1"), Key("unet/out.0"), Key("unet")):
        tensor: Any = trace.tensor(key)
        np.save(tmp_path / f"mine_{key.point.replace('/', '_')}.npy", tensor.permute(0, 2, 3, 1).numpy())
    names = {"mine_unet": "unet", "mine_unet_out.0": "unet/out.0", "mine_unet_middle_block.1": "unet/middle_block.1"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    options = ["--map", str(tmp_path / "names.json"), "--layout", "nhwc", "--all"]
    assert main(["parity", "compare", str(tmp_path), "--kit", str(kit), *options]) == 0
    assert "unet/out.0" in capsys.readouterr().out


def test_a_run_of_a_command_is_recorded(tiny_refiner_file: Path, photo: Path, tmp_path: Path) -> None:
    run = ["refine", str(photo), "--prompt", "a cup", "--steps", "4", "--checkpoint", str(tiny_refiner_file)]
    command = ["parity", "record", "--trace", str(tmp_path / "t.safetensors"), "--points", "sampler/*", "--sketch"]
    assert main([*command, *run, "--out", str(tmp_path / "a.png")]) == 0
    assert main([*run, "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").exists()
    trace = Trace.load(tmp_path / "t.safetensors")
    assert trace.points() == ["sampler/0"]
    assert isinstance(trace.get(Key("sampler/0")), Sketch)


@pytest.mark.sweep
def test_a_live_peer_agrees(tiny_refiner_file: Path, capsys: Capture) -> None:
    assert (
        main(["parity", "run", "--checkpoint", str(tiny_refiner_file), "--against", "diffusers", "--side", "64"]) == 0
    )
    assert "agrees: " in capsys.readouterr().out


@pytest.mark.sweep
def test_a_function_of_ones_own(tiny_refiner_file: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.py").write_text(
        "import copy\n"
        "def network(part, ours):\n"
        "    other = copy.deepcopy(ours)\n"
        "    if part == 'vae':\n"
        "        other.encoder.mid.attn_1.norm.eps = 1e-3\n"
        "    if part == 'text_encoder_2':\n"
        "        raise ValueError('no such tower here')\n"
        "    return other\n"
    )
    command = ["parity", "run", "--checkpoint", str(tiny_refiner_file), "--against", f"{tmp_path / 'mine.py'}:network"]
    command += ["--side", "64"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "differs at vae/encoder.mid.attn_1.norm: as a norm with eps 0.001" in out
    assert "text_encoder_2: the peer stopped: ValueError: no such tower here" in out


NORM = "unet/middle_block.1.norm"


def judged(trace: Trace, kit: Path, tiny_refiner_file: Path) -> Report:
    return compare_with_kit(trace, Kit.open(kit), ImageToImagePipeline.from_pretrained(tiny_refiner_file), causes=False)


def test_one_narrow_tensor_loosens_no_budget(kit: Path, traces: dict[str, Path], tiny_refiner_file: Path) -> None:
    trace = Trace.load(traces["broken"])
    step = trace.tensor(Key("sampler/1"))
    assert step is not None
    trace.values[Key("sampler/1")] = step.bfloat16()
    assert NORM in judged(trace, kit, tiny_refiner_file).culprits


def test_numbers_kept_in_more_bits_than_they_need(kit: Path, tiny_refiner_file: Path) -> None:
    """A run in bfloat16 as numpy has it, in float32."""
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file, dtype=torch.bfloat16)
    trace = parity.replay(pipe, kit)
    wide: Any = {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in trace.values.items()
    }
    report = judged(Trace(wide, trace.same), kit, tiny_refiner_file)
    assert report.culprits == []
    assert "the budget is that of bfloat16" in report.notes


def test_of_values_that_are_not_finite_the_first_is_at_fault(
    kit: Path, traces: dict[str, Path], tiny_refiner_file: Path
) -> None:
    trace = Trace.load(traces["clean"])
    for key, value in trace.values.items():
        if key.is_output and key.point.startswith("unet/middle_block.1") and isinstance(value, torch.Tensor):
            trace.values[key] = value * torch.nan
    assert judged(trace, kit, tiny_refiner_file).culprits == [NORM]
    assert compare_traces(Trace.load(traces["clean"]), trace).culprits == [NORM]


def test_half_of_a_batch_is_no_agreement(kit: Path, traces: dict[str, Path], tiny_refiner_file: Path) -> None:
    trace = Trace.load(traces["clean"])
    half = trace.tensor(Key("unet"))
    assert half is not None
    report = judged(Trace({Key("unet"): half[:1]}), kit, tiny_refiner_file)
    assert report.culprits == ["unet"]
    assert "expected (2, 4, " in report.points[-1].note


def test_names_that_fit_nothing_are_told(kit: Path, traces: dict[str, Path], tiny_refiner_file: Path) -> None:
    trace = Trace.load(traces["clean"])
    tokens, output = trace.tensor(Key("text_encoder_2", 0, "in.0")), trace.tensor(Key("unet/out.0"))
    assert tokens is not None
    assert output is not None
    named = {Key("tokens/text_encoder_2"): torch.zeros_like(tokens), Key("unet/out.o"): output}
    report = judged(Trace(named), kit, tiny_refiner_file)  # type: ignore[arg-type]
    assert report.culprits == ["tokens/text_encoder_2"]  # as FORMAT.md names what the tower is handed
    assert "1 points are not in the kit: unet/out.o" in report.notes
    named = {Key("tokens/text_encoder_2"): tokens + 50_000}
    assert judged(Trace(named), kit, tiny_refiner_file).culprits == ["tokens/text_encoder_2"]  # type: ignore[arg-type]


PEERS = {
    "in place": ("ours.out[0].eps = 1e-2\n    return ours", "differs at unet/out.0: as a norm with eps 0.01"),
    "weights": ("ours.out[2].weight.mul_(2)\n    return ours", "the function wrote into our weights"),
    "an assertion": ("assert False, 'no UNet'", "unet: the peer stopped: AssertionError: no UNet"),
    "nothing to say": ("raise NotImplementedError", "unet: the peer stopped: NotImplementedError: "),
    "no tensor": ("return lambda *_: {}", "unet: the peer stopped: TypeError: expected a tensor"),
}


@pytest.mark.parametrize("name", sample(PEERS, "in place", "an assertion"))
def test_functions_that_misbehave(name: str, tiny_refiner_file: Path, tmp_path: Path, capsys: Capture) -> None:
    body, told = PEERS[name]
    (tmp_path / "mine.py").write_text(f"def network(part, ours):\n    {body}\n")
    command = ["parity", "run", "--checkpoint", str(tiny_refiner_file), "--against", f"{tmp_path / 'mine.py'}:network"]
    assert main([*command, "--side", "64", "--part", "unet"]) == 1
    assert told in capsys.readouterr().out


def test_a_run_that_fails_leaves_its_trace(tiny_refiner_file: Path, photo: Path, tmp_path: Path) -> None:
    pipe = ImageToImagePipeline.from_pretrained(tiny_refiner_file)

    def stop(*_: Any) -> None:
        raise KeyError("mine")

    arguments = {"image": photo, "num_inference_steps": 4, "callback_on_step_end": stop}
    with pytest.raises(KeyError), parity.record(pipe, points="unet", path=tmp_path / "t.safetensors"):
        pipe("a cup", **arguments)
    trace = Trace.load(tmp_path / "t.safetensors")
    assert trace.points() == ["unet"]
    assert trace.settings["stopped"] == "KeyError: 'mine'"
    with pytest.raises(InputError, match="in an existing folder"), parity.record(pipe, path=tmp_path / "no" / "t.st"):
        pytest.fail("the run began")
    with pytest.warns(UserWarning, match="no point of the run is unett"), parity.record(pipe, points="unett/**"):
        pass


def test_pages_of_odd_reports() -> None:
    report = Report([Point(f"sampler/<img src={i}>", relative_l2=0.1) for i in range(2)])
    report.pictures = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 1e-45)
    text = page(report, "a <b>")
    assert "<img src=0" not in text
    assert "a <b>" not in text
    assert "1,000,000,000 times" in text


def test_bad_input(kit: Path, traces: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    save_file({"nothing/known": torch.zeros(2)}, tmp_path / "strange.safetensors")
    save_file({"unet": torch.full((1,), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"a name#x": torch.zeros(2)}, tmp_path / "unnamed.safetensors")
    save_file({"unet": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "complex.safetensors")
    save_file({"unet": torch.zeros(2)}, tmp_path / "header.safetensors", {"sdxl_ref.parity": '{"version": 1}'})
    maps = {"list": [1], "foo": {"foo": "unet"}, "call": {"unet": "unet#2"}, "clash": {"unet": "unet/out.0"}}
    for name, value in maps.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "unet.npy").touch()
    (tmp_path / "twice" / "unet").mkdir(parents=True)
    for name in ("unet__out.0", "unet/out.0"):
        np.save(tmp_path / "twice" / f"{name}.npy", np.zeros(2))
    clean = ("compare", str(traces["clean"]), "--kit", str(kit))
    cases = {
        ("compare", str(tmp_path / "strange.safetensors"), "--kit", str(kit)): "no point of the kit",
        ("compare", str(tmp_path / "unnamed.safetensors"), "--kit", str(kit)): "expected a name such as",
        ("compare", str(tmp_path / "none.safetensors"), "--kit", str(kit)): "is no trace",
        ("compare", str(traces["clean"]), "--kit", str(tmp_path)): "is no kit",
        ("compare", str(traces["clean"])): "expected one trace with --kit DIR, or two traces",
        ("compare", str(tmp_path / "complex.safetensors"), "--kit", str(kit)): "unet is complex64: expected float16",
        ("compare", str(tmp_path / "header.safetensors"), "--kit", str(kit)): "metadata that FORMAT.md does not know",
        ("compare", str(tmp_path / "empty"), "--kit", str(kit)): "is no array that can be read",
        ("compare", str(tmp_path / "twice"), "--kit", str(kit)): "has two files for unet/out.0",
        (*clean, "--map", str(tmp_path / "list.json")): 'expected {"their name": "official name", …}',
        (*clean, "--map", str(tmp_path / "foo.json")): "the trace has no points foo, only such as",
        (*clean, "--map", str(tmp_path / "call.json")): "expected names of points, without #2 or :in.0",
        (*clean, "--map", str(tmp_path / "clash.json")): "two names of the trace would be unet/out.0",
        (*clean, "--html", str(tmp_path / "no" / "r.html")): "expected a file name in an existing, writable folder",
        ("kit", "--checkpoint", "pocket-refiner", "--out", str(tmp_path / "list.json")): "cannot make the folder",
        ("kit", "--checkpoint", "pocket", "--out", str(kit)): "holds a kit: name another folder",
        ("record", "--trace", str(tmp_path / "t.safetensors"), "info", "pocket"): "expected `refine …` or `generate …`",
        ("run", "--checkpoint", "pocket-refiner", "--against", "numpy"): "expected diffusers, or FILE.py:function",
        ("kit", "--checkpoint", "pocket-refiner", "--out", str(tmp_path), "--side", "70"): "must be a multiple of 64",
    }
    for words, message in cases.items():
        assert main(["parity", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_values_that_are_not_finite_are_a_fault(
    kit: Path, traces: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    with safe_open(traces["clean"], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("unet/out.0", "unet")}
    tensors["unet/out.0"] = tensors["unet/out.0"] * torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert main(["parity", "compare", str(tmp_path / "nan.safetensors"), "--kit", str(kit)]) == 1
    assert "differs at unet/out.0" in capsys.readouterr().out
