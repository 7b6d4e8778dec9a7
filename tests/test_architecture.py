"""The house: floors with imports that point downwards, no circles, short files and functions, and what a run loads."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_ref.weights.checkpoint import prefixes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdxl_ref"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOP = {"__init__", "__main__", "cli", "config", "noise"}
FLOORS = [  # from the top: a module imports from its own floor and from those below it
    ["cli"],
    ["commands"],
    ["parity"],
    ["running"],
    ["pocket"],
    ["training"],
    ["pipelines"],
    ["adapters"],
    ["weights"],
    ["text"],
    ["pictures"],
    ["diffusion"],
    ["networks"],
    ["config", "noise"],
]
HEIGHT = {package: -i for i, floor in enumerate(FLOORS) for package in floor}
PEERS = {"open_clip", "torchvision", "transformers", "diffusers", "weights_convert", "timm"}
COMPARING = {"parity.peers", "parity.live"}
OPTIONAL = {
    "ctypes",
    "huggingface_hub",
    "huggingface_hub.errors",
    "imwatermark",
    "matplotlib",
    "ray",
    "ray.data",
    "scipy",
    "scipy.stats",
    "webdataset.tariterators",
}  # heavy, or not everywhere
REGISTRIES = {  # the modules that import what was asked for, and what that can be
    "weights.opening": {  # kinds of checkpoint
        "weights.folder",
        "weights.names",
        "weights.separate_vae",
        "weights.unusual",
    },
    "weights.tensor_files": {"weights.other_files"},  # what a file is that does not open
    "weights.checkpoint": {  # a part that a refiner does not have; what files of other sizes state
        "networks.clip_l",
        "weights.stated_config",
    },
    "adapters.reading": {"adapters.kinds", "adapters.unsupported"},  # what is in a file beside the usual factors
    "commands.batch": {"commands.on_ray"},  # who does the jobs
    "commands.worker": {"running.tar_shards"},  # where a job's picture lies
    "running.job_list": {"running.tar_shards"},  # kinds of lists
    "commands.common": {  # what options ask for, and what lies at a target
        "commands.adapter_options",
        "commands.devices",
        "commands.experts",
        "commands.kept",
        "commands.speed",
        "diffusion.own_levels",
        "pictures.formats",
        "pictures.watermark",
        "pipelines.masking",
        "weights.file_saving",
    },
    "commands.room": {"pipelines.memory_plan"},  # where memory is not plenty
    "commands.speed": {"pipelines.compiled"},  # of `--compile`
    "commands.train": {"training.sharded"},  # of `--sharded`: FSDP takes a second to import
    "cli": {"commands.memory", "commands.misspelt"},  # an error that may be the memory's; a word that is not known
    "pipelines.calling": {"text.markup"},  # other tools'
    "pipelines.recording": {"pictures.watermark"},  # of a run that has one
    "pipelines.starts": {"pictures.arrays", "pipelines.first_noise", "pipelines.masking"},  # what it may start from
    "pipelines.request": {  # levels that are handed in; other tools' names; how a model's files say that it is run
        "diffusion.guidance_schedule",
        "diffusion.sampler_names",
        "pipelines.own_settings",
    },
    "diffusion.schedule": {"diffusion.spacing_names"},  # other tools' names
    "pictures.images": {"pictures.address", "pictures.colours"},  # kinds of pictures
}
LONGEST_FILE = 350  # lines
LONGEST_FUNCTION = 60
PYTHON_RUN = 1_900  # code lines of all that the README's Python example loads
COMMAND_RUN = 2_490  # and `sdxl-ref refine --plain`
PACKED_RUN = 3_085  # and without that option, on a CPU


def name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a module of this package or another one, by its absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            below = [f"{module}.{alias.name}" for alias in node.names]
            modules = [full for full in below if is_module(full)]
            yield from ((node, full) for full in modules or [module])


def is_module(full: str) -> bool:
    path = ROOT / Path(*full.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, without the package's name."""
    found = {full for _, full in imports(ast.parse(path.read_text())) if full.split(".")[0] == "sdxl_ref"}
    return {full.removeprefix("sdxl_ref").removeprefix(".") for full in found} - {""}


def test_the_top_level() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
    assert {name(path).split(".")[0] for path in MODULES} - {"", "__main__"} == set(HEIGHT)


@pytest.mark.parametrize("path", [path for path in MODULES if name(path) not in ("", "__main__")], ids=name)
def test_imports_point_downwards(path: Path) -> None:
    floor = HEIGHT[name(path).split(".")[0]]
    for module in own_imports(path):
        assert HEIGHT[module.split(".")[0]] <= floor, f"{name(path)} imports {module}, which stands above it"


def test_no_circles() -> None:
    """Also not by imports inside functions."""
    needs = {name(path): own_imports(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' → '.join((*trail[trail.index(module) :], module))}"
        if module in done:
            return
        for other in sorted(needs.get(module, ())):
            visit(other, (*trail, module))
        done.add(module)

    for module in sorted(needs):
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_inside_functions_are_of_registries_or_optional(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for _, full in imports(function):
                allowed = {f"sdxl_ref.{module}" for module in REGISTRIES.get(name(path), ())} | OPTIONAL
                allowed |= PEERS if name(path) in COMPARING else set()
                stem = full if full in allowed else full.split(".")[0]
                assert stem in allowed, f"{name(path)}.{function.name} imports {full}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_peer_is_imported(path: Path) -> None:
    """But where a live one is built to compare with."""
    if name(path) in COMPARING:
        return
    assert not {full.split(".")[0] for _, full in imports(ast.parse(path.read_text()))} & PEERS


@pytest.mark.parametrize(
    "path", [*MODULES, *sorted((ROOT / "weights_convert").rglob("*.py"))], ids=lambda path: path.stem
)
def test_lengths(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name}: {LONGEST_FUNCTION} lines or more"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_are_counted_right(tmp_path: Path) -> None:
    text = '"""A\ndocstring."""\n\nx = 1  # one\n# a comment\ny = """\ntext"""\n\n\n'
    text += 'def f():\n    """Doc."""\n    return x\n'
    (tmp_path / "module.py").write_text(text)
    assert code_lines(tmp_path / "module.py") == 5  # x, two of y, def, return


OFFICIAL = """
from sdxl_ref.weights import checkpoint
from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

checkpoint.REFINER_1_0 = {config}  # a small file stands in for the official one, whose sizes it takes over
"""
PYTHON = """
import torch
from sdxl_ref import ImageToImagePipeline, load_image

pipe = ImageToImagePipeline.from_single_file({file!r}, dtype=torch.bfloat16)
image = load_image({photo!r}).resize((64, 64))
refined = pipe("a cup of coffee, morning light", image=image, strength=0.3, num_inference_steps=4)
refined.images[0].save({out!r})
"""
COMMAND = """
from sdxl_ref.cli import main
assert main(["refine", {photo!r}, "--prompt", "a cup", "--steps", "4", "--checkpoint", {file!r}, "--out", {out!r},
             *{options!r}]) == 0
"""
LOADED = """
import sys
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "sdxl_ref":
        print("LOADED", name, module.__file__)
print("PEERS", sorted({"open_clip", "torchvision", "transformers", "diffusers", "timm"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("code", "options", "most"),
    [(PYTHON, [], PYTHON_RUN), (COMMAND, ["--plain"], COMMAND_RUN), (COMMAND, ["--device", "cpu"], PACKED_RUN)],
    ids=["python", "command", "packed"],
)
def test_the_code_lines_of_a_refiner_run(code: str, options: list[str], most: int, tmp_path: Path) -> None:
    """A measure of how much there is to read for one run, with an official file and Euler. No peer is imported."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    file = tmp_path / "refiner.safetensors"  # which states no sizes, as the official one
    parts = peers.networks(peers.SMALL_REFINER)
    state: dict[str, torch.Tensor] = {}
    for part, prefix in prefixes(peers.SMALL_REFINER).items():
        state |= {prefix + key: tensor for key, tensor in parts[part].state_dict().items()}
    save_file(state, file)
    paths = {"file": str(file), "photo": str(photo), "out": str(tmp_path / "out.png")}
    code = OFFICIAL.format(config=peers.SMALL_REFINER) + code.format(**paths, options=options)
    result = subprocess.run([sys.executable, "-c", code + LOADED], capture_output=True, text=True, check=True)
    files = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("LOADED")]
    counts = {module: code_lines(Path(file)) for module, file in files}
    for module, count in counts.items():
        print(f"{count:5} {module}")
    print(f"{sum(counts.values()):5} code lines in all, at most {most}")
    assert {"sdxl_ref.networks.unet", "sdxl_ref.text.tokenizer", "sdxl_ref.pipelines.image_to_image"} <= set(counts)
    assert sum(counts.values()) <= most
    assert "PEERS []" in result.stdout


def test_the_project_speaks_of_itself_alone() -> None:
    """No absolute path of a machine in what is published."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / file for file in tracked if file.endswith((".py", ".md", ".toml", ".ipynb", ".yml", "Makefile"))]
    for path in (path for path in texts if path.exists()):
        for place in (f"{ROOT}/", f"{Path.home()}/", "/home" + "/", "/root" + "/"):  # the checkout, wherever it stands
            assert place not in path.read_text(), f"{path.name} names {place}"
