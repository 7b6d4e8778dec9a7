"""The recipe's autoencoder: trained on crops of scenes, its latents normalised, all scenes encoded by it."""

import json
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.config import InputError
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.noise import draw_noise
from sdxl_ref.pocket.examples import SEED, Pixels, example, to_images
from sdxl_ref.pocket.scenes import SIZE, Look
from sdxl_ref.pocket.stages import SETTINGS, RecipeFolder
from sdxl_ref.training.loop import Run
from sdxl_ref.weights.tensor_files import read_metadata

NORMALISED_BY = 1000  # pictures
AT_ONCE = 50  # pictures that are encoded together
GRID = 8  # pixels; the corners of crops lie on it, as the patterns of a scene do


class Crops(NamedTuple):
    """What an autoencoder learns from."""

    side: int  # pixels
    pictures: int  # of a step
    varied: int  # how many of these are drawn in any look
    kl_weight: float  # of the KL divergence in the loss


AUTOENCODER = {
    "vae": Crops(side=64, pictures=8, varied=0, kl_weight=1e-6),
    "vae-more": Crops(side=128, pictures=4, varied=2, kl_weight=1e-7),
}


def train_autoencoder(folder: RecipeFolder, stage: str, stop: int | None = None) -> None:
    """The first stage begins with a new autoencoder, the second with the first one's result."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(folder.configs["base"].vae)
    identity: dict[str, object] = {"model": f"pocket {stage}", "scenes": folder.scenes}
    identity["pictures"] = AUTOENCODER[stage]
    if stage != "vae":
        vae.load_state_dict(folder.result("vae"))
        identity["learned from"] = folder.hashes("vae")
    vae.to(folder.device)
    pixels, _ = folder.pictures()

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        images = draw_crops(AUTOENCODER[stage], pixels, generator, folder.device)
        return autoencoder_loss(vae, images, AUTOENCODER[stage].kl_weight, generator)

    run = Run(vae, SETTINGS[stage], folder.path / stage, identity)
    if folder.train(stage, run, step_loss, stop):
        vae.load_state_dict(vae.state_dict() | run.averaged)
        normalise(vae, to_images(pixels[:NORMALISED_BY], folder.device))
        folder.write_result(stage, vae.state_dict())


def draw_crops(crops: Crops, pixels: Pixels, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random crops (b,3,side,side) in [-1,1] of random pictures, the first of them drawn again in a random look."""
    indices = torch.randint(len(pixels), (crops.pictures,), generator=generator).tolist()
    positions = (SIZE - crops.side) // GRID + 1
    corners = torch.randint(positions, (crops.pictures, 2), generator=generator) * GRID
    looks = torch.rand(crops.varied, 2, generator=generator).tolist()
    pictures = []
    for i, (pale, outline) in zip(indices, looks, strict=False):
        varied, _ = example(i, look=Look(0.6 * pale, 0.4 + 0.6 * outline))
        pictures.append(varied)
    pictures += [pixels[i] for i in indices[crops.varied :]]
    cut = []
    for picture, (top, left) in zip(pictures, corners.tolist(), strict=True):
        cut.append(picture[top : top + crops.side, left : left + crops.side])
    return to_images(np.stack(cut), device)


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Squared error of what pictures (b,3,H,W) decode to, and the KL divergence of their posterior (0-d)."""
    posterior = vae.encode(images)
    noise = draw_noise(posterior.mean.shape, generator).to(images.device)
    decoded = vae.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)
    terms = posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar  # (b,4,h,w)
    divergence = 0.5 * terms.sum(dim=(1, 2, 3)).mean()  # (b,4,h,w) -> (b,) -> 0-d
    return F.mse_loss(decoded, images) + kl_weight * divergence


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel mean 0 and standard deviation 1 after scaling, on pictures (n,3,H,W) in [-1,1].

    Folded into the 1x1 convolutions around the latents, exactly: pictures decode to what they did.
    """
    means = torch.cat([vae.encode(batch).mean for batch in images.split(AT_ONCE)])  # (n,4,h,w)
    mean = means.mean(dim=(0, 2, 3))  # (4,)
    spread = means.std(dim=(0, 2, 3)) * vae.config.scale_factor  # (4,)
    quant = vae.quant_conv
    post_quant = vae.post_quant_conv
    channels = vae.config.embed_dim
    assert quant.bias is not None
    assert post_quant.bias is not None
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / spread
    quant.bias[channels:] -= 2 * spread.log()  # the log-variances
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= spread[None, :, None, None]


def trained_autoencoder(folder: RecipeFolder) -> AutoencoderKL:
    """The last stage's result, for inference."""
    vae = AutoencoderKL(folder.configs["base"].vae)
    vae.load_state_dict(folder.result("vae-more"))
    return vae.to(folder.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_scenes(folder: RecipeFolder, stage: str) -> None:
    """Means of all scenes' latents (n,4,16,16), scaled, in float16; made again where the autoencoder is another."""
    vae = trained_autoencoder(folder)
    pixels, _ = folder.pictures()
    metadata = {"learned from": json.dumps(folder.hashes("vae-more"))}
    with suppress(InputError):
        if read_metadata(folder.result_path(stage)) == metadata:
            return
    latents = []
    for i in tqdm(range(0, folder.scenes, AT_ONCE), desc="latents", disable=None):
        posterior = vae.encode(to_images(pixels[i : i + AT_ONCE], folder.device))
        latents.append((posterior.mean * vae.config.scale_factor).half().cpu())
    folder.write_result(stage, {"latents": torch.cat(latents)}, metadata)
