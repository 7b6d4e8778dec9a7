"""The configuration that the file of a small model states in its metadata, as JSON, and whether its parts fit.

Loaded for such files: those of official sizes state none.
"""

import dataclasses
import json

from sdxl_ref.config import InputError, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

MOST_BLOCKS = 1000
NUMBERS = {1: 5, 2: 6}  # text encoders -> numbers that the UNet reads besides, each embedded in 256 channels


def config_to_json(config: ModelConfig) -> str:
    """What a file's metadata carries of a model; `prediction` is omitted where it is "epsilon"."""
    fields = dataclasses.asdict(config)
    if config.prediction == "epsilon":
        del fields["prediction"]
    return json.dumps(fields)


def config_from_json(text: str) -> ModelConfig:
    """The inverse of `config_to_json`. InputError where the text is no such configuration."""
    try:
        fields = json.loads(text, object_hook=_with_tuples)
        encoders = tuple(TextEncoderConfig(**encoder) for encoder in fields.pop("text_encoders"))
        unet = UNetConfig(**fields.pop("unet"))
        vae = VAEConfig(**fields.pop("vae"))
        return checked_depth(ModelConfig(unet, encoders, vae, **fields))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"expected a configuration written by sdxl_ref, found {text[:60]!r} ({error})") from error


def checked_depth(config: ModelConfig) -> ModelConfig:
    """The configuration itself; InputError for one of so many blocks that a few words would take all memory."""
    unet_blocks = config.unet.num_res_blocks * sum(depth + 1 for depth in config.unet.depths)
    vae_blocks = config.vae.num_res_blocks * len(config.vae.ch_mult)
    blocks = max(unet_blocks, vae_blocks, *(text.layers for text in config.text_encoders))
    if blocks > MOST_BLOCKS:
        raise InputError(f"expected networks of at most {MOST_BLOCKS} blocks, found {blocks}")
    return config


def _with_tuples(fields: dict[str, object]) -> dict[str, object]:
    """JSON has lists where a configuration has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def misfit(config: ModelConfig) -> str:
    """What does not fit, in words; empty where each part gives what the next one reads, and reads what it is given.

    A pipeline gives token ids, pictures of three channels and latents of four.
    """
    unet, vae, towers = config.unet, config.vae, config.text_encoders
    if len(towers) not in NUMBERS:
        return f"text encoders: expected one (a refiner) or two (a base), found {len(towers)}"
    sizes: dict[str, tuple[object, object]] = {  # as found, as expected
        "channels into and out of the UNet": ((unet.in_channels, unet.out_channels), (4, 4)),
        "channels of the VAE": ((vae.embed_dim, vae.in_channels, vae.out_ch), (4, 3, 3)),
        "width of the text context": (unet.context_dim, sum(tower.width for tower in towers)),
        "width of the vector": (unet.adm_in_channels, towers[-1].embed_dim + 256 * NUMBERS[len(towers)]),
        "vocabularies": ({tower.vocab_size for tower in towers}, {49408}),
        "context lengths": ({tower.context_length for tower in towers}, {77}),
    }
    unlike = {what: pair for what, pair in sizes.items() if pair[0] != pair[1]}
    return "; ".join(f"{what}: expected {right}, found {found}" for what, (found, right) in unlike.items())
