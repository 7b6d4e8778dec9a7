"""README is true: its Python and its commands run, with small models under the official files' names."""

import re
import shlex
from pathlib import Path

import pytest
import stand_ins
from PIL import Image

import sdxl_ref.cli
import weights_convert.cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = {"sdxl-ref": sdxl_ref.cli.main, "weights-convert": weights_convert.cli.main}
FEW = {"train": ["--steps", "2"]}  # else minutes
FEW_STEPS = ["--steps", "4"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```(?:{language})\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small photo at its place, and small models under the official names."""
    photo = tmp_path / "sdxl_ref" / "data" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    with Image.open(ROOT / "sdxl_ref" / "data" / "photo.jpg") as picture:
        picture.resize((72, 64)).save(photo)  # else minutes
    stand_ins.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (folder / "refined.png").exists()
    [promised] = re.findall(r"print\(pipe\.plan\(request\)\)\s+# (.*)", README)
    assert capsys.readouterr().out.strip() == promised


@pytest.mark.sweep  # and `make test-readme` pastes them into a shell
def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, one after the other, on the small models."""
    lines = [line for block in blocks("sh|shell") for line in block.splitlines()]
    runnable = [line for line in lines if line.startswith(tuple(COMMANDS))]
    assert len(runnable) >= 15
    for line in runnable:
        program, command, *options = shlex.split(line, comments=True)
        if command == "fetch":  # tests/pipelines has a hub
            continue
        smaller = FEW_STEPS if "pocket" in line and command == "generate" else FEW.get(command, [])
        assert COMMANDS[program]([command, *options, *smaller]) == 0, line
    [promised] = re.findall(r"^plan: base .*", README, re.MULTILINE)
    assert promised in capsys.readouterr().out


def test_the_training_line_is_the_stand_ins() -> None:
    [line] = blocks("json")
    assert stand_ins.json.loads(line) == stand_ins.LINE


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", texts, re.MULTILINE))
    assert {"demo", "test"} < named <= targets


def test_every_module_is_in_the_reading_order() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", README, re.MULTILINE)
    listed = {Path(name).name for row in rows for name in re.findall(r"`(.*?)`", row)}
    for path in (ROOT / "sdxl_ref").rglob("*.py"):
        folder = path.parent.name
        if path.name not in ("__init__.py", "__main__.py") and folder not in ("commands", "solvers", "forms", "kinds"):
            assert path.name in listed, f"{path.name} is missing from the reading order"
