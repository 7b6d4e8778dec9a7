r"""Prompts as ComfyUI reads them: weights, chunks of 75 tokens, `embedding:name`.

| markup | weight of the text inside, w = 1 outside |
| --- | --- |
| `(text)` | 1.1 w |
| `(text:1.3)` | 1.3, whatever stands around it |
| `(text:word)` | 1.1 w, and the colon is text |
| `\(`, `\)` | the character itself |
| `embedding:name` | the vectors of an inversion; a word of its own, commas behind it are text |

Texts of one weight between the markup are taken as a whole. One of fewer than 8 tokens goes into the next chunk where
it does not fit; a longer one is cut wherever the chunk is full. With z (77,d) a tower's output for a chunk, z0 (77,d)
the same tower's for the empty prompt, and w (77,1) the tokens' weights:

    z' = z0 + w (z - z0)

The texts of a call get chunks for the lowest common multiple of their numbers, each repeated as a whole: attention to
keys that all occur equally often is attention to them once, so the padding changes nothing. The pooled vector is the
first chunk's, without weights.

Refused, where ComfyUI would do what nobody expects: a parenthesis without its partner (all weights behind it shift or
are lost), weights that are not finite or beyond 100, an embedding that is not loaded (left out with a note in the log),
and what its page does before it sends a prompt: choices (`{one|another}`) and comments (`//`, `/*`). A tower for which
a loaded embedding has no vectors reads nothing in its place, as there.

Source: comfy/sd1_clip.py (`token_weights`, `SDTokenizer.tokenize_with_weights`, `encode_token_weights`) and
comfy/conds.py (`CONDCrossAttn`); two towers of unlike lengths: comfy_extras/nodes_clip_sdxl.py.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.chunks import CHUNK_LENGTH, Chunk, Piece, check_depth, checked_weight, unbalanced, weighted
from sdxl_ref.text.inversion import Placeholders
from sdxl_ref.text.tokenizer import encode

FACTOR = 1.1
LONG = 8  # tokens of a text that may be cut
MARK = re.compile(r"\\[()]|[()]|[^\\()]+|\\")
EMBEDDING = re.compile(r"(?:(?<=\s)|^)embedding:(\S*)")
OF_THE_PAGE = re.compile(r"(?<!\\)\{[^{}]{0,300}\|[^{}]{0,300}\}|//|/\*")
Group: TypeAlias = "list[str | Group]"  # what stands between two parentheses


def parse(prompt: str) -> list[Piece]:
    """The pieces of a prompt. InputError for what the module's docstring says is refused."""
    if match := OF_THE_PAGE.search(prompt):
        raise InputError(
            f"{match[0][:60]!r} in a prompt: ComfyUI's page draws choices and takes comments out before it sends a "
            "prompt, which is not done here: write what is wanted"
        )
    return list(weigh_group(grouped(prompt), 1.0))


def grouped(prompt: str) -> Group:
    """A prompt as its parentheses nest; texts are without escapes, no two of them next to each other."""
    groups: list[Group] = [[]]
    opened: list[int] = []  # where, in characters
    for match in MARK.finditer(prompt):
        mark = match[0]
        if mark == "(":
            opened.append(match.start())
            check_depth(len(opened))
            groups.append([])
        elif mark == ")":
            if not opened:
                raise unbalanced(mark, prompt, match.start())
            opened.pop()
            inside = groups.pop()
            groups[-1].append(inside)
        else:
            text = mark[1:] if mark in ("\\(", "\\)") else mark
            before = groups[-1].pop() if groups[-1] and isinstance(groups[-1][-1], str) else ""
            groups[-1].append(f"{before}{text}")
    if opened:
        raise unbalanced("(", prompt, opened[0])
    return groups[0]


def weigh_group(group: Group, weight: float) -> Iterator[Piece]:
    """The pieces of a group whose own texts have a weight."""
    for item in group:
        if isinstance(item, str):
            yield Piece(item, checked_weight(weight, item))
        else:
            inside, stated = split_weight(item)
            yield from weigh_group(inside, weight * FACTOR if stated is None else stated)


def split_weight(group: Group) -> tuple[Group, float | None]:
    """What stands before the last colon of a group, and the number behind it; the group and None without one."""
    last = group[-1] if group else ""
    if not isinstance(last, str):
        return group, None
    text, colon, behind = last.rpartition(":")
    if not colon or (not text and len(group) == 1):  # nothing that could have a weight
        return group, None
    try:
        return [*group[:-1], *([text] if text else [])], float(behind)
    except ValueError:
        return group, None


def spell(text: str, placeholders: Placeholders) -> Iterator[list[int]]:
    """The ids of a text, and of each embedding in it, in lists that are placed one by one."""
    start = 0
    for match in EMBEDDING.finditer(text):
        name = match[1].rstrip(",")
        yield spell_words(text[start : match.start()])
        yield placeholders.of_name(name)
        start = match.start(1) + len(name)
    yield spell_words(text[start:])


def spell_words(text: str) -> list[int]:
    if "embedding:" in text:
        raise InputError(f"expected a space in front of 'embedding:' in a prompt, found {text[:60]!r}")
    return encode(text)


def read(prompt: str, placeholders: Placeholders) -> list[Chunk]:
    """The chunks of a prompt. InputError as `parse` raises it, and for an embedding that is not loaded."""
    chunks: list[Chunk] = [[]]
    for text, weight in parse(prompt):
        for ids in spell(text, placeholders):
            tokens = weighted(ids, weight)
            if len(tokens) < LONG and len(chunks[-1]) + len(tokens) > CHUNK_LENGTH:
                chunks.append([])
            while tokens:
                if len(chunks[-1]) == CHUNK_LENGTH:
                    chunks.append([])
                room = CHUNK_LENGTH - len(chunks[-1])
                chunks[-1] += tokens[:room]
                tokens = tokens[room:]
    return chunks


def common(counts: Iterable[int]) -> int:
    """The number of chunks for texts of so many each: the least to which all of them can be repeated."""
    return math.lcm(*counts)


def repeated(chunks: list[Chunk], count: int) -> list[Chunk]:
    """As many chunks as `count`, a multiple of what there is: the same again."""
    return chunks * (count // len(chunks))


def weigh(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Towers' outputs (n,77,d), weights (n,77), outputs for the empty prompt (1,77,d) -> outputs.

    In at least float32 inside.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    w = weights.unsqueeze(2)  # (n,77,1)
    z0 = empty.to(dtype)
    return torch.where(w == 1, z, ((z.to(dtype) - z0) * w + z0).to(z.dtype))
