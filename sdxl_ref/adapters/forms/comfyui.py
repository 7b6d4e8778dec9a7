"""ComfyUI's form: `diffusion_model.out.2.lora_up.weight`, `text_encoders.clip_l.transformer.….lora_up.weight`.

Source: ComfyUI's `comfy/lora.py` and `comfy_extras/nodes_lora_extract.py`: its own names of a model's tensors, which
are the official ones for the UNet and transformers' for both text encoders.
"""

from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes, with_and_without_text_model

TOWERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class ComfyUI(Form):
    name = "comfyui"
    whose = ("ComfyUI's",)
    suffixes: ClassVar[Suffixes] = {
        "down": ["lora_down.weight"],
        "up": ["lora_up.weight"],
        "mid": ["lora_mid.weight"],
        "alpha": ["alpha"],
    }

    def layout(self, part: str) -> Layout:
        return "official" if part == "unet" else "diffusers"

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        if part == "unet":
            return [f"diffusion_model.{layer}"]
        tower = f"{TOWERS[part]}.transformer."
        layers = with_and_without_text_model(layer)
        return [start + tower + name for name in layers for start in ("text_encoders.", "")]


FORM = ComfyUI()
