"""Blocks of the autoencoder for inference on a CPU: less memory, and none of it new at every call.

Maps of more than LARGE bytes are worked on in bands of rows, so that only what a block takes and gives is ever there
whole. A band of a 3x3 convolution reads one row of each neighbour. What comes out differs by rounding.

Shapes: b batch, c channels, g groups, h w a map's height and width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_ref.networks.freed_memory import give_freed_memory_back
from sdxl_ref.networks.layers import GroupNorm, Upsample, attention
from sdxl_ref.networks.packed_layers import PackedConv2d, PackedLayer, is_watched, pads_zeros
from sdxl_ref.networks.packed_module import check_inference
from sdxl_ref.networks.vae import AttnBlock, ResnetBlock

LARGE = 2**26  # bytes of a map that is worked on in bands
KEPT = 2**28  # bytes: blocks from here on are new memory anyway, so that others make room for them
BAND = 2**24  # bytes of a band, or a row
NORMS = (nn.GroupNorm, GroupNorm)  # not those of users, which may do something else
CONVOLUTIONS = (nn.Conv2d, PackedConv2d)
Prepare = Callable[[Tensor], Tensor]


class PackedVAEBlock(PackedLayer):
    """A block without a weight of its own."""

    name = ""

    def put_away(self) -> None:
        self.pieces = []

    def give_back(self) -> None:
        del self.pieces
        self.__class__ = self.plain  # type: ignore[assignment]


class PackedAttnBlock(PackedVAEBlock, AttnBlock):
    """q, k and v in one stretch of memory each, as the kernel that works by blocks wants them."""

    plain = AttnBlock

    def forward(self, x: Tensor) -> Tensor:
        check_inference(x, *self.parameters())
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c h w -> b (h w) c").contiguous() for project in (self.q, self.k, self.v))
        h = rearrange(attention(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class PackedResnetBlock(PackedVAEBlock, ResnetBlock):
    plain = ResnetBlock

    def forward(self, x: Tensor) -> Tensor:
        norms = self.norm1, self.norm2
        is_usual = all(type(norm) in NORMS and norm.affine for norm in norms) and is_conv3x3(self.conv1, self.conv2)
        check_inference(x, *self.parameters())
        if size_of(x) <= LARGE or not is_usual or is_watched(*self.children()):
            return ResnetBlock.forward(self, x)
        h = convolve(x, self.conv1, normalize(x, self.norm1))
        h = convolve(h, self.conv2, normalize(h, self.norm2), result=h)
        if not hasattr(self, "nin_shortcut"):
            return h.add_(x)
        rows = rows_of_a_band(x)
        for band, part in zip(h.split(rows, dim=2), x.split(rows, dim=2), strict=True):
            band.add_(self.nin_shortcut(part))
        return h


class PackedUpsample(PackedVAEBlock, Upsample):
    plain = Upsample

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        check_inference(x, *self.parameters())
        if 4 * size_of(x) <= LARGE or size is not None or not is_conv3x3(self.conv) or is_watched(self.conv):
            return Upsample.forward(self, x, size)
        return convolve(x, self.conv, lambda band: F.interpolate(band, scale_factor=2.0, mode="nearest"), scale=2)


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def is_conv3x3(*convs: nn.Module) -> bool:
    """Whether these are what `convolve` takes: 3x3, of stride 1, with a row and a column of zeros around."""
    for conv in convs:
        if not isinstance(conv, nn.Conv2d) or type(conv) not in CONVOLUTIONS or not pads_zeros(conv):
            return False
        if (conv.kernel_size, conv.stride, conv.padding, conv.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
            return False
    return True


def rows_of_a_band(x: Tensor) -> int:
    return max(1, BAND * x.shape[2] // size_of(x))


def convolve(x: Tensor, conv: nn.Conv2d, prepare: Prepare, scale: int = 1, result: Tensor | None = None) -> Tensor:
    """conv(prepare(x)) for x (b,c,h,w), in bands: `conv` keeps the size, `prepare` multiplies it by `scale`.

    `result` takes it, and may be x itself.
    """
    b, _, h, w = x.shape
    if result is None:
        if b * conv.out_channels * scale * h * scale * w * x.element_size() >= KEPT:
            give_freed_memory_back()
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        result = torch.empty(b, conv.out_channels, scale * h, scale * w, dtype=x.dtype, memory_format=layout)
    rows = rows_of_a_band(x)
    above = x[:, :, :0]
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        band = conv(prepare(torch.cat([above, x[:, :, top : bottom + 1]], dim=2)))
        skipped = above.shape[2]
        above = x[:, :, bottom - 1 : bottom].clone()  # before it is overwritten
        result[:, :, scale * top : scale * bottom] = band[:, :, scale * skipped : scale * (skipped + bottom - top)]
    return result


def normalize(x: Tensor, norm: nn.GroupNorm) -> Prepare:
    """silu(norm(x)) as a function of bands of x (b,c,h,w), whose statistics are those of all of x, in float32.

    They are merged from those of bands: Chan, Golub and LeVeque 1979, "Updating formulae".
    """
    b, c = x.shape[:2]
    count = 0
    mean = x.new_zeros(b, norm.num_groups, 1, dtype=torch.float32)
    squares = torch.zeros_like(mean)  # sums of squared distances from the mean
    for band in x.split(rows_of_a_band(x), dim=2):
        values = band.reshape(b, norm.num_groups, -1).float()  # (b,g,c/g*h*w)
        own = values.mean(dim=2, keepdim=True)
        values = values - own
        new = values.shape[2]
        step = (own - mean) * (new / (count + new))
        squares += torch.linalg.vector_norm(values, dim=2, keepdim=True) ** 2 + (own - mean) * step * count
        mean += step
        count += new
    deviation = torch.rsqrt(squares / count + norm.eps)
    scale = (deviation * norm.weight.float().view(norm.num_groups, -1)).view(b, c, 1, 1)
    shift = norm.bias.float().view(1, c, 1, 1) - mean.expand(-1, -1, c // norm.num_groups).reshape(b, c, 1, 1) * scale
    return lambda band: F.silu(torch.addcmul(shift, band.float(), scale), inplace=True).to(x.dtype)
