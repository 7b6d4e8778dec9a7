"""Patterns of files and users: Python's own answers, in bounded time."""

import re
import time

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.weights.patterns import LONGEST, Patterns

NAMES = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "up_blocks.0.resnets.1.conv1", ""]
EXPRESSIONS = [
    "to_q",
    r"^mid",
    r"(.*\.)?(attn1\.to_q)$",
    r"conv\d?$",
    "[a-z_]+$",
    "attn1|conv",
    r"(?P<x>\d).*(?P=x)",
    "",
]
SLOW = [r"(.*\.)?((a|aa)+)$", r"(.*\.)?((a|a)*)$", r"(.*\.)?((.|..)+\d)$", r"(.*\.)?(((.|.)*)*\d)$"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_finds_what_python_finds(expression: str) -> None:
    patterns = Patterns({"x": expression}, "a test")
    for name in NAMES:
        assert (patterns.first(name) == "x") == bool(re.match(expression, name))
        assert (patterns.first(name, anywhere=True) == "x") == bool(re.search(expression, name))


def test_the_first_counts() -> None:
    patterns = Patterns({"none": "x", "first": "conv", "second": "conv_in"}, "a test")
    assert patterns.first("conv_in") == "first"
    assert patterns.first("out") is None
    assert Patterns({}, "a test").first("conv_in") is None


@pytest.mark.parametrize("expression", SLOW)
def test_a_pattern_that_tracks_back_is_refused_in_less_than_a_second(expression: str) -> None:
    patterns = Patterns({"slow": expression}, "alpha_pattern of a test")
    start = time.process_time()
    with pytest.raises(
        InputError, match="alpha_pattern of a test: the pattern 'slow' takes too long: write it without"
    ):
        patterns.first("a" * 100 + "!")
    assert time.process_time() - start < 1


def test_many_names_that_are_slow_together_are_bounded_too() -> None:
    patterns = Patterns({"slow": r"(a|aa)+$"}, "a test")
    text = "a" * 18 + "!"  # some milliseconds
    assert patterns.first(text) is None
    start = time.process_time()
    with pytest.raises(InputError, match="takes too long"):
        any(patterns.first(text) for _ in range(10_000))
    assert time.process_time() - start < 1


def test_many_plain_patterns_on_many_names_are_answered() -> None:
    """As many as an adapter with a rank of its own for every layer has."""
    names = [f"up_blocks.{i}.attentions.0.transformer_blocks.{j}.attn1.to_q" for i in range(20) for j in range(20)]
    patterns = Patterns({name: rf"(.*\.)?({name})$" for name in names}, "a test")
    assert [patterns.first(name) for name in names] == names


@pytest.mark.parametrize(
    ("expression", "message"),
    [("(", "expected a regular expression, found 'x': "), ("a" * (LONGEST + 1), f"at most {LONGEST} characters")],
)
def test_refusals(expression: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Patterns({"x": expression}, "a test")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (r"\p{L}", "bad escape"),
        ("(?R)", "unknown extension"),
        ("(" * 900 + ")" * 900, "expected a regular expression"),
        ("a{99999999999999}", "expected a regular expression"),
        ("((a{100}){10}){,11}", "repeats more than 10000 times"),
        ("((a{1000}){1000}){1000}", "repeats more than 10000 times"),  # it would fill the memory
    ],
)
def test_what_python_does_not_know_or_is_too_large(expression: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Patterns({expression: expression}, "a test")
