"""Textual inversion: words of a prompt that stand for trained vectors instead of the vocabulary's.

Each vector gets a placeholder, an id beyond the vocabulary. Where a tower reads one, `towers.py` puts the vector in
the place of the token's embedding; the tower's weights stay as they are. Source: Gal et al. 2022, arXiv:2208.01618;
`TextualInversionLoaderMixin` in diffusers (where a token stands in a prompt).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from sdxl_ref.config import InputError, TextEncoderConfig, nearest
from sdxl_ref.text.tokenizer import CONTEXT_LENGTH, END, decode, encode, tokens

FIRST = END + 1  # the placeholder of the first vector
TOWERS = ("clip_l", "clip_g")  # as files name them
MOST_VECTORS = CONTEXT_LENGTH - 2  # of one token: a chunk's


@dataclass(frozen=True)
class Placeholders:
    """What stands for vectors in one tower: ids of each name, in small letters, and the vectors (m,width) of all ids.

    `known` are the names of all towers: one without vectors here is of no id.
    """

    ids: Mapping[str, list[int]] = field(default_factory=dict)
    vectors: Tensor | None = None
    known: Sequence[str] = ()

    def spell(self, text: str, whole_words: bool = False) -> list[list[int]]:
        """The ids of a text: of each stretch of words, and of each token that stands for vectors.

        As diffusers' added tokens: wherever its letters occur, the longest first, in capitals too (of which diffusers
        takes the first of several vectors only). `whole_words`: not inside a longer word ("cats" is no token "cat"), as
        the web UI compares.
        """
        if not self.ids:
            return [encode(text)]
        names = sorted(self.ids, key=len, reverse=True)
        pattern = "|".join(f"({name_pattern(name, whole_words)})" for name in names)
        spelled = []
        start = 0
        for match in re.finditer(pattern, text, re.IGNORECASE):
            assert match.lastindex is not None
            spelled += [encode(text[start : match.start()]), self.ids[names[match.lastindex - 1]]]
            start = match.end()
        return [*spelled, encode(text[start:])]

    def of_name(self, name: str) -> list[int]:
        """The ids of a name as ComfyUI writes it, with or without .safetensors. InputError where none is loaded."""
        token = re.sub(r"\.(?:safetensors|pt|bin)$", "", name.lower())
        for candidate in (name.lower(), token):
            if candidate in self.known:
                return self.ids.get(candidate, [])
        raise InputError(f"no embedding {name[:60]!r} is loaded{nearest(token, self.known)}: load its file first")

    def stand_for_vectors(self, unit: Sequence[int]) -> bool:
        return any(i >= FIRST for i in unit)

    def show(self, ids: Iterable[int]) -> str:
        """Ids as text, each token that stands for vectors by its name."""
        names = {ids[0]: f"{name} " for name, ids in self.ids.items()}
        stretches = groupby(ids, lambda i: i >= FIRST)
        return "".join("".join(names.get(i, "") for i in same) if far else decode(same) for far, same in stretches)


def name_pattern(name: str, whole_words: bool) -> str:
    before = r"(?<![^\W\d_])" if whole_words and name[0].isalpha() else ""  # no letter
    behind = r"(?![^\W\d_])" if whole_words and name[-1].isalpha() else ""
    return before + re.escape(name) + behind


class Inversions:
    """The tokens that stand for vectors, in the towers of one model."""

    def __init__(self, text_encoders: Sequence[TextEncoderConfig]) -> None:
        """Of a model's towers, as its configuration has them: bigG last."""
        self.widths = {tower: c.width for tower, c in zip(TOWERS[-len(text_encoders) :], text_encoders, strict=True)}
        self.vectors: dict[str, dict[str, Tensor]] = {tower: {} for tower in self.widths}  # by tower, then by token

    @property
    def tokens(self) -> list[str]:
        """All tokens that there are, as they were loaded."""
        return list(dict.fromkeys(token for vectors in self.vectors.values() for token in vectors))

    def add(self, token: str, vectors: Mapping[str, Tensor]) -> None:
        """Have a token stand for vectors (n,width), by tower. A tower without any goes on reading it as words.

        InputError where one has another width, or where the token is in use.
        """
        self.check_token(token, vectors)
        for tower, rows in vectors.items():
            self.check_vectors(tower, rows)
        for tower, rows in vectors.items():
            self.vectors[tower][token] = rows.detach().clone()

    def check_token(self, token: str, vectors: Iterable[str]) -> None:
        if not token.strip() or token != token.strip():
            raise InputError(f"expected a token without spaces around it, found {token!r}")
        if token.lower() in tokens().values():
            raise InputError(f"{token!r} is a token of the vocabulary: choose another token, such as '<{token}>'")
        for tower in vectors:
            names = {name.lower() for name in self.vectors.get(tower, ())}
            if token.lower() in names:
                raise InputError(f"the token {token!r} stands for vectors already: unload it first, or choose another")

    def check_vectors(self, tower: str, rows: Tensor) -> None:
        if tower not in self.widths:
            raise InputError(f"expected vectors for {' and '.join(self.widths)}, found some for {tower}")
        if rows.ndim != 2 or rows.shape[1] != self.widths[tower] or not 1 <= len(rows) <= MOST_VECTORS:
            expected = f"1 to {MOST_VECTORS} vectors of {self.widths[tower]} numbers"
            raise InputError(f"expected {expected} for {tower}, found a tensor of {tuple(rows.shape)}")
        if not rows.is_floating_point() or not torch.isfinite(rows).all():
            raise InputError(f"expected vectors of finite numbers for {tower}, found others ({rows.dtype})")

    def unload(self, token: str | None = None) -> None:
        """Forget a token, or all. InputError where there is no such token."""
        if token is not None and token not in self.tokens:
            raise InputError(f"no token {token!r} is loaded{nearest(token, self.tokens)}")
        for vectors in self.vectors.values():
            for name in [name for name in vectors if token in (None, name)]:
                del vectors[name]

    def placeholders(self, tower: str) -> Placeholders:
        """What stands for the vectors of one tower."""
        ids: dict[str, list[int]] = {}
        first = FIRST
        for token, rows in self.vectors[tower].items():
            ids[token.lower()] = list(range(first, first + len(rows)))
            first += len(rows)
        known = [token.lower() for token in self.tokens]
        if not ids:
            return Placeholders(known=known)
        return Placeholders(ids, torch.cat(list(self.vectors[tower].values())), known)
