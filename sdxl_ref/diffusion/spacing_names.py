"""Names of schedules as other tools write them, answered with the spacing or the option that there is here."""

import re
from collections.abc import Iterable

from sdxl_ref.config import unknown

OURS = {"sgmuniform": "sgm"}  # ComfyUI's and the web UI's


def answer(name: object, spacings: Iterable[str]) -> str:
    """The message for a name that is none of the spacings: what it is called here, or else the nearest one."""
    squeezed = re.sub("[^a-z]", "", str(name).lower())
    if squeezed == "karras":  # which goes between the ends of the whole training range there: linspace's here
        options = "--karras --spacing linspace"
        return f'{name!r} is no spacing here: write {options}, in Python karras=True, spacing="linspace"'
    if squeezed in OURS:
        ours = OURS[squeezed]
        return f'the spacing {name!r} is called {ours} here: write --spacing {ours}, in Python spacing="{ours}"'
    return unknown("spacing", name, spacings)
