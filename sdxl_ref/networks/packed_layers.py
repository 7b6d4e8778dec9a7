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

import weakref
from collections.abc import Sequence
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
from sdxl_ref.networks.unet import GEGLU, CrossAttention
from sdxl_ref.networks.vae import AttnBlock

ops: Any = torch.ops.mkldnn
FIRST = "use sdxl_ref.unpack(network), or pipe.unpack(), first"
ALIGNMENT = 16  # of the number of keys: the attention kernel takes twice as long where it is not a multiple


class PackedLayer(nn.Module):
    """What packed layers share: nothing that needs plain weights is answered."""

    plain: ClassVar[type[nn.Module]]
    name: ClassVar[str] = "weight"  # of the parameter that is packed, if it is one
    pieces: Sequence[Tensor]  # what became of it

    def put_away(self) -> None:
        """Replace the plain weight by a packed one."""
        weight = self._parameters.pop(self.name)
        assert weight is not None
        self.pieces = [self.reordered(weight.detach().contiguous())]

    def give_back(self) -> None:
        """Be a plain layer again, with its weight."""
        [packed] = self.pieces
        name = self.name
        del self.pieces
        self.__class__ = self.plain  # type: ignore[assignment]
        set_weight(self, name, packed.to_dense().contiguous())

    def reordered(self, weight: Tensor) -> Tensor:
        return reordered_matrix(weight)

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise InputError(f"a packed network cannot be trained: {FIRST}")
        return super().train(mode)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network has no state_dict: {FIRST}")

    def _load_from_state_dict(self, *_: Any) -> None:
        raise InputError(f"a packed network cannot be given other weights: {FIRST}")

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        for packed in self.pieces:
            probe = torch.empty(0, dtype=packed.dtype)
            moved = function(probe)
            if (moved.device, moved.dtype) != (probe.device, probe.dtype):
                raise InputError(f"a packed network cannot be moved to {moved.device} and {moved.dtype}: {FIRST}")
        return super()._apply(function, recurse)  # type: ignore[no-untyped-call]

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
        check_inference(x)
        if self.padding_mode != "zeros":
            raise InputError(f"a packed convolution pads with zeros, not {self.padding_mode}: {FIRST}")
        x = x.contiguous(memory_format=torch.channels_last)
        if tuple(x.shape[2:]) != self.size:
            self.fit(x)
        where = self.padding, self.stride, self.dilation, self.groups
        return ops._convolution_pointwise(x, self.pieces[0], self.bias, *where, "none", [], "")

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

    Where somebody watches one of these layers, the block is computed as its plain class does it.
    """

    def layers(self) -> list[nn.Linear]:
        """The linear layers, all of one input width."""
        raise NotImplementedError

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        """The pieces of the stacked rows (or of the bias), each of which is one product."""
        return [weight]

    def put_away(self) -> None:
        rows = torch.cat([layer._parameters.pop("weight").detach() for layer in self.layers()])  # type: ignore[union-attr]
        self.pieces = [reordered_matrix(piece.contiguous()) for piece in self.split(rows)]
        for layer in self.layers():
            layer.__class__ = PackedPart
            assert isinstance(layer, PackedPart)
            layer.pieces = []
            layer.block = (self,)

    def give_back(self) -> None:
        rows = torch.cat([piece.to_dense() for piece in self.pieces])
        layers = self.layers()
        del self.pieces
        self.__class__ = self.plain  # type: ignore[assignment]
        for layer, weight in zip(layers, rows.split([layer.out_features for layer in layers]), strict=True):
            del layer.pieces, layer.block
            layer.__class__ = nn.Linear
            set_weight(layer, "weight", weight.clone())

    def output_of(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """What one of the layers returns."""
        layers = self.layers()
        rows = torch.cat([linear(x, piece, None) for piece in self.pieces], dim=-1)
        output = rows.split([other.out_features for other in layers], dim=-1)[layers.index(layer)]
        return output if layer.bias is None else output + layer.bias


class PackedPart(PackedLayer, nn.Linear):
    """A linear layer whose weight the block around it holds."""

    plain = nn.Linear
    block: tuple[PackedBlock]  # in a tuple, or else it would count as a module within this one

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0].output_of(self, x)


class PackedGEGLU(PackedBlock, GEGLU):
    """Value and gate apart; in half precision gelu and product are done while the kernel still holds its sums."""

    plain = GEGLU

    def layers(self) -> list[nn.Linear]:
        return [self.proj]

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        if is_watched(self.proj):
            return GEGLU.forward(self, x)
        check_inference(x)
        value_bias, gate_bias = (None, None) if self.proj.bias is None else self.split(self.proj.bias)
        value_rows, gate_rows = self.pieces
        if x.dtype == torch.float32:  # where the kernel's own gelu is slower
            gate = F.gelu(linear(x, gate_rows, gate_bias))  # (b,n,d)
            return linear(x, value_rows, value_bias).mul_(gate)
        gate = ops._linear_pointwise(x, gate_rows, gate_bias, "gelu", [], "none")
        return ops._linear_pointwise(x, gate, value_rows, value_bias, "mul")


class PackedCrossAttention(PackedBlock, CrossAttention):
    """q, k and v of one matrix, or k and v of the text, which stay what they were while the text is the same tensor."""

    plain = CrossAttention
    text: tuple[Any, int, tuple[Tensor, Tensor, Tensor | None]] | None

    def layers(self) -> list[nn.Linear]:
        layers = [self.to_q, self.to_k, self.to_v]
        return layers if self.to_q.in_features == self.to_k.in_features else layers[1:]

    def put_away(self) -> None:
        super().put_away()
        self.text = None

    def give_back(self) -> None:
        del self.text
        super().give_back()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if is_watched(*self.layers()):
            return CrossAttention.forward(self, x, context)
        if context is None:
            q, k, v = linear(x, self.pieces[0], None).chunk(3, dim=-1)  # (b,n,3d) -> 3 x (b,n,d)
            return self.to_out(attention(q, k, v, self.heads))
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v, mask = self.keys_and_values(context)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)"))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k and v of a text (b,h,m,d), with rows of nothing up to a multiple of ALIGNMENT, and the mask of these."""
        if self.text is not None:
            known, version, result = self.text
            if known() is context and version == context._version:
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
        if not context.is_inference():  # such a tensor does not tell when it is changed in place
            self.text = weakref.ref(context), context._version, result
        return result


class PackedAttnBlock(PackedLayer, AttnBlock):
    """Of the VAE: q, k and v in one stretch of memory each, as the kernel that works by blocks wants them."""

    plain = AttnBlock
    name = ""

    def put_away(self) -> None:
        self.pieces = []

    def give_back(self) -> None:
        del self.pieces
        self.__class__ = self.plain  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c h w -> b (h w) c").contiguous() for project in (self.q, self.k, self.v))
        h = rearrange(attention(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


KINDS = (PackedLinear, PackedConv2d, PackedSelfAttention, PackedGEGLU, PackedCrossAttention, PackedAttnBlock)
PACKED: dict[type[nn.Module], type[PackedLayer]] = {kind.plain: kind for kind in KINDS}


def set_weight(layer: nn.Module, name: str, weight: Tensor) -> None:
    layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def reordered_matrix(weight: Tensor) -> Tensor:
    return ops._reorder_linear_weight(weight, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With a matrix from `reordered_matrix`."""
    check_inference(x)
    return ops._linear_pointwise(x, weight, bias, "none", [], "")


@lru_cache(maxsize=1000)
def best_order(shape: tuple[int, ...], dtype: torch.dtype, where: tuple[Any, ...]) -> bytes:
    """The order that oneDNN chooses for weights of a shape, a padding, …, and the shape of a map."""
    return order_of(ops._reorder_convolution_weight(torch.empty(shape, dtype=dtype), *where))


def order_of(packed: Tensor) -> bytes:
    """oneDNN's description of the order in memory, but for the gap between two fields, which it never sets."""
    description = bytes(ops._get_mkldnn_serialized_md(packed).tolist())
    return description[:108] + description[112:]


def check_inference(x: Tensor) -> None:
    """InputError where gradients are asked for, which these operators do not have."""
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"a packed network has no gradients: {FIRST}")


def is_watched(*layers: nn.Module) -> bool:
    """Whether somebody would see, or change, what goes into these layers or comes out of them."""
    everywhere = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    here = any(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer) for layer in layers)
    return bool(everywhere or here)
