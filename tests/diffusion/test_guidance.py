"""Classifier-free guidance and its rescaling against their formulas and diffusers' `rescale_noise_cfg`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_ref.diffusion.denoiser import Conditioning, Denoiser, Prediction
from sdxl_ref.diffusion.guidance import Guidance, rescaled

EXACT = 1e-12  # float64
SIGMA = torch.tensor(2.5, dtype=torch.float64)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = 3 * noise(0)
NEGATIVE = noise(1)  # what the network answers on each side
POSITIVE = noise(2) + 0.5 * NEGATIVE


def denoiser(kind: str, batches: list[int] | None = None) -> Denoiser:
    """Of a network that answers so, the negative side first."""

    def network(x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        if batches is not None:
            batches.append(len(x))
        return torch.cat([NEGATIVE, POSITIVE])

    nothing = torch.zeros(4, 1, 1, dtype=torch.float64)
    return Denoiser(network, Prediction(kind), Conditioning(nothing, nothing))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_guidance_is_the_formula(kind: str, scale: float) -> None:
    """On estimates of x0 as on outputs (Ho & Salimans 2022, equation 6): all are linear in each other."""
    guided = NEGATIVE + scale * (POSITIVE - NEGATIVE)
    close(Guidance(denoiser(kind), scale)(X, SIGMA), Prediction(kind).denoised(X, guided, SIGMA))


def test_scale_1_is_the_positive_side_and_0_the_negative() -> None:
    prediction = Prediction()
    close(Guidance(denoiser("epsilon"), 1.0)(X, SIGMA), prediction.denoised(X, POSITIVE, SIGMA))
    close(Guidance(denoiser("epsilon"), 0.0)(X, SIGMA), prediction.denoised(X, NEGATIVE, SIGMA))


def test_both_sides_run_as_one_batch() -> None:
    batches: list[int] = []
    Guidance(denoiser("epsilon", batches), 5.0)(X, SIGMA)
    assert batches == [2 * len(X)]


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_rescaling_is_that_of_diffusers_on_what_the_network_predicts(kind: str, amount: float) -> None:
    """Lin et al. 2023, equations 15 and 16, which diffusers applies to the output, be it the noise or v."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    scale = 7.0
    guided: Any = NEGATIVE + scale * (POSITIVE - NEGATIVE)
    theirs = rescale_noise_cfg(guided, POSITIVE, guidance_rescale=amount)
    ours = Guidance(denoiser(kind), scale, amount)(X, SIGMA)
    close(ours, Prediction(kind).denoised(X, theirs, SIGMA))


def test_rescaled_is_the_formula() -> None:
    guided = 4 * noise(3)
    spread = POSITIVE.std(dim=(1, 2, 3)) / guided.std(dim=(1, 2, 3))  # (b,), per picture
    close(rescaled(guided, POSITIVE, 1.0), guided * spread.reshape(2, 1, 1, 1))
    close(rescaled(guided, POSITIVE, 1.0).std(dim=(1, 2, 3)), POSITIVE.std(dim=(1, 2, 3)))
    close(rescaled(guided, POSITIVE, 0.25), 0.25 * rescaled(guided, POSITIVE, 1.0) + 0.75 * guided)
    assert torch.equal(rescaled(guided, POSITIVE, 0.0), guided)
