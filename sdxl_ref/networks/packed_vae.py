"""Blocks of the autoencoder for inference on a CPU: less memory, and none of it new at every call.

Large maps are worked on in bands of rows (bands.py).

Shapes: b batch, c channels, h w a map's height and width.
"""

from einops import rearrange
from torch import Tensor

from sdxl_ref.networks import bands
from sdxl_ref.networks.layers import Upsample, attention
from sdxl_ref.networks.packed_layers import PackedLayer
from sdxl_ref.networks.packed_module import check_inference
from sdxl_ref.networks.vae import AttnBlock, ResnetBlock


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
        check_inference(x, *self.parameters())
        return bands.resnet_block(self, x)


class PackedUpsample(PackedVAEBlock, Upsample):
    plain = Upsample

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        check_inference(x, *self.parameters())
        return bands.upsample(self, x, size)
