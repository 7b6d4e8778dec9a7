"""PEFT's form, which diffusers writes: `unet.conv_in.lora_A.weight`; and what diffusers wrote before it used PEFT.

Source: PEFT's `get_peft_model_state_dict` and `LoraConfig`; diffusers' `loaders/lora_base.py` and `lora_pipeline.py`,
and, for the older names, its `utils/state_dict_utils.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes

WRAPPER = "base_model.model."  # of PEFT's class around a network
TEXT_MODEL = "text_model."  # of transformers' CLIPTextModel, which leaves it out since version 5
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")  # diffusers' UNet before PEFT
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations


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
        names = [f"{part}.{layer}"]
        if part != "unet" and layer.startswith(TEXT_MODEL):
            names.append(f"{part}.{layer.removeprefix(TEXT_MODEL)}")
        return names

    def plain(self, key: str) -> str:
        """`base_model.model.x` -> `x`; `x.processor.to_out_lora.down.weight` -> `x.to_out.0.lora.down.weight`."""
        match = PROCESSOR.search(key)
        if match is not None:
            layer, role = match.groups()
            module = "to_out.0" if layer == "to_out" else layer
            key = f"{key[: match.start()]}.{module}.lora.{role}.weight"
        return key.removeprefix(WRAPPER)

    def alpha(self, metadata: Mapping[str, str], layer: str, rank: int) -> float | None:
        """The alpha of PEFT's configuration, where diffusers kept it in the file.

        A configuration stands there for each part (`unet.lora_alpha`), and may name layers (`unet.alpha_pattern`).
        With `use_rslora` a change is divided by the root of the rank.
        """
        config = configurations(metadata.get(METADATA_KEY, "{}"))
        part = layer.split(".")[0]

        def field(name: str) -> Any:
            return config.get(f"{part}.{name}", config.get(name))

        alpha = field("lora_alpha")
        for pattern, own_alpha in (field("alpha_pattern") or {}).items():
            if re.search(rf"(^|\.){pattern}$", layer):
                alpha = own_alpha
        if alpha is None:
            return None
        return float(alpha) * (math.sqrt(rank) if field("use_rslora") else 1)


@lru_cache(maxsize=1)
def configurations(text: str) -> Any:
    """What diffusers kept of PEFT's configurations; a file's text is the same for each of its layers."""
    return json.loads(text)


FORM = Peft()
