"""The README is true: its Python and its commands run, on small models under the official files' names."""

import re
import shlex
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from sdxl_ref.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, small_refiner_file: Path, small_base_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a photo, two checkpoints and some training pictures, under the README's names."""
    shutil.copy(small_refiner_file, tmp_path / "sd_xl_refiner_1.0.safetensors")
    shutil.copy(small_base_file, tmp_path / "sd_xl_base_1.0.safetensors")
    photo = Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")).resize((72, 64))
    photo.save(tmp_path / "photo.png")
    (tmp_path / "pictures").mkdir()
    photo.save(tmp_path / "pictures" / "cup.png")
    [line] = blocks("json")
    (tmp_path / "pictures" / "metadata.jsonl").write_text(line)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (place / "refined.png").exists()
    [promised] = re.findall(r"print\(pipe\.plan\(request\)\)\s+# (.*)", README)
    assert capsys.readouterr().out.strip() == promised


def test_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands as they stand; those that make new pictures at a small size."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sdxl-ref")]
    assert len(lines) >= 5
    for line in (line for line in lines if not line.startswith("sdxl-ref fetch")):  # tests/test_ecosystem.py has a hub
        small = {"generate": ["--height", "64", "--width", "64"], "train": ["--steps", "2"]}
        words = shlex.split(line, comments=True)[1:]
        assert main([*words, *small.get(words[0], [])]) == 0
    assert (place / "photo-refined.png").exists()
    assert (place / "generated.png").exists()
    [promised] = re.findall(r"^plan: base .*", README, re.MULTILINE)
    assert promised in capsys.readouterr().out


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= targets


def test_every_module_is_in_the_reading_order() -> None:
    named = {
        name for row in re.findall(r"^\| (`.*?`) \|", README, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    listed = {Path(name).name for name in named}
    for path in (ROOT / "sdxl_ref").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py") and "commands" not in path.parts:
            assert path.name in listed, f"{path.name} is missing from the reading order"
