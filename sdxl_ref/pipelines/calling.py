"""What every pipeline can do, of one model or of two: be called, show its progress, use adapters.

`steps(request)` is the algorithm, and each pipeline's own; `run` drains it, and the call is a drain with its result
packed as the ecosystem's pipelines pack it.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.config import Defaults, InputError, unknown
from sdxl_ref.diffusion.steps import Denoise, Step
from sdxl_ref.pipelines import recording
from sdxl_ref.pipelines.request import Prompt, Request

Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
MARKS = ("(", "<", "[", "{", "AND", "BREAK", "embedding:")  # of other tools' prompts
Steps = Generator[Step, None, Tensor]  # returns pictures (b,3,H,W) in [0,1], or latents (b,4,h,w)


class PipelineOutput(NamedTuple):
    """The result of a call."""

    images: Any  # as `output_type` says: PIL pictures, (b,H,W,3) array, (b,3,H,W) tensor, or latents (b,4,h,w)


class Elsewhere:
    """What an ordinary run does not ask of a pipeline: the function, property or classmethod of its name in a module.

    The module, of this package, is imported, here alone, when it is first asked for. Only a property can be set.
    """

    def __init__(self, module: str) -> None:
        self.module = f"sdxl_ref.pipelines.{module}"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: type) -> Any:
        return getattr(import_module(self.module), self.name).__get__(pipe, owner)

    def __set__(self, pipe: Any, value: Any) -> None:
        getattr(import_module(self.module), self.name).__set__(pipe, value)


class CallablePipeline:
    """The base class of all pipelines. `request_type` is what `steps` takes; the call takes its fields."""

    request_type: type[Any]
    plan_for: Callable[[Any, Defaults], Any]
    steps: Callable[[Any], Steps]
    decode: Callable[[Tensor], Tensor]
    defaults: Defaults  # how the model is run where a request leaves it open

    steered = Elsewhere("steering")
    mask_of = Elsewhere("masking")
    denoiser_in_parts = Elsewhere("apart")
    encode_apart = Elsewhere("apart")
    tiled_vae = Elsewhere("tiling")
    text_encoding = Elsewhere("prompts")
    own_embeds = Elsewhere("prompts")
    load_textual_inversion = Elsewhere("prompts")
    unload_textual_inversion = Elsewhere("prompts")
    pack = Elsewhere("packed")
    unpack = Elsewhere("packed")
    load_lora_weights = Elsewhere("adapting")
    set_adapters = Elsewhere("adapting")
    get_active_adapters = Elsewhere("adapting")
    unload_lora_weights = Elsewhere("adapting")
    components = Elsewhere("ecosystem")
    from_pipe = Elsewhere("ecosystem")
    save_pretrained = Elsewhere("saving")
    scheduler = Elsewhere("scheduler")

    def __init__(self) -> None:
        self.wrap_denoiser: Callable[[Denoise], Denoise] | None = None
        self._progress: dict[str, Any] = {"disable": None}  # None: not where standard error is no terminal

    def __init_subclass__(cls, **options: Any) -> None:
        """The call of a pipeline shows the fields of its request, with meanings and defaults."""
        super().__init_subclass__(**options)
        if "request_type" in vars(cls):
            cls.__call__ = _documented(CallablePipeline.__call__, cls.request_type)  # type: ignore[method-assign]

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        watermark: bool = False,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Make pictures: a request of the arguments, its steps under a progress bar, the result packed.

        Latents are scaled by 0.13025, in sigma space. `callback_on_step_end(pipeline, i, timestep, {"latents": x})` is
        called after each step, with the training step that it began at; it may return {"latents": …}, from which the
        run goes on, and set `pipeline._interrupt`, which ends it there. `watermark` puts the official code's invisible
        one into PIL pictures, which carry their settings in `info` (see `recording`). Returns a `PipelineOutput`, or a
        plain tuple without `return_dict`. TypeError for an unknown argument, InputError for a bad value.
        """
        request = self.request(prompt=prompt, **arguments)
        if watermark and request.output_type != "pil":
            raise InputError(f'a watermark goes into output_type "pil" only, found {request.output_type!r}')
        on_step = None
        if callback_on_step_end is not None or watermark:
            on_step = self.steered(request, callback_on_step_end, callback_on_step_end_tensor_inputs, watermark)
        settings = recording.settings(self, request, watermark) if request.output_type == "pil" else {}
        images: Any = self.run(request, on_step)
        settings |= {"interrupted": True} if self._interrupt else {}
        if request.output_type == "np":
            images = images.cpu().permute(0, 2, 3, 1).numpy()  # (b,3,h,w) -> (b,h,w,3)
        if request.output_type == "pil":
            images = recording.pictures(images, settings)
        return PipelineOutput(images) if return_dict else (images,)

    def plan(self, request: Any) -> Any:
        """What will run, known before anything does; its `grid`, and `str` says it in a line.

        InputError where nothing would.
        """
        return type(self).plan_for(request, self.defaults)

    def request(self, **arguments: Any) -> Any:
        """A request of a call's arguments. TypeError that names the nearest one where there is no such argument."""
        for name in arguments.keys() - {field.name for field in fields(self.request_type)}:
            known = inspect.signature(self.__call__).parameters
            raise TypeError(f"{type(self).__name__}: {unknown('argument', name, known)}")
        return self.request_type(**arguments)

    @torch.no_grad()
    def run(self, request: Request, on_step: Callable[[int, Step], None] | None = None) -> Tensor:
        """Drain the steps of a request under a progress bar.

        Returns pictures (b,3,H,W) in [0,1], or, where its `output_type` is "latent", latents (b,4,h,w).
        """
        prompts = f"{request.prompt}\n{request.prompt_2}\n{request.negative_prompt}\n{request.negative_prompt_2}"
        if request.prompt_syntax == "plain" and any(mark in prompts for mark in MARKS):
            from sdxl_ref.text.markup import note_markup  # other tools'

            note_markup(prompts)
        results: list[Tensor] = []
        self._interrupt = False  # a callback may set it: the run ends after that step

        def steps() -> Iterator[Step]:
            results.append((yield from self.steps(request)))

        total = len(self.plan(request).grid.timesteps)
        for i, step in enumerate(tqdm(steps(), total=total, **{"unit": "step", **self._progress})):
            if on_step is not None:
                on_step(i, step)
            if self._interrupt:
                return self.finished(request, step)
        return results[0]

    def finished(self, request: Request, step: Step, mask: Any = None) -> Tensor:
        """The result of the last step: outside a mask it is the picture's own."""
        x = step.x if mask is None else mask.kept(step.x, step.sigma)
        if request.output_type == "latent":
            return x
        return self.decode(x) if mask is None else mask.paste(self.decode(x))

    def wrapped(self, denoise: Denoise) -> Denoise:
        """The user's function around `denoise(x, sigma)`, if there is one."""
        return denoise if self.wrap_denoiser is None else self.wrap_denoiser(denoise)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm's bar: `disable=True` hides it."""
        self._progress |= options

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What else the ecosystem's code asks for by name: `other_calls` does it, or says what to do."""
            return import_module("sdxl_ref.pipelines.other_calls").answer(self, name)

    def models(self) -> Sequence[Any]:
        """The pipelines of one model each that this one is made of."""
        return [self]


def _documented(call: Callable[..., PipelineOutput], request_type: type[Request]) -> Callable[..., PipelineOutput]:
    """`call` with the fields of a request in its signature and its docstring."""

    @functools.wraps(call)
    def documented(self: Any, prompt: Prompt | None = None, **arguments: Any) -> PipelineOutput:
        return call(self, prompt, **arguments)

    itself, prompt, *others = inspect.signature(call).parameters.values()
    options = [field for field in fields(request_type) if field.name != prompt.name]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(o.name, kind, default=o.default, annotation=o.type) for o in options]
    lines = [f"{option.name} = {option.default!r}: {option.metadata['meaning']}" for option in options]
    own = [other for other in others if other.kind is inspect.Parameter.KEYWORD_ONLY]
    documented.__signature__ = inspect.Signature([itself, prompt, *parameters, *own])  # type: ignore[attr-defined]
    documented.__doc__ = "\n".join([inspect.getdoc(call) or "", "", *lines])
    return documented
