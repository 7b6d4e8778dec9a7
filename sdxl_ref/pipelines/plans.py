"""Which steps will run: known before anything does."""

from typing import NamedTuple

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.diffusion.schedule import Grid, NoiseSchedule, strength_steps
from sdxl_ref.pipelines.request import Request

STRENGTH = 0.3


class GridPlan(NamedTuple):
    """The levels that will be denoised."""

    grid: Grid
    num_inference_steps: int
    note: str = ""

    def __str__(self) -> str:
        first = float(self.grid.sigmas[0])
        last = float(self.grid.sigmas[-1])
        steps = f"{len(self.grid.timesteps)} of {self.num_inference_steps} steps, sigma {first:.4g} → {last:.4g}"
        return steps + self.note


def plan_of(request: Request, defaults: Defaults = SDXL) -> GridPlan:
    """Which steps will run of a model with these defaults.

    InputError where none would, or where the request contradicts itself.
    """
    r = request.completed(defaults)
    if r.strength is not None and r.denoising_start is not None:
        raise InputError("strength and denoising_start both say where to begin: give one of them")
    steps = r.num_inference_steps
    schedule = NoiseSchedule()
    grid = schedule.grid(steps, r.spacing, bool(r.karras))
    start = 0
    if r.denoising_start is not None:
        start = grid.steps_above(schedule.switch_sigma(r.denoising_start))
    elif r.image is not None or r.strength is not None:
        start = steps - strength_steps(steps, STRENGTH if r.strength is None else r.strength, r.strength_rule)
    stop = steps if r.denoising_end is None else grid.steps_above(schedule.switch_sigma(r.denoising_end))
    if start >= stop:
        between = f"step {start}, where the run begins, and denoising_end {r.denoising_end}"
        raise InputError(f"0 of {steps} steps lie between {between}: use more steps, or a wider range")
    return GridPlan(grid.cut(start, stop), steps, request.left_open(defaults))
