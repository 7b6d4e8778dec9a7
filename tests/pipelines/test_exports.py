"""What `sdxl_ref` and `sdxl_ref.pipelines` export, each imported when it is first asked for."""

import subprocess
import sys
from types import ModuleType

import pytest

import sdxl_ref
from sdxl_ref import pipelines

PIPELINES = {"DiffusionPipeline", "EnsemblePipeline", "ImageToImagePipeline", "TextToImagePipeline"}
OTHERS = {
    "AutoencoderKL",
    "CLIPTextEncoder",
    "NoiseSchedule",
    "OpenCLIPTextEncoder",
    "SAMPLERS",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "load_image",
    "pack",
    "tokenize",
    "unpack",
}
both = pytest.mark.parametrize(
    ("module", "names"), [(sdxl_ref, PIPELINES | OTHERS), (pipelines, PIPELINES)], ids=["sdxl_ref", "pipelines"]
)


@both
def test_dir_lists_the_exports_and_each_is_there(module: ModuleType, names: set[str]) -> None:
    assert set(module.__all__) == names
    assert names <= set(dir(module))
    for name in names:
        found = getattr(module, name)
        assert getattr(found, "__name__", name) == name


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_both_export_the_same_pipelines(name: str) -> None:
    assert getattr(sdxl_ref, name) is getattr(pipelines, name)


@both
def test_another_name_is_an_attribute_error(module: ModuleType, names: set[str]) -> None:
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'banana'"):
        _ = module.banana


def test_importing_it_imports_no_torch() -> None:
    program = "import sys, sdxl_ref, sdxl_ref.pipelines; dir(sdxl_ref); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
