"""Large feature maps of the autoencoder in bands of rows: only what a block takes and gives is ever there whole.

A band of a 3x3 convolution reads one row of each neighbour; a norm's statistics are those of the whole map. What comes
out differs from the whole by rounding. Layers that are not the usual ones, or that somebody watches, work on the whole.

Shapes: b batch, c channels, g groups, h w a map's height and width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_ref.networks.freed_memory import give_freed_memory_back
from sdxl_ref.networks.layers import GroupNorm, Upsample
from sdxl_ref.networks.packed_layers import PackedConv2d, is_watched, pads_zeros
from sdxl_ref.networks.vae import Downsample, ResnetBlock

LARGE = 2**26  # bytes of a map that is worked on in bands
KEPT = 2**28  # bytes: blocks from here on are new memory anyway, so that others make room for them
BAND = 2**24  # bytes of a band, or a row
NORMS = (nn.GroupNorm, GroupNorm)  # not those of users, which may do something else
CONVOLUTIONS = (nn.Conv2d, PackedConv2d)
Prepare = Callable[[Tensor], Tensor]


def resnet_block(block: ResnetBlock, x: Tensor) -> Tensor:
    """`ResnetBlock.forward`, a large map in bands; in place but for one new map."""
    if size_of(x) <= LARGE or not are_norms(block.norm1, block.norm2) or not is_conv3x3(block.conv1, block.conv2):
        return ResnetBlock.forward(block, x)
    if is_watched(*block.children()):
        return ResnetBlock.forward(block, x)
    h = convolve(x, block.conv1, normalize(x, block.norm1))
    h = convolve(h, block.conv2, normalize(h, block.norm2), result=h)
    if not hasattr(block, "nin_shortcut"):
        return h.add_(x)
    rows = rows_of_a_band(x)
    for band, part in zip(h.split(rows, dim=2), x.split(rows, dim=2), strict=True):
        band.add_(block.nin_shortcut(part))
    return h


def upsample(block: Upsample, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """`Upsample.forward`, to a large map in bands."""
    if 4 * size_of(x) <= LARGE or size is not None or not is_conv3x3(block.conv) or is_watched(block.conv):
        return Upsample.forward(block, x, size)
    return convolve(x, block.conv, lambda band: F.interpolate(band, scale_factor=2.0, mode="nearest"), scale=2)


def downsample(block: Downsample, x: Tensor) -> Tensor:
    """`Downsample.forward`, a large map in bands: row i of the result reads rows 2i to 2i + 2."""
    conv = block.conv
    if size_of(x) <= LARGE or not is_conv3x3(conv, stride=2, padding=0) or is_watched(conv):
        return Downsample.forward(block, x)
    height = x.shape[2] // 2
    rows = max(1, rows_of_a_band(x) // 2)
    bands = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = x[:, :, 2 * top : 2 * bottom + 1]
        below = 2 * (bottom - top) + 1 - band.shape[2]  # the row of zeros at the bottom
        bands.append(conv(F.pad(band, (0, 1, 0, below))))
    return torch.cat(bands, dim=2)  # (b,c,h/2,w/2)


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def are_norms(*norms: nn.Module) -> bool:
    """Whether these are what `normalize` takes."""
    return all(type(norm) in NORMS and norm.affine for norm in norms)


def is_conv3x3(*convs: nn.Module, stride: int = 1, padding: int = 1) -> bool:
    """Whether these are usual 3x3 convolutions, with so many rows and columns of zeros around."""
    expected = (3, 3), (stride, stride), (padding, padding), (1, 1)
    for conv in convs:
        if not isinstance(conv, nn.Conv2d) or type(conv) not in CONVOLUTIONS or not pads_zeros(conv):
            return False
        if (conv.kernel_size, conv.stride, conv.padding, conv.dilation) != expected:
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
        shape = b, conv.out_channels, scale * h, scale * w
        result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    rows = max(1, rows_of_a_band(x) // scale**2)
    above = x[:, :, :0]
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        band = conv(prepare(torch.cat([above, x[:, :, top : bottom + 1]], dim=2)))
        skipped = above.shape[2]
        above = x[:, :, bottom - 1 : bottom].clone()  # before it is overwritten
        result[:, :, scale * top : scale * bottom] = band[:, :, scale * skipped : scale * (skipped + bottom - top)]
    return result


def normalize(x: Tensor, norm: nn.GroupNorm) -> Prepare:
    """silu(norm(x)) as a function of bands of x (b,c,h,w), whose statistics are those of all of x, in at least float32.

    They are merged from those of bands: Chan, Golub and LeVeque 1979, "Updating formulae".
    """
    b, c = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    count = 0
    mean = x.new_zeros(b, norm.num_groups, 1, dtype=wide)
    squares = torch.zeros_like(mean)  # sums of squared distances from the mean
    for band in x.split(rows_of_a_band(x), dim=2):
        values = band.reshape(b, norm.num_groups, -1).to(wide)  # (b,g,c/g*h*w)
        own = values.mean(dim=2, keepdim=True)
        values = values - own
        new = values.shape[2]
        step = (own - mean) * (new / (count + new))
        squares += torch.linalg.vector_norm(values, dim=2, keepdim=True) ** 2 + (own - mean) * step * count
        mean += step
        count += new
    deviation = torch.rsqrt(squares / count + norm.eps)
    scale = (deviation * norm.weight.to(wide).view(norm.num_groups, -1)).view(b, c, 1, 1)
    shift = norm.bias.to(wide).view(1, c, 1, 1) - mean.expand(-1, -1, c // norm.num_groups).reshape(b, c, 1, 1) * scale
    return lambda band: F.silu(torch.addcmul(shift, band.to(wide), scale), inplace=True).to(x.dtype)
