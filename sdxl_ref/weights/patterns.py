"""Regular expressions that a file or a user brings: they answer in bounded time.

Python's `re` can need longer than anyone waits where an expression allows many ways to the same text, `((a+)+)b`. The
`regex` package reads the same syntax and stops when its time is up.
"""

import math
import re
import time
from collections.abc import Mapping

import regex

from sdxl_ref.config import InputError

LONGEST = 2_000  # characters of an expression
COUNTS = 10_000  # of all counted repetitions, multiplied
COUNTED = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")
SIMPLER = "write it without repetitions inside repetitions, which (a+)+ and (a{100}){100} have"
SECONDS = 0.25  # of the processor, for all names that one set of expressions is asked about
SECONDS_A_MATCH = 20e-6  # more of it for each: ten times what one needs


class Patterns:
    """Expressions by name. `source` says where they come from, in an error.

    InputError for what is no regular expression, and, from `first`, where the answer would take too long.
    """

    def __init__(self, expressions: Mapping[str, str], source: str) -> None:
        self.source = source
        self.expressions = {name: self._compiled(name, text) for name, text in expressions.items()}
        self.time_left = SECONDS

    def _compiled(self, name: str, text: str) -> "regex.Pattern[str]":
        if len(text) > LONGEST:
            raise InputError(f"{self.source}: expected patterns of at most {LONGEST} characters, found {len(text)}")
        counts = [int(count) for pair in COUNTED.findall(text) for count in pair if count]
        try:
            re.compile(text)
            if math.prod(max(count, 1) for count in counts) <= COUNTS:
                return regex.compile(text, regex.VERSION0)  # as `re`, but its search can be given a time
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise InputError(f"{self.source}: expected a regular expression, found {name[:100]!r}: {error}") from error
        raise InputError(f"{self.source}: the pattern {name[:100]!r} repeats more than {COUNTS} times: {SIMPLER}")

    def first(self, text: str, anywhere: bool = False) -> str | None:
        """The name of the first expression that fits the text from its start, or anywhere in it; None: none does."""
        for name, expression in self.expressions.items():
            start = time.process_time()
            try:
                find = expression.search if anywhere else expression.match
                match = find(text, timeout=self.time_left)
            except (TimeoutError, MemoryError, RecursionError) as error:
                raise InputError(f"{self.source}: the pattern {name[:100]!r} takes too long: {SIMPLER}") from error
            spent = time.process_time() - start
            self.time_left = max(self.time_left + SECONDS_A_MATCH - spent, SECONDS_A_MATCH)
            if match is not None:
                return name
        return None
