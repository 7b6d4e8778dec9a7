"""Calls that the ecosystem's code makes and that pipelines here do not need, or do not have, by their names.

Loaded when a pipeline is asked for a name that it does not have.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sdxl_ref.config import nearest
from sdxl_ref.pipelines.ecosystem import enable_model_cpu_offload, enable_sequential_cpu_offload

ATTENTION = "attention here is PyTorch's scaled_dot_product_attention, which makes no map of all pairs"
ONE_PICTURE = "pictures are decoded one at a time as it is"
NOT_NEEDED = {  # calls that would change nothing: why
    "enable_attention_slicing": ATTENTION,
    "disable_attention_slicing": ATTENTION,
    "enable_xformers_memory_efficient_attention": ATTENTION,
    "disable_xformers_memory_efficient_attention": ATTENTION,
    "enable_vae_slicing": ONE_PICTURE,
    "disable_vae_slicing": ONE_PICTURE,
    "maybe_free_model_hooks": "the last network goes when the next one comes",
}
LORA = "give each adapter its weight with set_adapters(names, weights), where 0 turns it off"
MERGE = "an active adapter is in the weights already; `weights-convert lora merge` writes them to a file"
INSTEAD = {  # what there is not: what to do
    "tokenizer": "use sdxl_ref.tokenize(texts), CLIP's vocabulary for both towers",
    "tokenizer_2": "use sdxl_ref.tokenize(texts), CLIP's vocabulary for both towers",
    "image_processor": "hand pictures, arrays or tensors to the call, and name its output_type",
    "watermark": "the call takes watermark=True, and puts none in without",
    "prepare_latents": "give latents= to the call, or see `steps` (`for step in pipe.steps(request)`)",
    "prepare_ip_adapter_image_embeds": "IP-Adapters are not supported",
    "load_ip_adapter": "IP-Adapters are not supported",
    "set_ip_adapter_scale": "IP-Adapters are not supported",
    "enable_freeu": "FreeU is not built in: scale the skips in forward hooks on pipe.unet.output_blocks",
    "disable_freeu": "FreeU is not built in: there is nothing to turn off",
    "fuse_qkv_projections": "call pipe.pack() on a CPU, which computes q, k and v together",
    "fuse_lora": MERGE,
    "unfuse_lora": "call unload_lora_weights(), which gives the weights back bit for bit",
    "disable_lora": LORA,
    "enable_lora": LORA,
    "delete_adapters": "call unload_lora_weights(), then load those to keep",
    "remove_all_hooks": "open the pipeline again without the offload",
    "reset_device_map": "open the pipeline again with device=",
    "interrupt": "set pipe._interrupt = True in callback_on_step_end to end a run",
}


def answer(pipe: Any, name: str) -> Any:
    """What a pipeline has under a name that is not its own. AttributeError says what to do where it has none."""
    if name in NOT_NEEDED:
        return partial(note_not_needed, name)
    if name in CALLS:
        return partial(CALLS[name], pipe)
    kind = type(pipe).__name__
    if name in INSTEAD:
        raise AttributeError(f"{kind} has no {name}: {INSTEAD[name]}")
    public = [known for known in dir(pipe) if not known.startswith("_")]
    hint = "" if name.startswith("_") else nearest(name, [*public, *CALLS, *NOT_NEEDED])
    raise AttributeError(f"{kind} has no {name}{hint}")


def note_not_needed(name: str, *_: Any, **__: Any) -> None:
    """A warning that a call changes nothing, and why."""
    warnings.warn(f"{name} is not needed and changes nothing: {NOT_NEEDED[name]}", stacklevel=2)


def upcast_vae(pipe: Any) -> None:
    """Have the VAE in float32, in which it does not overflow: as it is unless `vae_dtype` said otherwise."""
    for model in pipe.models():
        model.vae.to(dtype=torch.float32)


def enable_vae_tiling(pipe: Any) -> None:
    """Have the VAE work by tiles, for large pictures in little memory."""
    for model in pipe.models():
        model.tiles_vae = True


def disable_vae_tiling(pipe: Any) -> None:
    """Have the VAE work on whole pictures."""
    for model in pipe.models():
        model.tiles_vae = False


OFFLOADS = (enable_model_cpu_offload, enable_sequential_cpu_offload)
CALLS: dict[str, Callable[..., None]] = {
    call.__name__: call for call in (upcast_vae, enable_vae_tiling, disable_vae_tiling, *OFFLOADS)
}
