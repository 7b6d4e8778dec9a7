"""Each fault that an implementation of SDXL is known to have, planted in ours for one test, fails the parity checks.

`FAULTS` names the check that has to catch each; untouched, every check passes (tests beside this one). Those of a
network come from the parity lab's table of mistakes.
"""

from collections.abc import Callable
from dataclasses import replace

import checks
import pairs
import pytest
import torch
from torch import nn

from sdxl_ref.diffusion.schedule import NoiseSchedule
from sdxl_ref.networks import openclip_g, unet, vae
from sdxl_ref.parity.mistakes import MISTAKES
from sdxl_ref.text import conditioning
from sdxl_ref.text.tokenizer import tokenize

Patch = pytest.MonkeyPatch


def mistaken(text: str, kind: type[nn.Module], inside: type[nn.Module] = nn.Module) -> Callable[[nn.Module], None]:
    """Plant a mistake of the table in every module of a class (that is inside one of another class)."""
    [mistake] = [found for found in MISTAKES if found.text == text and kind in found.kinds]

    def tamper(network: nn.Module) -> None:
        owners = [owner for owner in network.modules() if isinstance(owner, inside)]
        modules = {id(module): module for owner in owners for module in owner.modules() if isinstance(module, kind)}
        assert modules
        for module in modules.values():
            module.forward = mistake.plant(module)  # type: ignore[assignment]

    return tamper


def transformer_eps(patch: Patch) -> None:
    checks.check_unet(tamper=mistaken("a norm with eps 1e-05", nn.GroupNorm, unet.SpatialTransformer))


def resblock_eps(patch: Patch) -> None:
    checks.check_unet(tamper=mistaken("a norm with eps 1e-06", nn.GroupNorm, unet.ResBlock))


def vae_eps(patch: Patch) -> None:
    checks.check_vae(tamper=mistaken("a norm with eps 1e-05", nn.GroupNorm))


def sin_before_cos(patch: Patch) -> None:
    checks.check_unet(tamper=mistaken("sines before cosines", unet.UNet))


def tanh_gelu(patch: Patch) -> None:
    checks.check_unet(tamper=mistaken("gelu in its tanh approximation", unet.GEGLU))


def quick_gelu_for_gelu(patch: Patch) -> None:
    checks.check_openclip(tamper=mistaken("quick gelu (x * sigmoid(1.702 x))", nn.GELU))


def height_and_width_swapped(patch: Patch) -> None:
    tensor = conditioning.Numbers.tensor
    patch.setattr(conditioning.Numbers, "tensor", lambda self, kind: tensor(self, kind)[[1, 0, 2, 3, 4]])
    checks.check_pipeline()


def ln_final_on_the_context(patch: Patch) -> None:
    checks.check_openclip(tamper=mistaken("ln_final on the context", openclip_g.OpenCLIPTextEncoder))


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
    padding = "symmetric padding of one pixel, where the last row and column alone are padded"
    checks.check_vae(tamper=mistaken(padding, vae.Downsample))


def bfloat16_size_embedding(patch: Patch) -> None:
    embed = conditioning.embed_numbers
    patch.setattr(conditioning, "embed_numbers", lambda numbers: embed(numbers.bfloat16()))
    checks.check_pipeline()


def q_and_k_exchanged(patch: Patch) -> None:
    checks.check_unet(tamper=mistaken("q and k exchanged", unet.CrossAttention))


def pooled_at_the_last_position(patch: Patch) -> None:
    last = "the pooled vector taken at the last position"
    checks.check_openclip(tamper=mistaken(last, openclip_g.OpenCLIPTextEncoder))


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
