"""Markup of other tools in a plain prompt, where it is words: told once, with what reads it."""

import re
import warnings

KINDS = (  # one piece of each is quoted
    re.compile(
        r"\([^()]{1,300}(?:[^()\d]:\s*\d|:\s*\d*\.\d)[\d.]{0,9}\s*\)"  # (word:1.3), and neither (16:9) nor (10:30)
        r"|\(\([^()]{1,300}\)\)|\[\[[^\[\]]{1,300}\]\]"  # ((word)); (word) and [word] alone are ordinary text
    ),
    re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,300}>"),
    re.compile(r"\bBREAK\b"),
    re.compile(r"(?<=\s)(?<![A-Z]\s)AND(?=\s{1,9}(?![A-Z]{2})\S)"),  # not in SALT AND PEPPER
    re.compile(r"\[[^\[\]]{0,300}:\s*(?:\d+|\d*\.\d+)\s*\]"),  # [from:to:0.5]
    re.compile(r"\{[^{}|]{0,300}\|[^{}]{0,300}\}|\[[^\[\]|]{1,300}\|[^\[\]]{1,300}\]"),  # {one|another}, [one|another]
    re.compile(r"\bembedding:[\w.-]{1,100}"),
)


def note_markup(prompts: str) -> None:
    """A warning that quotes the first piece of each kind of markup, in their order in the prompts."""
    found = [match for match in (kind.search(prompts) for kind in KINDS) if match]
    if found:
        pieces = [repr(match[0][:60]) for match in sorted(found, key=re.Match.start)]
        verb = "is" if len(pieces) == 1 else "are"
        warnings.warn(
            f"{', '.join(pieces)} in a prompt {verb} read as words: weights are read with prompt_syntax='a1111' (which "
            "reads BREAK too) or 'comfy' (embedding:name too), from the command line with --prompt-syntax; schedules, "
            "alternatives and AND are not; an adapter is put on with --lora FILE:SCALE, in Python with "
            "load_lora_weights and set_adapters",
            stacklevel=3,
        )
