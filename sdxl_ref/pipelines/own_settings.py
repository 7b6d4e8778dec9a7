"""A request to a model whose folder says how it is run, or with levels of its own. Loaded for such a one."""

from dataclasses import replace
from typing import Any

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion import own_levels


def completed(request: Any, defaults: Defaults) -> Any:
    """With the model's settings where the request says nothing. InputError where they cannot be had here."""
    if request.has_own_levels:
        return own_levels.completed(request, defaults)
    if defaults.refusal and None in (request.sampler, request.spacing):
        raise InputError(f"{defaults.refusal}: name the sampler and the spacing to use in its place")
    spacing = request.spacing
    karras = request.karras
    if isinstance(defaults.spacing, str):  # also where the sampler is refused: then the request names both
        spacing = defaults.spacing if spacing is None else spacing
        karras = defaults.karras if karras is None else karras
    elif spacing is None or isinstance(spacing, str):
        spacing = defaults.spacing.changed(spacing, karras)
    if not isinstance(spacing, str):
        karras = spacing.karras
    return replace(request, sampler=request.sampler or defaults.sampler, spacing=spacing, karras=bool(karras))


STEPPING = ("sampler", "spacing", "karras")


def not_used(request: Any, defaults: Defaults, refiner: Defaults) -> str:
    """What a refiner's own settings would decide in a run of its own, and the base's do in an ensemble."""
    if refiner.refusal and None in (request.sampler, request.spacing):
        return f"; not used: the refiner's own scheduler ({refiner.refusal})"
    settings = decided(STEPPING, request, refiner, SDXL, defaults)
    return f"; not used: the refiner's own {settings}" if settings else ""


def left_open(request: Any, defaults: Defaults) -> str:
    """What the settings decide, where they are not SDXL's, or which levels are the request's, as a plan tells it."""
    if request.has_own_levels:
        return own_levels.told(request, defaults)
    empty_prompt = ("zeros",) if request.guided and request.negative_prompt is None else ()
    settings = decided((*STEPPING, *empty_prompt), request, defaults, SDXL)
    return f"; the model's own: {settings}" if settings else ""


def decided(names: tuple[str, ...], request: Any, own: Defaults, *others: Defaults) -> str:
    """The settings of a model that a request leaves open and that none of the others has, in words."""
    unlike = [name for name in names if getattr(own, name) not in [getattr(other, name) for other in others]]
    return ", ".join(f"{name} {getattr(own, name)}" for name in unlike if getattr(request, name, None) is None)
