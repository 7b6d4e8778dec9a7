"""kohya's form, which most adapters come in: `lora_unet_input_blocks_4_1_proj_in.lora_down.weight`.

Source: kohya-ss/sd-scripts, `networks/lora.py` and `networks/sdxl_merge_lora.py`. Its trainer names the UNet's layers
officially and the text encoders' as transformers does; other tools write diffusers' names for the UNet. LyCORIS alone,
outside that trainer, begins the UNet's with `lycoris_`.
"""

from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes, with_and_without_text_model

PREFIXES = {  # a refiner's only text encoder is the second one here: some tools count it as the first, without a number
    "unet": ["lora_unet_", "lycoris_"],
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
        layers = with_and_without_text_model(layer)
        return [start + name.replace(".", "_") for name in layers for start in PREFIXES[part]]


FORM = Kohya()
