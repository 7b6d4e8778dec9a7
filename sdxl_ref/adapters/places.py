"""Where a layer of an adapter acts: on a matrix, a kernel or a bias of a network, or on a block of its rows."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from sdxl_ref.config import ModelConfig
from sdxl_ref.weights.checkpoint import prefixes
from sdxl_ref.weights.layouts import Rule, part_rules


@dataclass(frozen=True, order=True)
class Place:
    """A matrix, a kernel or a bias of a part, by its official name.

    With `count` above 1 it is one of so many equal blocks of the rows: q, k or v of a stacked projection.
    """

    part: str
    key: str  # official, without the part's prefix
    index: int = 0
    count: int = 1
    transposed: bool = False  # x @ W, where an adapter holds factors of W's transpose

    def block(self, weight: Tensor) -> Tensor:
        """The rows of the official tensor that the adapter changes: a view."""
        rows = weight.chunk(self.count)[self.index]
        return rows.T if self.transposed else rows


def adapted_parts(config: ModelConfig) -> dict[str, str]:
    """The parts of a model that adapters act on, all but the autoencoder, and their prefixes in a checkpoint."""
    return {part: prefix for part, prefix in prefixes(config).items() if part != "vae"}


def places(part: str, network_rules: Iterable[Rule]) -> dict[str, Place]:
    """Every layer's name in diffusers' layout, and in the official one, -> its place; one-dimensional ones too."""
    return _places(part, (rule for rule in network_rules if rule.official.endswith(("weight", "text_projection"))))


def biases(part: str, network_rules: Iterable[Rule]) -> dict[str, Place]:
    """The same of the layers' biases."""
    return _places(part, (rule for rule in network_rules if rule.official.endswith("bias")))


def _places(part: str, network_rules: Iterable[Rule]) -> dict[str, Place]:
    place_of: dict[str, Place] = {}
    for rule in network_rules:
        transposed = rule.kind == "transpose"
        place_of[module_of(rule.official)] = Place(part, rule.official, transposed=transposed)
        count = max(1, len(rule.other))
        for index, other in enumerate(rule.other):
            place_of[module_of(other)] = Place(part, rule.official, index, count, transposed)
    return place_of


def module_of(key: str) -> str:
    """The layer of a tensor: `a.b.weight` and `a.b.bias` -> `a.b`; `attn.in_proj_weight` -> `attn.in_proj`."""
    for end in (".weight", "_weight", ".bias", "_bias"):
        if key.endswith(end):
            return key.removesuffix(end)
    return key


def matrices(config: ModelConfig) -> dict[Place, str]:
    """Every matrix and kernel that an adapter can act on, once (q, k and v one by one), -> its key in a checkpoint.

    Embeddings are none: they are looked up, not multiplied with.
    """
    keys: dict[Place, str] = {}
    for part, prefix in adapted_parts(config).items():
        state, network_rules = part_rules(part, config)
        blocks = {rule.official: len(rule.other) for rule in network_rules}
        for place in places(part, network_rules).values():
            is_stacked = blocks[place.key] > place.count
            if state[place.key].ndim >= 2 and not is_stacked and "embedding" not in place.key:
                keys[place] = prefix + place.key
    return keys
