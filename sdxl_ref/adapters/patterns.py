"""Regular expressions from users and files: looked for in names, in bounded time and memory."""

import math
import re
import time
from collections.abc import Iterable

import regex

from sdxl_ref.config import InputError

LONGEST = 2_000  # characters
COUNTS = 10_000  # of all counted repetitions, multiplied
COUNTED = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")
SECONDS = 0.25  # of the processor, for all names; what needs more tries the same letters over and over
SIMPLER = "write it without repetitions inside repetitions, which (a+)+ and (a{100}){100} have"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names in which a regular expression is found, anywhere, in their order; by the rules of Python's `re`.

    InputError for what is none, and for one that takes too long.
    """
    check(pattern)
    deadline = time.process_time() + SECONDS
    try:
        compiled = regex.compile(pattern, regex.VERSION0)  # as `re`, but its search can be given a time
        return [name for name in names if compiled.search(name, timeout=max(0.0, deadline - time.process_time()))]
    except (TimeoutError, MemoryError, RecursionError) as error:
        raise InputError(f"the regular expression {pattern[:100]!r} takes too long: {SIMPLER}") from error
    except regex.error as error:
        raise InputError(f"expected a regular expression, found {pattern!r}: {error}") from error


def check(pattern: str) -> None:
    """InputError for what is no regular expression, or a too large one."""
    if len(pattern) > LONGEST:
        raise InputError(f"expected a regular expression of at most {LONGEST} characters, found {len(pattern)}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"expected a regular expression, found {pattern[:100]!r}: {error}") from error
    counts = [int(count) for pair in COUNTED.findall(pattern) for count in pair if count]
    if math.prod(max(count, 1) for count in counts) > COUNTS:
        raise InputError(f"the regular expression {pattern[:100]!r} repeats more than {COUNTS} times: {SIMPLER}")
