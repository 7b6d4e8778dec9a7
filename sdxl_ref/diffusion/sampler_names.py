"""Names of samplers as other tools write them, answered with ours: "DPM++ 2M Karras", "Euler a", diffusers' classes."""

import re

from sdxl_ref.config import unknown
from sdxl_ref.diffusion.samplers import SAMPLERS

SPELLINGS = {"dpm++": "dpmpp", "scheduler": "", "discrete": "", "dpmsolvermultistep": "dpmpp2m", "multistep": ""}
LEFT_OUT = ("k", "sample", "gpu", "karras")  # k-diffusion's prefixes, ComfyUI's suffix, and the schedule


def answer(name: object) -> str:
    """The message for a name that is none of ours: what it is called here, or else the nearest one."""
    word = str(name).lower()
    for theirs, ours in SPELLINGS.items():
        word = word.replace(theirs, ours)
    words = ["ancestral" if part == "a" else part for part in re.findall("[a-z0-9]+", word)]
    squeezed = "".join(part for part in words if part not in LEFT_OUT)
    for ours in SAMPLERS:
        if squeezed == ours.replace("_", ""):
            karras = "karras" in words
            options = f"--sampler {ours}" + (" --karras --spacing linspace" if karras else "")
            arguments = f'sampler="{ours}"' + (', karras=True, spacing="linspace"' if karras else "")
            return f"the sampler {name!r} is called {ours} here: write {options}, in Python {arguments}"
    return unknown("sampler", name, SAMPLERS)
