"""Read the sizes of an SDXL-like model from the shapes of its tensors, and say where shapes do not fit.

Shapes tell everything but the number of attention heads, for which 64 channels a head are assumed, as in all
official models. Loaded only for files that are not simply official.
"""

from collections.abc import Mapping

from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

HEAD = 64
Shapes = Mapping[str, tuple[int, ...]]


def config_from_shapes(shapes: Shapes) -> ModelConfig:
    """Keys and shapes of a checkpoint -> its configuration; InputError where they cannot be an SDXL model's.

    Where there is no VAE, its configuration is the official one's.
    """
    try:
        encoders = tuple(
            text_config(_below(shapes, f"conditioner.embedders.{i}.")) for i in range(_text_encoders(shapes))
        )
        unet = unet_config(_below(shapes, "model.diffusion_model."))
        vae = _below(shapes, "first_stage_model.")
        return ModelConfig(unet, encoders, vae_config(vae) if vae else VAEConfig())
    except KeyError as error:
        raise InputError(f"expected an SDXL checkpoint in the official layout, found no {error.args[0]}") from error
    except (IndexError, InputError) as error:
        raise InputError(
            f"the shapes do not tell the sizes: put them into the metadata, sdxl_ref.config ({error})"
        ) from error


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered children stand below a path."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})


def _heads(width: int) -> int:
    if width % HEAD:
        raise InputError(f"an attention of width {width} has no heads of {HEAD} channels")
    return width // HEAD


def unet_config(shapes: Shapes) -> UNetConfig:
    """Shapes of a UNet in official names -> its configuration."""
    width = shapes["input_blocks.0.0.weight"][0]
    levels: list[list[tuple[int, int]]] = [[]]  # per ResBlock: channels, transformer depth
    context_dim = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    for i in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            channels = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
            levels[-1].append((channels, _count(shapes, f"input_blocks.{i}.1.transformer_blocks.")))
    middle = _count(shapes, "middle_block.1.transformer_blocks.")
    depths = [level[0][1] for level in levels]
    for channels, depth in (level[0] for level in levels):
        if depth:
            _heads(channels)
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        num_res_blocks=len(levels[0]),
        channel_mult=tuple(level[0][0] // width for level in levels),
        attention_resolutions=tuple(2**i for i, depth in enumerate(depths) if depth),
        num_head_channels=HEAD,
        transformer_depth=(*(depth or 1 for depth in depths[:-1]), middle),
        context_dim=context_dim,
        adm_in_channels=shapes["label_emb.0.0.weight"][1],
    )


def _text_encoders(shapes: Shapes) -> int:
    return _count(shapes, "conditioner.embedders.")


def text_config(shapes: Shapes) -> TextEncoderConfig:
    """Shapes of a text encoder, by what its official names are behind `conditioner.embedders.N.`."""
    if "model.token_embedding.weight" in shapes:  # OpenCLIP
        vocab, width = shapes["model.token_embedding.weight"]
        layers = _count(shapes, "model.transformer.resblocks.")
        embed_dim = shapes["model.text_projection"][1]
        context_length = shapes["model.positional_embedding"][0]
        return TextEncoderConfig(width, _heads(width), layers, embed_dim, "gelu", vocab, context_length)
    clip = _below(shapes, "transformer.text_model.")
    vocab, width = clip["embeddings.token_embedding.weight"]
    context_length = clip["embeddings.position_embedding.weight"][0]
    layers = _count(clip, "encoder.layers.")
    return TextEncoderConfig(width, _heads(width), layers, width, "quick_gelu", vocab, context_length)


def vae_config(shapes: Shapes) -> VAEConfig:
    """Shapes of an autoencoder in official names -> its configuration, with SDXL's scale of latents."""
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = _count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return VAEConfig(
        ch=ch,
        ch_mult=tuple(w // ch for w in widths),
        num_res_blocks=_count(shapes, "encoder.down.0.block."),
        z_channels=shapes["post_quant_conv.weight"][0],
        embed_dim=shapes["post_quant_conv.weight"][1],
        in_channels=in_channels,
        out_ch=shapes["decoder.conv_out.weight"][0],
    )
