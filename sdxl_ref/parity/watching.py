"""Where a run can be watched, and what it computed be exchanged: at its modules, and at the steps between them.

A `Watcher` sees every value under its key, in the order of completion, and returns the value that the run goes on
with: the same, or another implementation's. Nothing of this is left when the block ends, and a run that is only watched
is the same to the bit.

Besides the modules of the networks (`unet/…`, `vae/…`, `text_encoder/…`, `text_encoder_2/…`), of compiled ones the
outermost alone, these are the points:

    tokens/text_encoder_2             ids (b,77): the negative side first, then the positive one
    conditioning/numbers              sizes, crops, score (b,k), negative side first; pooled, context and y likewise
    posterior/mean, posterior/logvar  of each picture; latents/picture: the sample, scaled
    noise                             every draw, in order: noise, noise#1, …
    schedule/sigmas, schedule/timesteps
    denoiser/x, denoiser/sigma        what the sampler asks, evaluation by evaluation: denoiser/x, denoiser/x#1, …
    denoiser/denoised                 and the answer, guided
    sampler/0, sampler/1, …           x after each step
    latents, picture                  the result

What a UNet is handed are its inputs: unet:in.0 is x scaled, in.1 the timesteps, in.2 the context, in.3 y. Of an
ensemble the refiner's points begin with `refiner/`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdxl_ref.diffusion.denoiser import Conditioning
from sdxl_ref.parity.trace import Key
from sdxl_ref.weights.checkpoint import PARTS

Show = Callable[[str, Tensor], Tensor]


class Watcher(Protocol):
    def enters(self, point: str) -> None:
        """A module begins."""

    def handed(self, key: Key, value: Tensor) -> Tensor:
        """It was handed a tensor; it goes on with the one that is returned."""

    def returned(self, key: Key, value: Tensor) -> Tensor:
        """It returned a tensor, or a step between the modules did; the run goes on with the one that is returned."""

    def leaves(self, point: str) -> None:
        """It has ended, and its outputs were shown."""


class Calls:
    """How often a point has been passed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def next(self, point: str) -> int:
        self.counts[point] = self.counts.get(point, -1) + 1
        return self.counts[point]


def shown_to(watcher: Watcher) -> Show:
    """A function that shows a watcher the values of steps between the modules, and returns those to go on with."""
    calls = Calls()
    return lambda point, value: watcher.returned(Key(point, calls.next(point)), value)


@contextmanager
def watched_network(
    network: nn.Module, part: str, watcher: Watcher, names: dict[str, str] | None = None
) -> Iterator[None]:
    """Watch every module of a network, under its own name, or those of `names` (own name -> official) alone."""
    calls = Calls()
    running: list[int] = []
    handles = []

    def before(point: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = calls.next(point)
            running.append(call)
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            others = [watcher.handed(Key(point, call, f"in.{i}"), value) for i, value in enumerate(values)]
            watcher.enters(point)
            exchange = {id(value): other for value, other in zip(values, others, strict=True)}
            return (
                tuple(exchange.get(id(value), value) for value in args),
                {name: exchange.get(id(value), value) for name, value in kwargs.items()},
            )

        return hook

    def after(point: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = running.pop()
            if isinstance(output, Tensor):
                output = watcher.returned(Key(point, call), output)
            elif isinstance(output, tuple) and all(isinstance(value, Tensor) for value in output):
                values = (watcher.returned(Key(point, call, f"out.{i}"), value) for i, value in enumerate(output))
                output = tuple(values)
            watcher.leaves(point)
            return output

        return hook

    stack = ExitStack()
    compiled: list[str] = []
    for name, module in network.named_modules():
        if (names is not None and name not in names) or name.startswith(tuple(compiled)):
            continue
        official = name if names is None else names[name]
        if official.startswith(":"):  # a result of the whole network
            value = official[1:]
            shown = lambda _, args, output, value=value: watcher.returned(Key(part, calls.next(value), value), output)  # noqa: E731
            handles.append(module.register_forward_hook(shown))
            continue
        point = f"{part}/{official}" if official else part
        if is_compiled(module):  # one graph, which has no modules inside
            compiled.append(f"{name}." if name else "")
            stack.enter_context(_watched_graph(module, before(point), after(point)))
            continue
        handles.append(module.register_forward_pre_hook(before(point), with_kwargs=True))
        handles.append(module.register_forward_hook(after(point)))
    with stack:
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def is_compiled(module: nn.Module) -> bool:
    """Whether it runs as the graph that `Module.compile` makes of it."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _watched_graph(module: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """A compiled module from outside: hooks on it would be compiled too."""
    graph = module._compiled_call_impl

    def watched_call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(module, args, kwargs)
        return after(module, args, graph(*args, **kwargs))

    with replaced(module, "_compiled_call_impl", watched_call):
        yield


@contextmanager
def watched(pipe: Any, watcher: Watcher) -> Iterator[None]:
    """Watch a pipeline: all its networks, and the steps between them."""
    show = shown_to(watcher)
    with ExitStack() as stack:
        seen: set[int] = set()
        for prefix, model in zip(("", "refiner/"), pipe.models(), strict=False):
            for part in PARTS:
                network = getattr(model, part)
                if network is not None and id(network) not in seen:
                    seen.add(id(network))
                    stack.enter_context(watched_network(network, prefix + part, watcher))
            stack.enter_context(_watched_model(model, prefix, show))
        stack.enter_context(replaced(pipe, "steps", _steps(pipe.steps, pipe, show)))
        wrap = pipe.wrap_denoiser
        stack.enter_context(
            replaced(pipe, "wrap_denoiser", lambda denoise: _asked(wrap(denoise) if wrap else denoise, show))
        )
        stack.enter_context(Draws(show))
        yield


@contextmanager
def _watched_model(model: Any, prefix: str, show: Show) -> Iterator[None]:
    """What one model does between its networks: tokens go into a tower, and conditioning comes of it."""
    condition, encode, encode_image, sizes = model.condition, model.vae.encode, model.encode_image, model.sizes

    def conditioned(request: Any, text: Any, size: Any) -> Conditioning:
        positive, negative = (numbers.tensor(model.config.kind) for numbers in sizes(request, size))
        count = len(text.pooled_prompt_embeds)
        sides = [positive] if text.negative_prompt_embeds is None else [negative, positive]
        show(f"{prefix}conditioning/numbers", torch.cat([side.repeat(count, 1) for side in sides]))
        made = condition(request, text, size)
        width = made.y.shape[1] - 256 * len(positive)
        show(f"{prefix}conditioning/pooled", made.y[:, :width])
        context = show(f"{prefix}conditioning/context", made.context)
        return Conditioning(context, show(f"{prefix}conditioning/y", made.y))

    def encoded(images: Tensor) -> Any:
        posterior = encode(images)
        mean, logvar = show("posterior/mean", posterior.mean), show("posterior/logvar", posterior.logvar)
        return type(posterior)(mean, logvar)

    with ExitStack() as stack:
        stack.enter_context(replaced(model, "condition", conditioned))
        if not prefix:  # the refiner of an ensemble uses the base's
            stack.enter_context(replaced(model.vae, "encode", encoded))
        sampled = lambda *args, **options: show("latents/picture", encode_image(*args, **options))  # noqa: E731
        stack.enter_context(replaced(model, "encode_image", sampled))
        yield


def _steps(steps: Callable[[Any], Any], pipe: Any, show: Show) -> Callable[[Any], Any]:
    def shown(request: Any) -> Any:
        plan = pipe.plan(request)
        sigmas = show("schedule/sigmas", plan.grid.sigmas)
        timesteps = show("schedule/timesteps", torch.tensor(plan.grid.timesteps, dtype=torch.float64))
        grid = replace(plan.grid, sigmas=sigmas, timesteps=tuple(timesteps.tolist()))
        with replaced(pipe, "plan", lambda _: plan._replace(grid=grid)):
            result = yield from _shown_steps(steps(request), show)
        return show("latents" if request.output_type == "latent" else "picture", result)

    return shown


def _shown_steps(running: Any, show: Show) -> Any:
    """The steps of a run, each shown; the sampler goes on from what is written into x."""
    for i in count():
        try:
            step = next(running)
        except StopIteration as end:
            return end.value
        other = show(f"sampler/{i}", step.x)
        if other is not step.x:
            step.x.copy_(other)
        yield step


def _asked(denoise: Callable[[Tensor, Tensor], Tensor], show: Show) -> Any:
    def asked(x: Tensor, sigma: Tensor) -> Tensor:
        return show("denoiser/denoised", denoise(show("denoiser/x", x), show("denoiser/sigma", sigma)))

    return asked


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute on one object, which has its own or its class's again afterwards."""
    own = vars(owner).get(name)
    is_own = name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)


class Draws(TorchFunctionMode):
    """Shows what `torch.randn` draws."""

    def __init__(self, show: Show) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        return self.show("noise", drawn) if func is torch.randn else drawn
