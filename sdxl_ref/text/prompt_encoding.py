"""Prompts of any length, with weights, tokens of textual inversion, and earlier hidden states: what a UNet reads.

It is imported where one of these is asked for; `conditioning.encode_text` is the usual way, with the same meaning.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError, unknown
from sdxl_ref.text import a1111, comfy
from sdxl_ref.text.chunks import Chunk, frame, padded, read_plain
from sdxl_ref.text.inversion import Inversions, Placeholders
from sdxl_ref.text.tokenizer import END
from sdxl_ref.text.towers import run

MOST_CHUNKS = 256  # of a prompt in one call
PADS = {"clip_l": END, "clip_g": 0}


class Syntax(NamedTuple):
    """How a tool reads prompts: their chunks, the number for all texts of a call, padding to it, and the weights."""

    read: Callable[[str, Placeholders], list[Chunk]]
    common: Callable[[Iterable[int]], int]
    fill: Callable[[list[Chunk], int], list[Chunk]]
    weigh: Callable[["Tower", Tensor, Tensor], Tensor]


class Tower(NamedTuple):
    """A text tower at work: `name` is "clip_l" or "clip_g"."""

    name: str
    network: nn.Module
    placeholders: Placeholders
    clip_skip: int
    device: torch.device | str

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens (n,77) -> hidden (n,77,d) and pooled (n,e) where the tower has one."""
        return run(self.name, self.network, tokens.to(self.device), self.placeholders.vectors, self.clip_skip)

    def empty(self) -> Tensor:
        """The hidden state (1,77,d) of the empty prompt."""
        tokens, _ = frame([[]], PADS[self.name])
        return self.encode(tokens)[0]


SYNTAXES = {
    "plain": Syntax(read_plain, max, padded, lambda tower, z, weights: z),
    "a1111": Syntax(a1111.read, max, padded, lambda tower, z, weights: a1111.weigh(z, weights)),
    "comfy": Syntax(comfy.read, comfy.common, comfy.repeated, lambda tower, z, w: comfy.weigh(z, w, tower.empty())),
}


def encode_prompts(
    clip_l: nn.Module | None,
    openclip: nn.Module,
    prompts: Sequence[str],
    prompts_2: Sequence[str],
    device: torch.device | str,
    *,
    syntax: str = "plain",
    clip_skip: int | None = None,
    inversions: Inversions | None = None,
) -> tuple[Tensor, Tensor]:
    """b prompts -> context (b,77*k,d) and pooled vector (b,e), on the device on which the encoders work.

    As `conditioning.encode_text`, whose values these are for prompts of at most 75 tokens without markup. `syntax` is
    "plain", "a1111" or "comfy": the modules of these names say what they read. k chunks are as many as all texts of the
    call need; the pooled vector is the first chunk's. `clip_skip` takes the hidden state of so many layers before the
    usual one, of both towers (diffusers' argument). InputError for what cannot be read, in one line.
    """
    if syntax not in SYNTAXES:
        raise InputError(unknown("prompt_syntax", syntax, SYNTAXES))
    skip = checked_skip(clip_skip)
    towers = []
    for name, network in (("clip_l", clip_l), ("clip_g", openclip)):
        if network is not None:
            placeholders = Placeholders() if inversions is None else inversions.placeholders(name)
            towers.append(Tower(name, network, placeholders, skip, device))
    texts = {"clip_l": prompts, "clip_g": prompts_2}
    rule = SYNTAXES[syntax]
    read = [[rule.read(text, tower.placeholders) for text in texts[tower.name]] for tower in towers]
    outputs = [encode(tower, chunks, rule) for tower, chunks in zip(towers, evened(read, rule), strict=True)]
    context = torch.cat([hidden for hidden, _ in outputs], dim=-1)
    pooled = outputs[-1][1]
    assert pooled is not None  # OpenCLIP's
    return context, pooled


def checked_skip(clip_skip: int | None) -> int:
    if clip_skip is None:
        return 0
    if type(clip_skip) is not int or clip_skip < 0:
        raise InputError(f"clip_skip must be a number of layers, 0 or more, found {clip_skip!r:.60}")
    return clip_skip


def evened(read: list[list[list[Chunk]]], rule: Syntax) -> list[list[list[Chunk]]]:
    """The chunks of b texts for each tower, as many everywhere: of a text's towers first, with empty ones, then of all.

    InputError where they would be too many.
    """
    counts = [max(map(len, chunks)) for chunks in zip(*read, strict=True)]  # (b,)
    count = rule.common(counts)
    if count > MOST_CHUNKS:
        numbers = ", ".join(map(str, sorted(set(counts))))
        raise InputError(f"prompts of {numbers} chunks of 75 tokens in one call want {count}: at most {MOST_CHUNKS}")
    return [
        [rule.fill(padded(chunks, own), count) for chunks, own in zip(texts, counts, strict=True)] for texts in read
    ]


def encode(tower: Tower, texts: list[list[Chunk]], rule: Syntax) -> tuple[Tensor, Tensor | None]:
    """k chunks of each of b texts -> hidden (b,77*k,d) and pooled (b,e), with all chunks in one batch."""
    tokens, weights = frame([chunk for chunks in texts for chunk in chunks], PADS[tower.name])  # (b*k,77)
    hidden, pooled = tower.encode(tokens)
    if (weights != 1).any():
        hidden = rule.weigh(tower, hidden, weights.to(hidden.device))
    hidden = hidden.unflatten(0, (len(texts), -1)).flatten(1, 2)  # (b*k,77,d) -> (b,77*k,d)
    return hidden, None if pooled is None else pooled.unflatten(0, (len(texts), -1))[:, 0]  # (b*k,e) -> (b,e)
