"""PEFT's form, which diffusers writes: `unet.conv_in.lora_A.weight`; and what diffusers wrote before it used PEFT.

Source: PEFT's `get_peft_model_state_dict`; diffusers' `loaders/lora_base.py` and `lora_pipeline.py`, and, for the older
names, its `utils/state_dict_utils.py`. What was saved of a UNet alone has no part in its names.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Settings, Suffixes, with_and_without_text_model
from sdxl_ref.adapters.peft_settings import peft_settings

WRAPPER = "base_model.model."  # of PEFT's class around a network
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")  # diffusers' UNet before PEFT


class Peft(Form):
    name = "peft"
    whose = ("PEFT's", "diffusers'")
    suffixes: ClassVar[Suffixes] = {
        "down": ["lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_linear_layer.down.weight"],
        "up": ["lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight"],
    }

    def layout(self, part: str) -> Layout:
        return "diffusers"

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        if part == "unet":
            return [f"{part}.{layer}", layer]
        return [f"{part}.{name}" for name in with_and_without_text_model(layer)]

    def plain(self, key: str) -> str:
        """`base_model.model.x` -> `x`; `x.processor.to_out_lora.down.weight` -> `x.to_out.0.lora.down.weight`."""
        match = PROCESSOR.search(key)
        if match is not None:
            layer, role = match.groups()
            module = "to_out.0" if layer == "to_out" else layer
            key = f"{key[: match.start()]}.{module}.lora.{role}.weight"
        return key.removeprefix(WRAPPER)

    def settings(self, texts: Mapping[str, str]) -> Settings | None:
        """PEFT's configuration of the layers."""
        return peft_settings(texts)


FORM = Peft()
