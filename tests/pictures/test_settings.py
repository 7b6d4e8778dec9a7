"""The settings that a PNG carries: as JSON, and in the form that common viewers read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import readers
from PIL import Image, PngImagePlugin
from readers import PROMPTS, SETTINGS

from sdxl_ref import SAMPLERS
from sdxl_ref.diffusion.schedule import SPACINGS
from sdxl_ref.pictures.settings import parameters, png_chunks, texts


def png(settings: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(stream, "PNG", pnginfo=png_chunks(texts(settings)))
    return stream.getvalue()


def chunks(settings: Mapping[str, Any]) -> dict[str, str]:
    with Image.open(io.BytesIO(png(settings))) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def test_settings_come_back_as_they_were() -> None:
    found = chunks(SETTINGS)
    assert json.loads(found["sdxl_ref"]) == SETTINGS
    assert found["parameters"] == (
        "a café, 北京 🙂\nsecond line\nNegative prompt: blurry\nSteps: 50, Sampler: DPM++ 2M, Schedule type: Karras, "
        "CFG scale: 5.0, Seed: 0, Size: 40x24, Model hash: 0123456789, Model: sd_xl_base_1.0, Denoising strength: 0.3, "
        'Lora hashes: "style: 0123456789ab, light: fedcba987654", Refiner: sd_xl_refiner_1.0 [fedcba9876], '
        "Refiner switch at: 0.8, Version: sdxl-ref 0.1.0"
    )


def test_the_parameters_leave_out_what_there_is_not() -> None:
    settings = {"prompt": "a cat", "negative_prompt": "", "seed": None, "versions": {"sdxl_ref": "0.1.0"}}
    assert parameters(settings) == "a cat\nVersion: sdxl-ref 0.1.0"


NAMES = {  # of the web UI, where it has the sampler
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_the_names_that_readers_know(sampler: str) -> None:
    assert readers.web_ui(parameters(SETTINGS | {"sampler": sampler}))["Sampler"] == NAMES[sampler]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("karras", [False, True])
def test_schedules_have_the_names_that_readers_know(spacing: str, karras: bool) -> None:
    names = {"linspace": "Uniform", "sgm": "SGM Uniform", "leading": "leading", "trailing": "trailing"}
    found = readers.web_ui(parameters(SETTINGS | {"spacing": spacing, "karras": karras}))["Schedule type"]
    assert found == ("Karras" if karras else names[spacing])


# --- other readers ------------------------------------------------------------------------------------------------


def write(path: Path, prompt: str, negative: str) -> dict[str, Any]:
    settings = SETTINGS | {"prompt": prompt, "negative_prompt": negative}
    path.write_bytes(png(settings))
    return settings


@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_the_form_is_read_by_its_definition(prompt: str, negative: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png", prompt, negative)
    with Image.open(tmp_path / "a.png") as image:
        found = readers.web_ui(image.text["parameters"])  # type: ignore[attr-defined]
    assert (found["Prompt"], found["Negative prompt"]) == (prompt, negative)
    assert found["Lora hashes"] == "style: 0123456789ab, light: fedcba987654"
    assert (found["Refiner"], found["Refiner switch at"]) == ("sd_xl_refiner_1.0 [fedcba9876]", "0.8")


@pytest.mark.parametrize("name", ['a, b: c "d"', "line\nbreak", "plain"])
def test_names_of_any_kind_are_quoted(name: str) -> None:
    settings = SETTINGS | {"checkpoint": {"file": f"{name}.safetensors"}}
    assert readers.web_ui(parameters(settings))["Model"] == name


@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_sd_parsers_reads_it(prompt: str, negative: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png", prompt, negative)
    found = readers.sd_parsers(tmp_path / "a.png")
    [sampler] = found.samplers
    assert [prompt.value for prompt in sampler.prompts] == ([prompt] if prompt else [])
    assert [prompt.value for prompt in sampler.negative_prompts] == ([negative] if negative else [])
    assert sampler.name == "DPM++ 2M"
    assert sampler.parameters == {"scheduler": "Karras", "cfg_scale": "5.0", "seed": "0", "steps": "50"}
    assert (sampler.model.name, sampler.model.hash) == ("sd_xl_base_1.0", "0123456789")
    assert found.metadata["Refiner"] == "sd_xl_refiner_1.0 [fedcba9876]"
    assert found.metadata["Refiner switch at"] == "0.8"
    assert found.metadata["Denoising strength"] == "0.3"


@readers.needs_exiftool
@pytest.mark.parametrize(("prompt", "negative"), PROMPTS)
def test_exiftool_reads_it(prompt: str, negative: str, tmp_path: Path) -> None:
    settings = write(tmp_path / "a.png", prompt, negative)
    found = readers.exiftool(tmp_path / "a.png")
    assert found["Parameters"].replace("\r\n", "\n") == parameters(settings)
    assert json.loads(found["Sdxl_ref"]) == settings


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800 alone"])
def test_a_prompt_of_broken_bytes_can_be_saved(prompt: str) -> None:
    """A shell hands bytes that are no UTF-8 over as lone surrogates."""
    found = chunks(SETTINGS | {"prompt": prompt})
    assert "?" in found["parameters"].splitlines()[0]
    assert json.loads(found["sdxl_ref"])["prompt"] == prompt


def test_the_chunks_are_read_by_the_plain_format() -> None:
    """International text chunks, uncompressed, before the pixels: what viewers look for."""
    names = []
    file = io.BytesIO(png(SETTINGS))
    stream = PngImagePlugin.ChunkStream(file)
    file.seek(8)
    while not names or names[-1] != b"IEND":
        name, position, length = stream.read()
        names.append(name)
        file.seek(position + length + 4)
    assert names[0] == b"IHDR"
    assert names.count(b"iTXt") == 2
    assert max(i for i, name in enumerate(names) if name == b"iTXt") < names.index(b"IDAT")
