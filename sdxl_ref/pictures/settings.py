"""The settings that a picture carries: as JSON, and in the form of the AUTOMATIC1111 web UI, which viewers read."""

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

WORDS = {"euler": "Euler", "heun": "Heun", "ancestral": "a", "dpmpp": "DPM++", "unipc": "UniPC"}  # of samplers' names
SCHEDULES = {"linspace": "Uniform", "sgm": "SGM Uniform"}  # the web UI has no leading or trailing


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """`parameters` and `sdxl_ref`, the JSON, as a PNG's text chunks and a picture's `info` have them."""
    listed = lambda value: value.tolist() if hasattr(value, "tolist") else str(value)  # noqa: E731
    return {"parameters": parameters(settings), "sdxl_ref": json.dumps(settings, default=listed)}


def png_chunks(info: Mapping[str, str]) -> PngInfo:
    """The text chunks of a PNG, from `texts`, or from the `info` of a picture that a pipeline has made."""
    chunks = PngInfo()
    for name in ("parameters", "sdxl_ref"):
        chunks.add_itxt(name, info[name])
    return chunks


def parameters(settings: Mapping[str, Any]) -> str:
    """Prompt, negative prompt, then one line of `Key: value`, in the web UI's words.

    Where a value has a comma, colon, quote or newline it is quoted as in JSON. Hashes are the first digits of a sha256.
    Bytes of a prompt that are no UTF-8 become question marks.
    """
    model = settings.get("checkpoint", {})
    spacing = settings.get("spacing") or ""
    fields = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": " ".join(WORDS.get(word, word.upper()) for word in (settings.get("sampler") or "").split("_")),
        "Schedule type": "Karras" if settings.get("karras") else SCHEDULES.get(spacing, spacing),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": settings.get("size"),
        "Model hash": model.get("sha256", "")[:10],
        "Model": model.get("file", "").removesuffix(".safetensors"),
        "Denoising strength": settings.get("strength"),
        "Lora hashes": settings.get("lora_hashes"),
        "Refiner": settings.get("refiner"),
        "Refiner switch at": settings.get("refiner_switch"),
        "Version": f"sdxl-ref {settings['versions']['sdxl_ref']}",
    }
    line = ", ".join(f"{name}: {quoted(str(value))}" for name, value in fields.items() if value not in (None, ""))
    negative = [f"Negative prompt: {settings['negative_prompt']}"] if settings.get("negative_prompt") else []
    return "\n".join([settings["prompt"] or "", *negative, line]).encode(errors="replace").decode()  # as UTF-8 has it


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value
