"""A text tower with what its `forward` has no arguments for: vectors for placeholders, and an earlier hidden state.

Forward hooks do both, for the length of one call, and are gone behind it: on the token embedding, and on the block
whose output is wanted. So packed towers work as plain ones, and such that come when they work; of a compiled tower the
one inside runs, since a compiled graph does not see new hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.text.inversion import FIRST

PARTS = {  # the token embedding, and the blocks
    "clip_l": ("text_model.embeddings.token_embedding", "text_model.encoder.layers"),
    "clip_g": ("token_embedding", "transformer.resblocks"),
}
NO_WORD = 0  # what the tower reads for a placeholder: not the highest id, at which it finds the end of the text


def run(
    name: str, tower: nn.Module, tokens: Tensor, vectors: Tensor | None, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """tokens (n,77) int64, on the tower's device -> hidden state (n,77,d) and pooled (n,e), None for "clip_l".

    A placeholder `FIRST + i` is embedded as row i of `vectors` (m,d). The hidden state is that of `clip_skip` blocks
    before the penultimate; the pooled vector is the last block's in any case.
    """
    is_placeholder = tokens >= FIRST  # (n,77)
    has_vectors = bool(is_placeholder.any())
    skipped: list[Tensor] = []
    with ExitStack() as hooks:
        call: Callable[..., Any] = tower
        if has_vectors or clip_skip:
            tower = getattr(tower, "_orig_mod", tower)  # torch.compile(tower)
            call = tower._call_impl  # not what tower.compile() made
        embedding, blocks = PARTS[name]
        if has_vectors:
            assert vectors is not None
            rows = vectors[(tokens[is_placeholder] - FIRST).to(vectors.device)]
            hooks.enter_context(substituted(tower.get_submodule(embedding), is_placeholder, rows))
        if clip_skip:
            hooks.enter_context(kept_output(block_before(tower.get_submodule(blocks), clip_skip), skipped))
        output = call(tokens.masked_fill(is_placeholder, NO_WORD))
    hidden, pooled = output if isinstance(output, tuple) else (output, None)
    return (skipped[0] if clip_skip else hidden), pooled


def block_before(blocks: nn.Module, clip_skip: int) -> nn.Module:
    """The block whose output is `clip_skip` before the penultimate: `hidden_states[-(clip_skip + 2)]` of transformers.

    InputError where there is none.
    """
    layers = list(blocks.children())
    most = len(layers) - 2
    if not 0 <= clip_skip <= most:
        raise InputError(f"clip_skip must leave a layer: expected 0 to {most} for {len(layers)}, found {clip_skip}")
    return layers[most - clip_skip]


@contextmanager
def substituted(embedding: nn.Module, places: Tensor, rows: Tensor) -> Iterator[None]:
    """Have rows (m,d) in place of what a token embedding gives at m places (n,77)."""

    def substitute(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.masked_scatter(places.unsqueeze(2), rows.to(output))  # in the order of the rows

    handle = embedding.register_forward_hook(substitute)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def kept_output(block: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    """Keep what a block gives."""
    handle = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        yield
    finally:
        handle.remove()
