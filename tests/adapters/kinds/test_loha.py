"""LoHa against LyCORIS: matrices, and kernels with and without Tucker's decomposition."""

from collections.abc import Callable

import pytest
import torch

from sdxl_ref.adapters.kinds.loha import KIND, HadamardProduct, Half
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.config import InputError


@pytest.mark.parametrize(
    ("kind", "use_tucker"),
    [
        ("base", True),
        ("refiner", False),
        pytest.param("base", False, marks=pytest.mark.sweep),
        pytest.param("refiner", True, marks=pytest.mark.sweep),
    ],
)
def test_it_gives_what_lycoris_gives(kind: str, use_tucker: bool, as_lycoris_does: Callable) -> None:
    adapter = as_lycoris_does(kind, "loha", use_tucker=use_tucker)
    assert {type(change) for change in adapter.layers.values()} == {HadamardProduct}


def test_what_it_writes_is_read_again() -> None:
    first = Half(torch.randn(2, 6), torch.randn(2, 5), torch.randn(2, 2, 3, 3))
    change = HadamardProduct(first, Half(torch.randn(2, 6), torch.randn(2, 5), torch.randn(2, 2, 3, 3)), 3.0)
    roles = change.tensors()
    again = KIND.read(Layer("x", roles, lambda _: float(roles["alpha"])), None)["x"]
    assert torch.equal(again.delta(), change.delta())
    assert again.shape == change.delta().shape == (6, 5, 3, 3)


def test_refusals() -> None:
    good = {"hada_w1_a": torch.ones(6, 2), "hada_w1_b": torch.ones(2, 5)}
    good |= {"hada_w2_a": torch.ones(6, 2), "hada_w2_b": torch.ones(2, 5)}

    def refused(message: str, **roles: torch.Tensor | None) -> None:
        changed = {role: tensor for role, tensor in (good | roles).items() if tensor is not None}
        with pytest.raises(InputError, match=message):
            KIND.read(Layer("x", changed, float), None)

    refused("layer x has no hada_w2_b factor", hada_w2_b=None)
    refused(r"makes no LoHa: its factors have no common rank \(\(6, 2\), \(3, 5\)\)", hada_w1_b=torch.ones(3, 5))
    refused("makes no LoHa: its two halves differ", hada_w2_a=torch.ones(7, 2))
    refused("not finite", hada_w2_a=torch.full((6, 2), torch.nan))
    refused("its factors have no common rank", hada_t1=torch.ones(2, 2))
