"""Layers whose weights lie in the order in which a CPU's kernels read them, and blocks that fuse such layers.

oneDNN's kernels read the weights of convolutions and linear layers in blocks, whose order depends on the machine. For
plain weights every call reorders them, into new memory. Here that is done once. It moves numbers and changes none: the
plain weights come back to the bit. What a layer returns differs by rounding.

In float32 convolutions stay plain: the kernels that take packed weights sum in one long chain there, and are four to
six times as far from the exact result as the plain ones (1e-6 against 2e-7, 384 to 1536 channels).

A layer becomes a packed one in place, by its class: its name, its hooks, its bias and who holds it stay.

Source: the operators that torch.compile puts in place of these layers on a CPU where weights are frozen
(torch/_inductor/fx_passes/mkldnn_fusion.py).
Shapes: b batch, c channels, h w a map's height and width, n tokens, d width.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from sdxl_ref.config import InputError
from sdxl_ref.networks.layers import attention
from sdxl_ref.networks.openclip_g import SelfAttention
from sdxl_ref.networks.packed_module import FIRST, PackedModule, check_inference
from sdxl_ref.networks.unet import GEGLU, CrossAttention

ops: Any = torch.ops.mkldnn
ALIGNMENT = 16  # of the number of keys: the attention kernel takes twice as long where it is not a multiple


class PackedLayer(PackedModule):
    """What packed layers share: nothing that needs plain weights is answered."""

    plain: ClassVar[type[nn.Module]]
    name: ClassVar[str] = "weight"  # of the parameter that is packed, if it is one
    trained: bool  # whether it had gradients

    def put_away(self) -> None:
        """Replace the plain weight by a packed one, once that is made: a stop meanwhile leaves it as it is."""
        weight: Any = self._parameters[self.name]
        pieces = [self.reordered(weight.detach().contiguous())]
        self.trained = take_weight(self, self.name).requires_grad
        self.pieces = pieces

    def give_back(self) -> None:
        """Be a plain layer again, with its weight."""
        [packed] = self.pieces
        name = self.name
        self.__class__ = self.plain  # type: ignore[assignment]
        set_weight(self, name, packed.to_dense().contiguous(), self.trained)
        del self.pieces, self.trained

    def reordered(self, weight: Tensor) -> Tensor:
        return reordered_matrix(weight)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network has no state_dict: {FIRST}")

    def _load_from_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network cannot be given other weights: {FIRST}")

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            raise InputError(f"the {name} of a packed layer is not to be had: {FIRST}")
        return super().__getattr__(name)


class PackedLinear(PackedLayer, nn.Linear):
    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.pieces[0], self.bias)


class PackedSelfAttention(PackedLayer, SelfAttention):
    """Of OpenCLIP's tower, whose q, k and v are one matrix. Its `out_proj` is packed as any linear layer."""

    plain = SelfAttention
    name = "in_proj_weight"

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = linear(x, self.pieces[0], self.in_proj_bias).chunk(3, dim=-1)  # (b,n,3d) -> 3 x (b,n,d)
        return self.out_proj(attention(q, k, v, self.heads, causal=True))


class PackedConv2d(PackedLayer, nn.Conv2d):
    """What the best order is depends on the size of the map, so the weights are reordered again where a map wants
    another order than they are in. In the wrong one a call takes up to thirty times as long."""

    plain = nn.Conv2d
    size: tuple[int, ...]  # of the maps that the weights are in order for, (h,w)

    def reordered(self, weight: Tensor) -> Tensor:
        self.size = (32, 32)  # of half the maps at 1024 px, within a factor of 4
        return ops._reorder_convolution_weight(weight, *self.where((1, self.in_channels, *self.size)))

    def forward(self, x: Tensor) -> Tensor:
        check_inference(x, self.bias)
        if not pads_zeros(self):
            raise InputError(f"a packed convolution pads with zeros, and no other way: {FIRST}")
        x = x.contiguous(memory_format=torch.channels_last)
        if tuple(x.shape[2:]) != self.size:
            self.fit(x)
        where = self.padding, self.stride, self.dilation, self.groups
        return ops._convolution_pointwise(x, self.pieces[0], dense(self.bias), *where, "none", [], "")

    def fit(self, x: Tensor) -> None:
        """Bring the weights into the best order for maps like x (b,c,h,w)."""
        [weight] = self.pieces
        where = self.where((1, *x.shape[1:]))
        if order_of(weight) != best_order(tuple(weight.shape), x.dtype, where):
            self.pieces = [ops._reorder_convolution_weight(weight.to_dense().contiguous(), *where)]
        self.size = tuple(x.shape[2:])

    def where(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """What the order depends on, besides the weight's own shape and dtype."""
        return self.padding, self.stride, self.dilation, self.groups, shape


class PackedBlock(PackedLayer):
    """A block that computes some of its linear layers together, in `pieces` of all their rows.

    Where somebody watches, replaces or changes one of these layers, the block is computed as its plain class does it.
    """

    parts: tuple["PackedPart", ...]

    def layers(self) -> list[nn.Linear]:
        """The linear layers, all of one input width."""
        raise NotImplementedError

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        """The pieces of the stacked rows (or of the bias), each of which is one product."""
        return [weight]

    def put_away(self) -> None:
        layers = self.layers()
        rows = torch.cat([layer.weight for layer in layers]).detach()
        pieces = [reordered_matrix(piece.contiguous()) for piece in self.split(rows)]
        weights = [take_weight(layer, "weight") for layer in layers]
        self.pieces = pieces
        start = 0
        for layer, weight in zip(layers, weights, strict=True):
            layer.__class__ = PackedPart
            assert isinstance(layer, PackedPart)
            layer.trained = weight.requires_grad
            layer.pieces = self.pieces
            layer.rows = slice(start, start := start + len(weight))
        self.parts = tuple(layers)  # type: ignore[arg-type]

    def give_back(self) -> None:
        rows = torch.cat([piece.to_dense() for piece in self.pieces])
        for part in self.parts:
            part.__class__ = nn.Linear  # type: ignore[assignment]
            set_weight(part, "weight", rows[part.rows].clone(), part.trained)
            del part.pieces, part.rows, part.trained
        self.__class__ = self.plain  # type: ignore[assignment]
        del self.pieces, self.parts

    def is_whole(self) -> bool:
        """Whether its layers are those that were packed, and nobody looks at them."""
        layers = self.layers()
        return all(map(operator.is_, layers, self.parts)) and not is_watched(*layers)


class PackedPart(PackedLayer, nn.Linear):
    """A linear layer whose weight is some rows of what the block around it holds."""

    plain = nn.Linear
    rows: slice

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([linear(x, piece, None) for piece in self.pieces], dim=-1)[..., self.rows]
        return rows if self.bias is None else rows + self.bias


class PackedGEGLU(PackedBlock, GEGLU):
    """Value and gate apart; in half precision gelu and product are done while the kernel still holds its sums."""

    plain = GEGLU

    def layers(self) -> list[nn.Linear]:
        return [self.proj]

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_whole():
            return GEGLU.forward(self, x)
        check_inference(x, self.proj.bias)
        bias = dense(self.proj.bias)
        value_bias, gate_bias = (None, None) if bias is None else self.split(bias)
        value_rows, gate_rows = self.pieces
        if x.dtype == torch.float32:  # where the kernel's own gelu is slower
            gate = F.gelu(linear(x, gate_rows, gate_bias))  # (b,n,d)
            return linear(x, value_rows, value_bias).mul_(gate)
        gate = ops._linear_pointwise(x, gate_rows, gate_bias, "gelu", [], "none")
        return ops._linear_pointwise(x, gate, value_rows, value_bias, "mul")


class PackedCrossAttention(PackedBlock, CrossAttention):
    """q, k and v of one matrix, or k and v of the text, which stay what they were while the text does."""

    plain = CrossAttention
    text: tuple[Any, Tensor, tuple[Tensor, Tensor, Tensor | None]] | None

    def layers(self) -> list[nn.Linear]:
        layers = [self.to_q, self.to_k, self.to_v]
        of_one = getattr(self.to_q, "in_features", 0) == getattr(self.to_k, "in_features", 0)
        return layers if of_one else layers[1:]

    def put_away(self) -> None:
        super().put_away()
        self.text = None

    def give_back(self) -> None:
        del self.text
        super().give_back()

    def is_whole(self) -> bool:
        return super().is_whole() and all(part.bias is None for part in self.parts)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.is_whole():
            return CrossAttention.forward(self, x, context)
        if context is None:
            q, k, v = linear(x, self.pieces[0], None).chunk(3, dim=-1)  # (b,n,3d) -> 3 x (b,n,d)
            return self.to_out(attention(q, k, v, self.heads))
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v, mask = self.keys_and_values(context)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)"))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k and v of a text (b,h,m,d), with rows of nothing up to a multiple of ALIGNMENT, and the mask of these."""
        check_inference(context)
        if self.text is not None:
            _, known, result = self.text
            if known.dtype == context.dtype and torch.equal(known, context):
                return result
        rows = linear(context, self.pieces[0], None)[..., -2 * self.to_k.out_features :]  # (b,77,2d)
        k, v = rearrange(rows, "b m (two h d) -> two b h m d", two=2, h=self.heads)
        missing = -k.shape[2] % ALIGNMENT
        mask = None
        if missing:
            mask = torch.zeros(k.shape[2] + missing, dtype=k.dtype)
            mask[-missing:] = -torch.inf
            mask = mask.expand(1, 1, 1, -1)
        result = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), mask
        self.text = weakref.ref(context, forgetting(self)), context.detach().clone(), result
        return result


def forgetting(block: PackedCrossAttention) -> Callable[[Any], None]:
    """What drops the keys and values of a text that is gone."""
    reference = weakref.ref(block)

    def forget(context: Any) -> None:
        owner = reference()
        text = None if owner is None else vars(owner).get("text")
        if owner is not None and text is not None and text[0] is context:
            owner.text = None

    return forget


def take_weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer._parameters.pop(name)
    assert weight is not None
    return weight


def set_weight(layer: nn.Module, name: str, weight: Tensor, trained: bool) -> None:
    """Give a layer its weight back, in the place of its first parameter."""
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
    layer._parameters.update(others)


def dense(bias: Tensor | None) -> Tensor | None:
    """oneDNN does not look at a bias's strides."""
    return None if bias is None else bias.contiguous()


def reordered_matrix(weight: Tensor) -> Tensor:
    return ops._reorder_linear_weight(weight, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With a matrix from `reordered_matrix`."""
    check_inference(x, bias)
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"expected {weight.shape[1]} features, found an input of {tuple(x.shape)}")
    if x.dtype != weight.dtype:  # as under autocast
        raise RuntimeError(f"a packed layer of {weight.dtype} cannot compute in {x.dtype}: {FIRST}")
    return ops._linear_pointwise(x, weight, dense(bias), "none", [], "")


@lru_cache(maxsize=1000)
def best_order(shape: tuple[int, ...], dtype: torch.dtype, where: tuple[Any, ...]) -> bytes:
    """The order that oneDNN chooses for weights of a shape, a padding, …, and the shape of a map."""
    return order_of(ops._reorder_convolution_weight(torch.empty(shape, dtype=dtype), *where))


def order_of(packed: Tensor) -> bytes:
    """oneDNN's description of the order in memory, but for the gap between two fields, which it never sets."""
    description = bytes(ops._get_mkldnn_serialized_md(packed).tolist())
    return description[:108] + description[112:]


def pads_zeros(conv: nn.Conv2d) -> bool:
    """Whether a convolution is an ordinary one, and not one that users made to tile."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and "_conv_forward" not in vars(conv)


def is_watched(*layers: nn.Module) -> bool:
    """Whether somebody would see, or change, what goes into these layers or comes out of them."""
    everywhere = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    here = any(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer) for layer in layers)
    return bool(everywhere or here)
