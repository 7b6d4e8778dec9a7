"""kohya's form, which most adapters come in: `lora_unet_input_blocks_4_1_proj_in.lora_down.weight`.

Source: kohya-ss/sd-scripts, `networks/lora.py` and `networks/sdxl_merge_lora.py`. Its trainer names the UNet's layers
officially and the text encoders' as transformers does; other tools write diffusers' names for the UNet.
"""

from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes

PREFIXES = {  # a refiner's only text encoder is the second one here: some tools count it as the first, without a number
    "unet": ["lora_unet_"],
    "text_encoder": ["lora_te1_"],
    "text_encoder_2": ["lora_te2_", "lora_te_"],
}


class Kohya(Form):
    name = "kohya"
    whose = ("kohya's",)
    suffixes: ClassVar[Suffixes] = {
        "down": ["lora_down.weight"],
        "up": ["lora_up.weight"],
        "mid": ["lora_mid.weight"],
        "alpha": ["alpha"],
    }

    def layout(self, part: str) -> Layout:
        return "official" if part == "unet" else "diffusers"

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        return [start + layer.replace(".", "_") for start in PREFIXES[part]]


FORM = Kohya()
