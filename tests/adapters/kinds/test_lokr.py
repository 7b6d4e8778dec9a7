"""LoKr against LyCORIS: both sides whole, one or both of two factors, and kernels with Tucker's decomposition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl_ref.adapters.kinds.lokr import KIND, KroneckerProduct, Side
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError

OPTIONS: dict[str, dict[str, Any]] = {
    "second side of two factors": {"factor": 4},
    "both sides of two factors": {"decompose_both": True},
    "a kernel between two factors": {"decompose_both": True, "use_tucker": True},
    "both sides whole": {"full_matrix": True},
    "unbalanced": {"unbalanced_factorization": True, "factor": 8},
}


IN_THE_SWEEP = ("a kernel between two factors", "both sides of two factors", "unbalanced")
MARKS = {name: [pytest.mark.sweep] if name in IN_THE_SWEEP else [] for name in OPTIONS}


@pytest.mark.parametrize("options", [pytest.param(name, marks=MARKS[name]) for name in OPTIONS])
def test_it_gives_what_lycoris_gives(options: str, as_lycoris_does: Callable) -> None:
    adapter = as_lycoris_does("base", "lokr", **OPTIONS[options])
    assert {type(change) for change in adapter.layers.values()} == {KroneckerProduct}


def test_on_a_refiner(as_lycoris_does: Callable) -> None:
    as_lycoris_does("refiner", "lokr", **OPTIONS["a kernel between two factors"])


def test_two_whole_sides_have_no_scale() -> None:
    roles = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(3, 3), "alpha": torch.tensor(0.5)}
    change = KIND.read(Layer("x", roles, lambda _: 0.5), None)["x"]
    assert torch.equal(change.delta(), torch.kron(roles["lokr_w1"], roles["lokr_w2"]))
    assert "alpha" not in change.tensors()


def test_what_it_writes_is_read_again() -> None:
    first = Side(None, torch.randn(4, 2), torch.randn(2, 3))
    change = KroneckerProduct(first, Side(None, torch.randn(2, 6), torch.randn(2, 5), torch.randn(2, 2, 3, 3)), 3.0)
    roles = change.tensors()
    again = KIND.read(Layer("x", roles, lambda _: float(roles["alpha"])), None)["x"]
    assert torch.equal(again.delta(), change.delta())
    assert again.shape == change.delta().shape == (24, 15, 3, 3)


def test_refusals() -> None:
    good = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(6, 2), "lokr_w2_b": torch.ones(2, 5)}

    def refused(message: str, **roles: torch.Tensor | None) -> None:
        changed = {role: tensor for role, tensor in (good | roles).items() if tensor is not None}
        with pytest.raises(InputError, match=message):
            KIND.read(Layer("x", changed, float), None)

    refused("layer x has no lokr_w1_a and no lokr_w1_b factor", lokr_w1=None)
    refused("layer x has no lokr_w2_b factor", lokr_w2_b=None)
    refused("expected lokr_w2 as one matrix or as two factors", lokr_w2=torch.ones(3, 3))
    refused("expected a matrix as its first side", lokr_w1=torch.ones(2, 2, 3, 3))
    refused("no common rank", lokr_w2_b=torch.ones(3, 5))
