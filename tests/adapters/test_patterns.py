"""Regular expressions from users: Python's own, in bounded time."""

import re
import time

import pytest

from sdxl_ref.adapters.patterns import matching
from sdxl_ref.config import InputError

NAMES = [
    f"unet.input_blocks.{block}.1.transformer_blocks.{i}.{layer}"
    for block in range(9)
    for i in range(10)
    for layer in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
]


@pytest.mark.parametrize(
    "pattern", ["attn", "", r"blocks\.[0-3]\..*to_q$", "^unet", "(?i)ATTN2|FF", r"(\d)\.\1\.", "(?!.*ff)net", "a{30}"]
)
def test_what_is_found_is_what_python_finds(pattern: str) -> None:
    expected = [name for name in NAMES if re.search(pattern, name)]
    assert matching(pattern, NAMES) == expected
    assert expected


@pytest.mark.parametrize(
    "pattern",
    [r"^(([a-z_.0-9])+.)+[A-Z]$", r"^(a|aa)+$", r"^(([a-z_.0-9])+.)+[A-Z]([a-z])+$", "((a{1000}){1000}){1000}"],
)
def test_a_pattern_that_goes_back_and_forth_is_given_up_within_a_second(pattern: str) -> None:
    """`re` would take years, and the last would fill the memory."""
    begun = time.process_time()
    with pytest.raises(InputError, match=r"write it without repetitions inside repetitions"):
        matching(pattern, [*NAMES, "a" * 60 + "!"])
    assert time.process_time() < begun + 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "expected a regular expression, found '\\('"),
        ("*", "nothing to repeat"),
        (r"\p{L}", "bad escape"),
        ("(?R)", "unknown extension"),
        ("(" * 900 + ")" * 900, "expected a regular expression"),
        ("a" * 2001, "of at most 2000 characters, found 2001"),
        ("a{99999999999999}", "expected a regular expression"),
        ("((a{100}){10}){,11}", "repeats more than 10000 times"),
    ],
)
def test_what_is_no_pattern_is_told(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        matching(pattern, NAMES)
