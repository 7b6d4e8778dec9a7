"""ComfyUI's form: `diffusion_model.out.2.lora_up.weight`, `text_encoders.clip_l.transformer.….lora_up.weight`.

Source: ComfyUI's `comfy/lora.py` and `comfy_extras/nodes_lora_extract.py`: its own names of a model's tensors, which
are the official ones for the UNet and transformers' for both text encoders.
"""

from sdxl_ref.adapters.form import with_and_without_text_model
from sdxl_ref.adapters.forms.kohya import Kohya

TOWERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class ComfyUI(Kohya):
    """Kohya's factors, of layers under the model's own names."""

    name = "comfyui"
    whose = ("ComfyUI's",)

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        if part == "unet":
            return [f"diffusion_model.{layer}"]
        tower = f"{TOWERS[part]}.transformer."
        layers = with_and_without_text_model(layer)
        return [start + tower + name for name in layers for start in ("text_encoders.", "")]


FORM = ComfyUI()
