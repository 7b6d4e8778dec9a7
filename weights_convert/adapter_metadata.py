"""What a converted adapter keeps of its file's metadata: all that still holds of it."""

from collections.abc import Mapping

from sdxl_ref.adapters import peft_settings
from sdxl_ref.adapters.header import ARCHITECTURE

GONE = ("format", peft_settings.HEADER_KEY, ARCHITECTURE)  # of the file as it was; the new one gets its own
GONE_STARTS = ("ss_network_", "sshs_")  # kohya's: its module, rank and alpha; the hashes of its tensors


def still_holds(metadata: Mapping[str, str]) -> dict[str, str]:
    """Title, author, licence, trigger words, tags and the like: not what names the form, the scales or the bytes."""
    return {key: text for key, text in metadata.items() if not is_of_the_file(key)}


def is_of_the_file(key: str) -> bool:
    """Whether a text tells of a file's tensors, their names or scales, and not of what they are for."""
    part, _, field = key.partition(".")
    setting = field if part in peft_settings.PARTS else key
    is_setting = setting in (*peft_settings.HONOURED, *peft_settings.NO_EFFECT, *peft_settings.REFUSED)
    return key in GONE or key.startswith(GONE_STARTS) or "hash" in key or is_setting
