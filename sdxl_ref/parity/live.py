"""A live peer beside ours: `sdxl-ref parity run --against diffusers`, or against a function of a file of one's own.

Component by component, so that one network of each side is in memory at a time; then, for "pipeline" and "sampler",
a short run of diffusers' own pipeline on a kit's request.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.parity import peers
from sdxl_ref.parity.kit import SEED, Kit, copy_in
from sdxl_ref.parity.recording import Recorder
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.watching import Draws, Show, Watcher, replaced, shown_to, watched_network
from sdxl_ref.weights.checkpoint import PARTS

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def diffusers_pipeline(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' pipeline of a model, on our weights."""
    is_base = pipe.config.kind == "base"
    parts = {part: peer_of(getattr(pipe, part), part, dtype) for part in PARTS if part != "vae"}
    parts["vae"] = getattr(peers, peers.MAKERS["vae"])(copy_in(pipe.vae, dtype))  # it widens float16 by itself
    name = "StableDiffusionXLPipeline" if is_base else "StableDiffusionXLImg2ImgPipeline"
    own = {} if is_base else {"requires_aesthetics_score": True}
    tokenizers = {"tokenizer": tokenizer("<|endoftext|>") if is_base else None, "tokenizer_2": tokenizer("!")}
    return assembled(
        name, "EulerDiscreteScheduler", {"timestep_spacing": "leading"}, is_base, **parts, **tokenizers, **own
    )


def assembled(name: str, scheduler: str, options: Mapping[str, Any], is_base: bool, **parts: Any) -> Any:
    """diffusers' pipeline of this name, as it ships with SDXL, of given parts; `options` are its scheduler's."""
    import diffusers

    made = getattr(diffusers, name)(
        **parts,
        scheduler=getattr(diffusers, scheduler)(**SCHEDULE, **options),
        force_zeros_for_empty_prompt=is_base,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def peer_of(network: nn.Module | None, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' or transformers' network of a part, on our weights."""
    if network is None:
        return None
    wanted = torch.float32 if part == "vae" and dtype == torch.float16 else dtype
    is_there = next(network.parameters()).dtype == wanted
    return getattr(peers, peers.MAKERS[part])(network if is_there else copy_in(network, wanted))


def tokenizer(pad: str) -> Any:
    with TemporaryDirectory() as folder:
        return peers.clip_tokenizer(Path(folder), pad)


def recorded(peer: Any, pipe: Any, kit: Kit) -> Trace:
    """The trace of diffusers' pipeline on a kit's request, under official names."""
    recorder = Recorder()
    request = kit.request(pipe)
    names = [*kit.settings["request"], "image"]
    arguments = {name: getattr(request, name) for name in names if getattr(request, name, None) is not None}
    with watched_peer(peer, pipe, recorder):
        images = peer(**arguments, generator=torch.Generator().manual_seed(SEED)).images
    recorder.returned(Key("picture"), images)
    return recorder.trace


@contextmanager
def watched_peer(peer: Any, pipe: Any, watcher: Watcher) -> Iterator[None]:
    """Watch a pipeline of diffusers: its networks, its scheduler, what it draws."""
    show = shown_to(watcher)
    with ExitStack() as stack:
        for part in PARTS:
            network = getattr(pipe, part)
            if network is not None:
                theirs = getattr(peer, part)
                own = {name for name, _ in theirs.named_modules()}
                names = {name: other for name, other in peers.names_of(part, network).items() if name in own}
                stack.enter_context(watched_network(theirs, part, watcher, names))
        stack.enter_context(Draws(show))
        stack.enter_context(watched_scheduler(peer.scheduler, show))
        stack.enter_context(watched_encode(peer.vae, show))
        yield


@contextmanager
def watched_scheduler(scheduler: Any, show: Show) -> Iterator[None]:
    """What a step is asked and answers; Euler's x is in sigma space, as ours."""
    step, add_noise = scheduler.step, scheduler.add_noise
    count = 0

    def noised(original_samples: Tensor, *args: Any, **options: Any) -> Any:
        show("latents/picture", original_samples)
        return add_noise(original_samples, *args, **options)

    def shown(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal count
        if count == 0:
            first = scheduler.begin_index or 0
            show("schedule/sigmas", scheduler.sigmas[first:])
            show("schedule/timesteps", scheduler.timesteps[first:].double())
        show("denoiser/x", sample)
        options["return_dict"] = True
        output = step(model_output, timestep, sample, *args, **options)
        show("denoiser/denoised", output.pred_original_sample)
        show(f"sampler/{count}", output.prev_sample)
        count += 1
        return (output.prev_sample,)

    with replaced(scheduler, "step", shown), replaced(scheduler, "add_noise", noised):
        yield


@contextmanager
def watched_encode(vae: Any, show: Show) -> Iterator[None]:
    encode = vae.encode

    def shown(images: Tensor, *args: Any, **options: Any) -> Any:
        output = encode(images, *args, **options)
        show("posterior/mean", output.latent_dist.mean)
        show("posterior/logvar", output.latent_dist.logvar)
        return output

    with replaced(vae, "encode", shown):
        yield


def function_of(text: str) -> Callable[[str, nn.Module], Any]:
    """`FILE.py:function`: a function of a part's name and our network of it, which returns the other one.

    InputError where there is none.
    """
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location("candidate", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"expected diffusers, or FILE.py:function, found {text!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of anybody's code
        raise InputError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{file} has no function {name!r}")
    return function
