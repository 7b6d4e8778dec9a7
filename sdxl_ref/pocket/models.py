"""The pocket pair's sizes: SDXL's own architecture by configuration alone."""

from dataclasses import replace

import torch
from torch import nn

from sdxl_ref.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.networks.unet import ResBlock, SpatialTransformer, UNet

OPENCLIP = TextEncoderConfig(width=32, heads=2, layers=4, embed_dim=64)
CLIP = TextEncoderConfig(width=32, heads=2, layers=3, embed_dim=32, activation="quick_gelu")
BASE = ModelConfig(
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=64,
        num_res_blocks=2,
        channel_mult=(1, 1, 2),
        attention_resolutions=(4, 2),
        num_head_channels=32,
        transformer_depth=1,
        context_dim=CLIP.width + OPENCLIP.width,
        adm_in_channels=OPENCLIP.embed_dim + 6 * 256,
    ),
    text_encoders=(CLIP, OPENCLIP),
    vae=VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    resolution=128,
)
REFINER = replace(
    BASE,
    unet=replace(
        BASE.unet, channel_mult=(1, 1, 1, 2), context_dim=OPENCLIP.width, adm_in_channels=OPENCLIP.embed_dim + 5 * 256
    ),
    text_encoders=(OPENCLIP,),
)
CONFIGS = {"base": BASE, "refiner": REFINER}


@torch.no_grad()
def zero_residuals(unet: UNet) -> UNet:
    """Zero the last layer of each residual branch, as the official code does: the UNet begins as the identity."""
    layers: list[nn.Module] = [unet.out[-1]]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            layers.append(module.out_layers[-1])
        elif isinstance(module, SpatialTransformer):
            layers.append(module.proj_out)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
    return unet
