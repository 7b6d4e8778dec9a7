"""Markup of other tools in a prompt, which is words here: told once, with what there is in its place."""

import re
import warnings

MARKUP = re.compile(
    r"\([^()]{1,300}(?:[^()\d]:\s*\d|:\s*\d*\.\d)[\d.]{0,9}\s*\)"  # (word:1.3), and neither (16:9) nor (10:30)
    r"|<(?:lora|lyco|hypernet):[^<>]{1,300}>"
    r"|\bBREAK\b"
    r"|\[[^\[\]]{0,300}:\s*\d*\.?\d+\s*\]"  # [from:to:0.5]
)


def note_markup(prompts: str) -> None:
    """A warning that quotes the first piece of markup."""
    found = MARKUP.search(prompts)
    if found:
        warnings.warn(
            f"{found[0][:60]!r} in a prompt is read as words: there is no markup for weights, schedules or BREAK here; "
            "an adapter is put on with --lora FILE:SCALE, in Python with load_lora_weights and set_adapters",
            stacklevel=3,
        )
