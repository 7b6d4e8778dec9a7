"""Official names, those of a checkpoint's own tensors: `model.diffusion_model.out.2.lora_A.weight`.

Nothing has to be translated.
"""

from typing import ClassVar

from sdxl_ref.adapters.form import Form, Layout, Suffixes


class Official(Form):
    name = "official"
    suffixes: ClassVar[Suffixes] = {"down": ["lora_A.weight"], "up": ["lora_B.weight"]}

    def layout(self, part: str) -> Layout:
        return "official"

    def spellings(self, part: str, prefix: str, layer: str) -> list[str]:
        return [prefix + layer]


FORM = Official()
