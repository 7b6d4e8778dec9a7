"""Other implementations, built live on our weights, and what their modules are called in ours.

diffusers and transformers are imported where one of theirs is built: they are wanted for a comparison alone.
Names are translated by `sdxl_ref.weights.layouts`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl_ref.networks.clip_l import CLIPTextEncoder
from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.text.tokenizer import merges, tokens
from sdxl_ref.weights import layouts

MAKERS = {  # of the peer of each part
    "unet": "diffusers_unet",
    "vae": "diffusers_vae",
    "text_encoder": "transformers_clip",
    "text_encoder_2": "transformers_openclip",
}


def names_of(part: str, network: Any) -> dict[str, str]:
    """What modules are called in diffusers' or transformers' network of a part -> the official name in ours.

    Modules that have no weights and no counterpart are left out; the root is "".
    """
    official = [name for name, _ in network.named_modules() if name]
    if part == "text_encoder":
        return {"": ""} | {name.removeprefix(prefix): name for prefix in ("text_model.", "") for name in official}
    if part == "text_encoder_2":
        return openclip_names(network.config.layers)
    modules = layouts.unet_modules(network.config) if part == "unet" else layouts.vae_modules(network.config)
    rename = layouts.renamer(modules)
    names = {"": ""} if part == "unet" else {"encoder": "encoder", "decoder": "decoder"}
    for name in official:
        try:
            names[rename(name)] = name
        except InputError:  # a module without weights, or one that only groups others
            continue
    return names | {_parent(theirs): group for group, theirs in grouping(part, modules).items()}


def caller(network: Any, part: str) -> Any:
    """A function of our network's inputs, whoever's network it is; of a VAE an object with `encode` and `decode`."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return lambda x, t, context, y: call_diffusers_unet(network, x, t, context, y)
    if kind == "TextTransformer":
        return lambda tokens: call_openclip_tower(network, tokens)
    if kind.startswith("CLIPTextModel") and hasattr(network, "config") and hasattr(network.config, "hidden_act"):

        def tower(tokens: Tensor) -> Any:
            output = network(tokens, output_hidden_states=True)
            hidden = output.hidden_states[-2]
            return (hidden, output.text_embeds) if part == "text_encoder_2" else hidden

        return tower
    return _Autoencoder(network) if part == "vae" else network


class _Autoencoder:
    """Ours or diffusers': pictures -> mean and log variance, latents -> pictures."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.network.encode(images)
        posterior = getattr(posterior, "latent_dist", posterior)
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        decoded = self.network.decode(latents)
        return getattr(decoded, "sample", decoded)


def grouping(part: str, modules: Any) -> dict[str, str]:
    """Official modules that group others, each with what one of those is called elsewhere."""
    if part == "unet":
        leaves = {
            name.removesuffix(".in_layers.0"): theirs
            for name, theirs in modules.items()
            if name.endswith(".in_layers.0")
        }
        leaves |= {name.removesuffix(".conv"): theirs for name, theirs in modules.items() if name.endswith(".conv")}
        return leaves | {name: modules[f"{name}.0"] for name in ("time_embed", "label_emb.0")}
    leaves = {name.removesuffix(".norm"): theirs for name, theirs in modules.items() if name.endswith("attn_1.norm")}
    samplers = (".upsample.conv", ".downsample.conv")
    return leaves | {name.removesuffix(".conv"): theirs for name, theirs in modules.items() if name.endswith(samplers)}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def openclip_names(layers: int) -> dict[str, str]:
    """transformers' `CLIPTextModelWithProjection` -> open_clip's names, which are the official ones."""
    names = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection": ":out.1",  # of the whole tower
    }
    inside = {"": "", **layouts.OPENCLIP_BLOCK, "attn": "self_attn", "mlp": "mlp", "mlp.gelu": "mlp.activation_fn"}
    for i in range(layers):
        for ours, theirs in inside.items():
            name = f"text_model.encoder.layers.{i}.{theirs}".removesuffix(".")
            names[name] = f"transformer.resblocks.{i}.{ours}".removesuffix(".")
    return names


def translate(part: layouts.Part, module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return layouts.to_other(layouts.rules(part, state, getattr(module, "config", None)), state)


def load(peer: nn.Module, state: dict[str, Tensor]) -> Any:
    """Load strictly and give the peer the state's dtype."""
    peer.load_state_dict(state, strict=True, assign=True)
    return peer.eval().requires_grad_(False)


def diffusers_unet(unet: UNet) -> Any:
    from diffusers import UNet2DConditionModel

    return load(unet2d(unet.config, UNet2DConditionModel), translate("unet", unet))


def unet2d(c: UNetConfig, cls: Any) -> Any:
    levels = range(len(c.channel_mult))
    widths = tuple(c.model_channels * m for m in c.channel_mult)
    with torch.device("meta"):
        return cls(
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            block_out_channels=widths,
            layers_per_block=c.num_res_blocks,
            down_block_types=tuple("CrossAttnDownBlock2D" if c.has_attention(i) else "DownBlock2D" for i in levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if c.has_attention(i) else "UpBlock2D" for i in reversed(levels)),
            attention_head_dim=tuple(w // c.num_head_channels for w in widths),  # diffusers means the number of heads
            transformer_layers_per_block=c.transformer_depth,
            cross_attention_dim=c.context_dim,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=c.adm_in_channels,
        )


def call_diffusers_unet(peer: Any, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
    """Our call on diffusers' UNet: `y` is handed in whole, in place of its own embedding of the size numbers."""
    peer.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: peer.add_embedding(y)
    return peer(x, t, encoder_hidden_states=context, return_dict=False)[0]


def diffusers_vae(vae: AutoencoderKL) -> Any:
    return load(vae2d(vae.config), translate("vae", vae))


def vae2d(c: VAEConfig) -> Any:
    from diffusers import AutoencoderKL as Peer

    levels = len(c.ch_mult)
    with torch.device("meta"):
        return Peer(  # type: ignore[no-untyped-call]
            in_channels=c.in_channels,
            out_channels=c.out_ch,
            block_out_channels=tuple(c.ch * m for m in c.ch_mult),
            layers_per_block=c.num_res_blocks,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=c.z_channels,
            scaling_factor=c.scale_factor,
            force_upcast=True,
        )


def clip_text_config(c: TextEncoderConfig, pad: int = 0) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=4 * c.width,
        projection_dim=c.embed_dim,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        hidden_act=c.activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=pad,
    )


def transformers_openclip(encoder: OpenCLIPTextEncoder) -> Any:
    from transformers import CLIPTextModelWithProjection

    peer: Any = CLIPTextModelWithProjection(clip_text_config(encoder.config))
    state = {k: v.clone() for k, v in translate("openclip_g", encoder).items()}
    return load(peer.to(next(iter(state.values())).dtype), state)


def openclip_tower(encoder: OpenCLIPTextEncoder) -> Any:
    """open_clip's own `TextTransformer`, whose names are the official ones."""
    from open_clip.transformer import TextTransformer

    c = encoder.config
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name != "logit_scale"}
    peer: Any = TextTransformer(
        vocab_size=c.vocab_size, width=c.width, heads=c.heads, layers=c.layers, output_dim=c.embed_dim
    )
    return load(peer, state)


def call_openclip_tower(peer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Our call on open_clip's tower: the state before the last block, as the official embedder takes it, and pooled."""
    hidden: list[Tensor] = []
    hook = peer.transformer.resblocks[-2].register_forward_hook(lambda block, args, output: hidden.append(output))
    try:
        pooled = peer(tokens)
    finally:
        hook.remove()
    return hidden[0], pooled


def transformers_clip(encoder: CLIPTextEncoder) -> Any:
    """transformers' `CLIPTextModel`, which since version 5 has no `text_model.` in its names."""
    from transformers import CLIPTextModel

    state = encoder.state_dict()
    peer: Any = CLIPTextModel(clip_text_config(encoder.config, pad=49407))
    peer = peer.to(next(iter(state.values())).dtype)
    prefixed = all(key.startswith("text_model.") for key in peer.state_dict())
    return load(peer, {k if prefixed else k.removeprefix("text_model."): v.clone() for k, v in state.items()})


def clip_tokenizer(folder: Path, pad: str) -> Any:
    """transformers' CLIP tokenizer on CLIP's vocabulary; pad "!" (id 0) or "<|endoftext|>"."""
    from transformers import CLIPTokenizer

    words = [*list(tokens().values())[:-2], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges())]))
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
