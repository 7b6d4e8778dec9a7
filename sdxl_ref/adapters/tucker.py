"""The low-rank products of LoHa and LoKr: two factors, or two and a kernel between them (Tucker's decomposition)."""

import torch
from torch import Tensor

from sdxl_ref.config import InputError


def product(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """In float32: `a` (out,r) `b` (r,in) -> (out,in); with `t` (r,r,kh,kw): `a` (r,out) `b` (r,in) -> (out,in,kh,kw).

    Source: LyCORIS' `functional/general.py`, `rebuild_tucker`.
    """
    if t is None:
        return a.float() @ b.float().flatten(1)
    return torch.einsum("rs...,ro,si->oi...", t.float(), a.float(), b.float())


def check_same_rank(layer: str, kind: str, a: Tensor, b: Tensor, t: Tensor | None) -> None:
    """InputError unless such factors fit each other, with a rank of at least 1."""
    is_product = a.ndim == 2 and b.ndim >= 2
    if is_product and t is not None:
        is_product = b.ndim == 2 and t.ndim == 4 and tuple(t.shape[:2]) == (a.shape[0], b.shape[0])
        is_product = is_product and a.shape[0] == b.shape[0]
    elif is_product:
        is_product = a.shape[1] == b.shape[0]
    if not is_product or b.shape[0] < 1:
        shapes = ", ".join(str(tuple(factor.shape)) for factor in (a, b, t) if factor is not None)
        raise InputError(f"layer {layer} makes no {kind}: its factors have no common rank ({shapes})")
