"""Each fault that an implementation of SDXL is known to have, planted in ours for one test, fails the parity checks.

`FAULTS` names the check that has to catch each; untouched, every check passes (tests beside this one).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import checks
import pairs
import peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.networks import openclip_g, unet, vae
from sdxl_ref.networks.layers import sinusoidal_embedding
from sdxl_ref.text import conditioning
from sdxl_ref.text.tokenizer import tokenize

Patch = pytest.MonkeyPatch


def set_eps(kind: type[nn.Module], eps: float) -> Callable[[nn.Module], None]:
    """Give every GroupNorm inside modules of `kind` another eps."""

    def tamper(network: nn.Module) -> None:
        inside = [module for owner in network.modules() if isinstance(owner, kind) for module in owner.modules()]
        norms = [module for module in inside if isinstance(module, nn.GroupNorm)]
        assert norms
        for norm in norms:
            norm.eps = eps

    return tamper


def transformer_eps(patch: Patch) -> None:
    checks.check_unet(tamper=set_eps(unet.SpatialTransformer, 1e-5))


def resblock_eps(patch: Patch) -> None:
    checks.check_unet(tamper=set_eps(unet.ResBlock, 1e-6))


def vae_eps(patch: Patch) -> None:
    checks.check_vae(tamper=set_eps(vae.AutoencoderKL, 1e-5))


def sin_before_cos(patch: Patch) -> None:
    def swapped(values: Tensor, dim: int) -> Tensor:
        return sinusoidal_embedding(values, dim).roll(dim // 2, dims=-1)

    patch.setattr(unet, "sinusoidal_embedding", swapped)
    checks.check_unet()


def tanh_gelu(patch: Patch) -> None:
    def forward(self: unet.GEGLU, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate="tanh")

    patch.setattr(unet.GEGLU, "forward", forward)
    checks.check_unet()


def quick_gelu_for_gelu(patch: Patch) -> None:
    checks.check_openclip(replace(peers.SMALL_REFINER.text_encoders[0], activation="quick_gelu"))


def height_and_width_swapped(patch: Patch) -> None:
    tensor = conditioning.Numbers.tensor
    patch.setattr(conditioning.Numbers, "tensor", lambda self, kind: tensor(self, kind)[[1, 0, 2, 3, 4]])
    checks.check_pipeline()


def ln_final_on_the_context(patch: Patch) -> None:
    def tamper(encoder: openclip_g.OpenCLIPTextEncoder) -> None:
        encoder.register_forward_hook(lambda self, args, out: (self.ln_final(out[0]), out[1]))

    checks.check_openclip(tamper=tamper)


def padding_with_end_of_text(patch: Patch) -> None:
    patch.setattr(conditioning, "tokenize", lambda prompts, pad: tokenize(prompts, pad="eos"))
    checks.check_pipeline()


def latents_not_scaled(patch: Patch) -> None:
    unscaled = replace(pairs.REFINER.vae, scale_factor=1.0)
    checks.check_pipeline(replace(pairs.REFINER, vae=unscaled))


def steps_offset_0(patch: Patch) -> None:
    timesteps = NoiseSchedule.timesteps
    patch.setattr(NoiseSchedule, "timesteps", lambda self, *args: timesteps(self, *args) - 1)
    checks.check_pipeline()


def symmetric_padding(patch: Patch) -> None:
    patch.setattr(vae.Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1))))
    checks.check_vae()


def bfloat16_size_embedding(patch: Patch) -> None:
    embed = conditioning.embed_numbers
    patch.setattr(conditioning, "embed_numbers", lambda numbers: embed(numbers.bfloat16()))
    checks.check_pipeline()


def q_and_k_exchanged(patch: Patch) -> None:
    def tamper(network: Any) -> None:
        attention = network.middle_block[1].transformer_blocks[0].attn1
        attention.to_q, attention.to_k = attention.to_k, attention.to_q

    checks.check_unet(tamper=tamper)


def pooled_at_the_last_position(patch: Patch) -> None:
    def forward(self: openclip_g.OpenCLIPTextEncoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
        *blocks, last = self.transformer.get_submodule("resblocks").children()
        hidden = nn.Sequential(*blocks)(self.token_embedding(tokens) + self.positional_embedding)
        return hidden, self.ln_final(last(hidden))[:, -1] @ self.text_projection

    patch.setattr(openclip_g.OpenCLIPTextEncoder, "forward", forward)
    checks.check_openclip()


FAULTS = {
    transformer_eps: "UNet",
    resblock_eps: "UNet",
    vae_eps: "VAE",
    sin_before_cos: "UNet",
    tanh_gelu: "UNet",
    quick_gelu_for_gelu: "OpenCLIP hidden",
    height_and_width_swapped: "image-to-image",
    ln_final_on_the_context: "OpenCLIP hidden",
    padding_with_end_of_text: "image-to-image",
    latents_not_scaled: "image-to-image",
    steps_offset_0: "image-to-image",
    symmetric_padding: "VAE mean",
    bfloat16_size_embedding: "image-to-image",
    q_and_k_exchanged: "UNet",
    pooled_at_the_last_position: "OpenCLIP pooled",
}


@pytest.fixture(scope="module", autouse=True)
def untouched_first() -> None:
    """The references, from untouched code; and each check passes on ours, so that a failure below is the fault's."""
    checks.check_unet()
    checks.check_vae()
    checks.check_openclip()
    checks.check_pipeline()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
        fault(monkeypatch)
    print(f"{fault.__name__}: {str(caught.value).splitlines()[0]}")


def test_all_fifteen_are_listed() -> None:
    assert len(FAULTS) == 15
    assert torch.get_default_dtype() == torch.float32
