"""The settings that a picture carries: as JSON, and in the form of the AUTOMATIC1111 web UI, which viewers read."""

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

WORDS = {"euler": "Euler", "heun": "Heun", "ancestral": "a", "dpmpp": "DPM++", "unipc": "UniPC"}  # of samplers' names
SCHEDULES = {"linspace": "Uniform", "sgm": "SGM Uniform"}  # the web UI has no leading or trailing


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """`parameters` and `sdxl_ref`, the JSON, as a PNG's text chunks and a picture's `info` have them."""
    readable = parameters(settings).encode(errors="replace").decode()  # a prompt may be of broken bytes
    return {"parameters": readable, "sdxl_ref": json.dumps(settings, default=str)}


def png_chunks(info: Mapping[str, str]) -> PngInfo:
    """The text chunks of a PNG, from `texts`, or from the `info` of a picture that a pipeline has made."""
    chunks = PngInfo()
    for name in ("parameters", "sdxl_ref"):
        chunks.add_itxt(name, info[name])
    return chunks


def parameters(settings: Mapping[str, Any]) -> str:
    """Prompt, negative prompt, then one line of `Key: value`, in the web UI's words.

    Where a value has a comma, colon, quote or newline it is quoted as in JSON. Hashes are the first digits of a sha256.
    """
    s = settings
    model = s.get("checkpoint", {})
    fields = {
        "Steps": s.get("num_inference_steps"),
        "Sampler": " ".join(WORDS.get(word, word.upper()) for word in (s.get("sampler") or "").split("_")),
        "Schedule type": "Karras" if s.get("karras") else SCHEDULES.get(s.get("spacing", ""), s.get("spacing")),
        "CFG scale": s.get("guidance_scale"),
        "Seed": s.get("seed"),
        "Size": s.get("size"),
        "Model hash": model.get("sha256", "")[:10],
        "Model": model.get("file", "").removesuffix(".safetensors"),
        "Denoising strength": s.get("strength"),
        "Lora hashes": s.get("lora_hashes"),
        "Refiner": s.get("refiner"),
        "Refiner switch at": s.get("refiner_switch"),
        "Version": f"sdxl-ref {s['versions']['sdxl_ref']}",
    }
    line = ", ".join(f"{name}: {quoted(str(value))}" for name, value in fields.items() if value not in (None, ""))
    negative = [f"Negative prompt: {s['negative_prompt']}"] if s.get("negative_prompt") else []
    return "\n".join([s["prompt"], *negative, line])


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value
