"""The notebooks run within a time limit, their solutions too, and what they show says nothing of the machine.

What is kept must be what they say today: the same text, and the same numbers but for what machines differ in. So a
notebook that is older than the weights fails. `python tests/test_notebooks.py` (make notebooks) runs them and their
solutions, checks them and keeps the fresh outputs.
"""

import ast
import copy
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 300  # seconds for one cell
LARGEST = 2_000_000  # bytes of one file
WEIGHTS = 'BASE, REFINER = "pocket", "pocket"'
INLINE = "module://matplotlib_inline.backend_inline"
PLAIN = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")
NEXT_TO_NOTHING = 1e-5  # rounding error, which every machine has another of
SOLUTION = re.compile(r"<details>\n<summary>Solution</summary>\n\n```python\n(.*?)```\n\n</details>", re.DOTALL)
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(path: Path, more: Sequence[str] = ()) -> Any:
    """Execute a notebook from top to bottom in a fresh kernel, then `more` in the same one; returns it with outputs."""
    import matplotlib.font_manager  # noqa: F401  (the first import on a machine writes a cache, and says so)

    book = read(path)
    book.cells += [nbformat.v4.new_code_cell(source) for source in more]
    here = {"metadata": {"path": str(path.parent)}}
    quiet = ["--log-level=ERROR"]  # else each kernel says on the terminal that it listens on a local port
    options = {
        "timeout": LIMIT,
        "startup_timeout": LIMIT,
        "record_timing": False,
        "extra_arguments": quiet,
        "coalesce_streams": True,
    }
    client = NotebookClient(book, kernel_name="python3", resources=here, **options)
    client.execute(env={**os.environ, "MPLBACKEND": INLINE})
    for cell in code_cells(book):
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)  # PIL offers each picture twice
    book.metadata = copy.deepcopy(PLAIN) | {"language_info": {"name": "python"}}
    return book


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def prose(book: Any) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def solutions(book: Any) -> list[str]:
    return SOLUTION.findall(prose(book))


def said(cell: Any) -> str:
    """All text that a cell shows."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream"]
    for output in cell.outputs:
        texts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(texts)


def check_outputs(book: Any) -> None:
    """No errors, nothing on standard error, no warning, no path of the machine."""
    places = {str(ROOT), str(Path.home()), tempfile.gettempdir(), sys.prefix, sys.base_prefix, "/home" + "/"}
    for cell in code_cells(book):
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert not kinds & {"stderr", "error"}, f"{cell.id} has an output of {kinds}"
        assert "warning" not in said(cell).lower(), cell.id
        for place in places - {"/"}:
            assert place not in said(cell), f"{cell.id} names {place}"


def shape(book: Any) -> list[tuple[str, list[list[str]]]]:
    """What kinds of output each code cell has."""
    cells = []
    for cell in code_cells(book):
        kinds = [sorted(output.get("data", {"text": ""})) for output in cell.outputs]
        cells.append((cell.id, kinds))
    return cells


def split(text: str) -> tuple[str, list[str]]:
    """A text without its numbers and the spaces that align them, and the numbers."""
    return " ".join(NUMBER.sub("#", text).split()), NUMBER.findall(text)


def near(one: str, other: str) -> bool:
    """Two printed numbers within 2 %, or one unit of the last digit, or both next to nothing."""
    a, b = float(one), float(other)
    unit = min(10.0 ** -last_place(one), 10.0 ** -last_place(other))
    return abs(a - b) <= max(0.02 * max(abs(a), abs(b)), 1.001 * unit, NEXT_TO_NOTHING)


def last_place(number: str) -> int:
    """How many places after the point the last printed digit stands: 1 of "0.3", 4 of "1.2e-3"."""
    digits, _, exponent = number.partition("e")
    return len(digits.partition(".")[2]) - int(exponent or 0)


def differences(kept: Any, fresh: Any) -> list[str]:
    """Where the text that two runs of a notebook show differs by more than machines do."""
    lines = []
    for old, new in zip(code_cells(kept), code_cells(fresh), strict=False):
        text, numbers = split(said(old))
        new_text, new_numbers = split(said(new))
        if text != new_text:
            lines.append(f"{old.id}: {text!r} is now {new_text!r}")
            continue
        for number, new_number in zip(numbers, new_numbers, strict=True):
            if not near(number, new_number):
                lines.append(f"{old.id}: {number} is now {new_number}")
    return lines


def test_all_four_are_there() -> None:
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert numbers == ["01_", "02_", "03_", "04_"]


@pytest.mark.sweep
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_so_do_its_solutions(path: Path) -> None:
    kept = read(path)
    answers = solutions(kept)
    fresh = run(path, answers)
    check_outputs(fresh)
    assert shape(fresh)[: len(shape(kept))] == shape(kept), "the outputs are of another version: make notebooks"
    assert not differences(kept, fresh), "what is kept is not what it says today: make notebooks"


def test_what_machines_differ_in_passes_and_nothing_more() -> None:
    same = [
        ("0.0151", "0.0150"),
        ("23", "24"),
        ("6e-07", "1e-06"),
        ("0e+00", "8e-08"),
        ("-0.00", "0.01"),
        ("101", "103"),
    ]
    other = [
        ("0.44", "0.46"),
        ("23", "25"),
        ("6e-02", "0e+00"),
        ("2.75", "2.47"),
        ("+0.19", "-0.19"),
        ("5e-05", "9e-05"),
    ]
    assert all(near(a, b) and near(b, a) for a, b in same)
    assert not any(near(a, b) or near(b, a) for a, b in other)
    assert split("t =  0:  0.52, 95.8% (dpmpp_2m)") == ("t = #: #, #% (dpmpp_2m)", ["0", "0.52", "95.8"])


@every
def test_what_is_kept_was_run_in_order_and_reads_well(path: Path) -> None:
    book = read(path)
    check_outputs(book)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    figures = [kinds for _, outputs in shape(book) for kinds in outputs if "image/png" in kinds]
    assert len(figures) >= 5
    assert path.stat().st_size < LARGEST
    assert set(book.metadata) == {"kernelspec", "language_info"}


@every
def test_its_form(path: Path) -> None:
    """A question, predictions, one line that names the weights, assertions, exercises with folded solutions."""
    book = read(path)
    sources = [cell.source for cell in code_cells(book)]
    assert "**The question.**" in book.cells[0].source
    assert prose(book).count("> **Predict first.**") >= 4
    assert sum(source.startswith(WEIGHTS) for source in sources) == 1
    assert prose(book).count("<details>") == len(solutions(book)) >= 3
    assert sum(source.count("assert ") for source in sources) >= 20


@every
def test_it_defines_no_network_of_its_own(path: Path) -> None:
    book = read(path)
    sources = [cell.source for cell in code_cells(book)]
    for source in [*sources, *solutions(book)]:
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.Attribute | ast.Name):
                assert ast.unparse(node) not in ("nn", "torch.nn")


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        book = read(notebook)
        size = len(book.cells)
        book = run(notebook, solutions(book))
        check_outputs(book)
        book.cells = book.cells[:size]  # the solutions have run; they stay folded
        nbformat.write(book, notebook)
        print(f"ran {notebook.name}, {notebook.stat().st_size / 1e6:.2f} MB")
