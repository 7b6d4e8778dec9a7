"""Chunks of a prompt: up to 75 tokens with their weights, each framed to a row of 77 ids of its own.

A prompt syntax reads a prompt as such chunks. A token's id is the tokenizer's, or a placeholder's (inversion.py).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.inversion import Placeholders
from sdxl_ref.text.tokenizer import CONTEXT_LENGTH, END, START

CHUNK_LENGTH = CONTEXT_LENGTH - 2  # between the start and the end token
GREATEST_WEIGHT = 100.0
DEEPEST = 100  # parentheses inside parentheses


class Token(NamedTuple):
    id: int
    weight: float = 1.0


class Piece(NamedTuple):
    """Text of one weight, without markup."""

    text: str
    weight: float


Chunk = list[Token]


def weighted(ids: Iterable[int], weight: float) -> Chunk:
    return [Token(i, weight) for i in ids]


def checked_weight(weight: float, text: str) -> float:
    """The weight itself; InputError where it is not finite, or beyond 100, which is never what was meant."""
    if not math.isfinite(weight) or abs(weight) > GREATEST_WEIGHT:
        limit = f"{GREATEST_WEIGHT:g}"
        raise InputError(
            f"a weight must be within -{limit} and {limit}, found {weight:g} for {text[:60]!r} in a prompt"
        )
    return weight


def check_depth(depth: int) -> None:
    if depth > DEEPEST:
        raise InputError(
            f"parentheses in a prompt nest at most {DEEPEST} deep: write \\( for one that is meant as text"
        )


def unbalanced(mark: str, prompt: str, position: int) -> InputError:
    """The error for a parenthesis without its partner, which the tools read in ways that nobody expects."""
    excerpt = prompt[position : position + 40]
    return InputError(
        f"{mark!r} without its partner in a prompt, at {excerpt!r}: close it, or write \\{mark} where it is text"
    )


def read_plain(prompt: str, placeholders: Placeholders) -> list[Chunk]:
    """No markup, and one chunk: what `tokenize` does, with placeholders; a warning shows what is cut."""
    ids = [i for unit in placeholders.spell(prompt) for i in unit]
    if rest := ids[CHUNK_LENGTH:]:
        cut = placeholders.show(rest).strip()
        warnings.warn(f"the prompt is longer than {CONTEXT_LENGTH} tokens; cut: {cut!r}", stacklevel=2)
    return [weighted(ids[:CHUNK_LENGTH], 1.0)]


def padded(chunks: list[Chunk], count: int) -> list[Chunk]:
    """As many chunks as `count`, empty ones behind."""
    return chunks + [[] for _ in range(count - len(chunks))]


def frame(chunks: Sequence[Chunk], pad: int) -> tuple[Tensor, Tensor]:
    """n chunks -> ids (n,77) int64, each with start, end and padding of its own, and weights (n,77), 1 for these."""
    ids = torch.full((len(chunks), CONTEXT_LENGTH), pad, dtype=torch.int64)
    weights = torch.ones(len(chunks), CONTEXT_LENGTH, dtype=torch.float32)
    for row, chunk in enumerate(chunks):
        ids[row, : len(chunk) + 2] = torch.tensor([START, *(token.id for token in chunk), END])
        weights[row, 1 : len(chunk) + 1] = torch.tensor([token.weight for token in chunk])
    return ids, weights
