"""The house: imports point upwards only, files and functions stay short, a refiner run is under 2,000 lines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdxl_ref"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [  # from the top: a module may import from its own floor and from those above it
    ["config", "noise"],
    ["networks.layers"],
    ["networks.unet", "networks.clip_l", "networks.openclip_g", "networks.vae"],
    ["tokenizer"],
    ["images", "watermark"],
    ["diffusion.schedule"],
    ["diffusion.denoiser"],
    ["diffusion.samplers", "diffusion.higher_order"],
    ["pocket.models"],
    ["layouts"],
    ["identify"],
    ["checkpoint", "folder"],
    ["saving", "on_demand", "lora", "hub"],
    ["lora_forms"],
    ["conditioning"],
    ["pipelines.pipeline"],
    ["pipelines.image_to_image", "pipelines.text_to_image"],
    ["pipelines.ensemble"],
    ["ecosystem", "sheets"],
    ["training.loop", "training.diffusion"],
    ["training.data", "training.adapters"],
    ["training.finetune"],
    ["pocket.scenes", "pocket.distance"],
    ["pocket.judge"],
    ["pocket.examples"],
    ["pocket.recipe", "pocket.evaluate"],
    ["commands.common"],
    [f"commands.{name}" for name in ("demo", "refine", "generate", "train", "evaluate", "fetch", "info")],
    ["cli"],
]
FREE = {
    "",
    "networks",
    "diffusion",
    "pipelines",
    "training",
    "pocket",
    "commands",
    "__main__",
}  # package markers and entry points
PEERS = {"open_clip", "torchvision", "transformers", "diffusers", "weights_convert", "timm"}


def name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
    return found


def test_every_module_has_a_floor() -> None:
    assert {name(path) for path in MODULES} == {module for floor in FLOORS for module in floor} | FREE


@pytest.mark.parametrize("path", [p for p in MODULES if name(p) not in FREE], ids=name)
def test_imports_point_upwards(path: Path) -> None:
    floor = {module: i for i, modules in enumerate(FLOORS) for module in modules}
    for module in imported(path):
        if module.startswith("sdxl_ref."):
            target = module.removeprefix("sdxl_ref.")
            assert floor[target] <= floor[name(path)], f"{name(path)} imports {target}, which stands below it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_peer_is_imported(path: Path) -> None:
    assert not {module.split(".")[0] for module in imported(path)} & PEERS


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_lengths(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name}: over 60 lines"


REFINE = """
import sys
from sdxl_ref.cli import main
assert main(sys.argv[1:]) == 0
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "sdxl_ref":
        print("LOADED", name, module.__file__)
print("PEERS", sorted({"open_clip", "torchvision", "transformers", "diffusers", "timm"} & set(sys.modules)))
"""


def test_a_refiner_run_is_under_2000_lines_and_imports_no_peer(tmp_path: Path, small_refiner_file: Path) -> None:
    command = ["refine", str(PACKAGE / "data" / "photo.jpg"), "--prompt", "a cup", "--steps", "4"]
    command += ["--strength", "0.5", "--checkpoint", str(small_refiner_file), "--out", str(tmp_path / "out.png")]
    result = subprocess.run([sys.executable, "-c", REFINE, *command], capture_output=True, text=True, check=True)
    loaded = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("LOADED")]
    counts = {module: len(Path(file).read_text().splitlines()) for module, file in loaded}
    for module, count in counts.items():
        print(f"{count:5} {module}")
    print(f"{sum(counts.values()):5} lines in all")
    assert {"sdxl_ref.networks.unet", "sdxl_ref.tokenizer", "sdxl_ref.pipelines.image_to_image"} <= set(counts)
    assert sum(counts.values()) < 2000
    assert "PEERS []" in result.stdout


def test_the_project_speaks_of_itself_alone() -> None:
    """No absolute path of a machine in what is published."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / file for file in tracked if file.endswith((".py", ".md", ".toml", ".ipynb", "Makefile"))]
    for path in texts:
        for place in (f"{ROOT}/", f"{Path.home()}/", "/home" + "/", "/root" + "/"):  # the checkout, wherever it stands
            assert place not in path.read_text(), f"{path.name} names {place}"
