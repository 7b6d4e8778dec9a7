"""A kit: a realistic run as a trace, with what rounding explains at each point, for any implementation to check itself.

A folder with `kit.safetensors` (the trace: FORMAT.md), `input.png` and `budgets.tsv`, a line for each output: its
name, how far another float32 implementation may be from it along the run, as relative L2 distance, and its norm.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdxl_ref.config import InputError
from sdxl_ref.networks.freed_memory import give_freed_memory_back
from sdxl_ref.networks.packing import is_without_weights
from sdxl_ref.parity.exact import exact_pipeline
from sdxl_ref.parity.recording import Recorder, machine, models_of
from sdxl_ref.parity.replay import Replay
from sdxl_ref.parity.report import DTYPES, RESULT, Budget
from sdxl_ref.parity.sketch import Sketch
from sdxl_ref.parity.sketch import sketch as sketch_of
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.watching import Watcher, watched
from sdxl_ref.pictures.images import load_image
from sdxl_ref.weights.checkpoint import PARTS
from sdxl_ref.weights.file_saving import write_text

FILE = "kit.safetensors"
PICTURE = "input.png"
BUDGETS = "budgets.tsv"
LARGEST = 1 << 16  # bytes of a tensor that a kit keeps; of larger ones but the result a sketch
BLOCK = re.compile(r"(input_blocks|output_blocks)\.\d+|middle_block|out")
SEED = 0
REQUEST: dict[str, Any] = {  # sizes that are no square, and no numbers of bfloat16
    "prompt": "a cup of coffee on a wooden table",
    "negative_prompt": "blurry",
    "guidance_scale": 5.0,
    "num_inference_steps": 10,
    "original_size": (1001, 777),
    "crops_coords_top_left": (3, 9),
    "output_type": "pt",
}


@dataclass
class Kit:
    trace: Trace
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        return self.trace.settings

    @classmethod
    def open(cls, folder: Path | str) -> "Kit":
        """InputError unless there is a whole kit of this version."""
        path = Path(folder)
        path = path.parent if path.name == FILE else path
        if not (path / FILE).is_file():
            raise InputError(f"{folder} is no kit: expected a folder with {FILE}, as `sdxl-ref parity kit` writes it")
        kit = cls(Trace.load(path / FILE), path)
        for name in ("budgets", "request"):
            if not isinstance(kit.settings.get(name), dict):
                raise InputError(
                    f"{path / FILE} is a trace without {name}, no kit: make one with `sdxl-ref parity kit`"
                )
        return kit

    def budget(self, dtype: torch.dtype) -> Budget:
        """InputError for a dtype that it has no budgets for."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.settings["budgets"]:
            known = ", ".join(self.settings["budgets"])
            raise InputError(f"the kit has budgets for {known}, found numbers in {name}")
        found = self.settings["budgets"][name]
        return Budget(found["own"], found["run"], dtype)

    def request(self, pipe: Any) -> Any:
        """The run of the kit, as a request of a pipeline."""
        arguments = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings["request"].items()
        }
        if pipe.config.kind == "refiner":
            if not (self.folder / PICTURE).is_file():
                raise InputError(f"{self.folder} has no {PICTURE}, which the kit's run starts from: make the kit anew")
            arguments["image"] = load_image(self.folder / PICTURE)
        try:
            return pipe.request(**arguments, generator=[torch.Generator().manual_seed(SEED)])
        except TypeError as error:
            raise InputError(f"the kit's request cannot be run here: {error}") from error


def request_for(pipe: Any, side: int, folder: Path, whole_sizes: bool = False) -> dict[str, Any]:
    """The arguments of a kit's run: of a refiner on a picture, written there, at half strength; a base's from noise."""
    request = REQUEST | {"original_size": (1024, 768), "crops_coords_top_left": (4, 8)} if whole_sizes else REQUEST
    if pipe.config.kind == "refiner":
        photo_for(side).save(folder / PICTURE)
        return request | {"strength": 0.5}
    target = (512, 1024) if whole_sizes else (515, 1023)
    return request | {"num_inference_steps": 6, "target_size": target, "height": side, "width": side}


def make_kit(
    pipe: Any,
    folder: Path,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    sketch: bool = False,
    side: int | None = None,
    whole_sizes: bool = False,
    say: Callable[[str], Any] = print,
) -> Kit:
    """Run a pipeline in float64 and in each dtype, and write what a kit is. The folder is made if it is not there.

    The picture has `side` pixels a side; None: as the model's training pictures, at most 256. `sketch` keeps sketches
    of all tensors but the result. `whole_sizes`: sizes that bfloat16 holds, for peers that have them in the networks'
    dtype.
    """
    side = side_for(pipe, side)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}: name another one") from error
    checkpoint = pipe.checkpoint
    model = {} if checkpoint is None else {"model": str(checkpoint.path.resolve()), "sha256": checkpoint.sha256()}
    settings: dict[str, Any] = model | {
        "request": request_for(pipe, side, folder, whole_sizes),
        "seed": SEED,
        **machine(),
        **models_of(pipe),
    }
    kit = Kit(Trace(settings=settings), folder)
    largest = 0 if sketch else LARGEST
    with exact_pipeline(pipe):
        recorder = Recorder(keeps=is_of_kit, sketched=lambda key, tensor: sketch and key != RESULT)
        run(pipe, kit, recorder)
    truth = recorder.trace
    say(f"recorded {len(truth.points())} points in float64")
    budgets: dict[str, Any] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        budget = rounding(pipe, kit, truth, dtype, on_disk=sketch)
        budgets[name] = {"own": budget.own, "run": budget.run}
        say(f"budgets in {name}")
    kit.trace = kept(truth, largest)
    kit.trace.settings = settings | {"budgets": budgets}
    kit.trace.save(folder / FILE)
    first = kit.budget(dtypes[0])
    lines = [
        f"{key}\t{first.of_run(key):.3e}\t{norm_of(value):.17g}"
        for key, value in kit.trace.values.items()
        if key.is_output
    ]
    write_text(folder / BUDGETS, "\n".join([*lines, ""]))
    return kit


def is_of_kit(key: Key) -> bool:
    """Every module in the first evaluation; in the others the blocks of the UNet, and what is between networks."""
    path = key.point.removeprefix("refiner/").split("/")
    is_inside = path[0] in PARTS and len(path) == 2
    return key.call == 0 or not is_inside or BLOCK.fullmatch(path[1]) is not None


def side_for(pipe: Any, side: int | None) -> int:
    """As the model's training pictures, at most 256 pixels, unless another one is asked for. InputError for none."""
    side = side or min(pipe.config.resolution, 256)
    if side % 64 or not 64 <= side <= 2048:
        raise InputError(f"the side of a kit's picture must be a multiple of 64, from 64 to 2048, found {side}")
    return side


def photo_for(side: int) -> Image.Image:
    """The photo that ships, as a square."""
    return load_image(str(files("sdxl_ref") / "data" / "photo.jpg")).resize((side, side), Image.Resampling.LANCZOS)


def run(pipe: Any, kit: Kit, watcher: Watcher) -> None:
    """The kit's run, watched."""
    request = kit.request(pipe)
    bar = pipe._progress
    pipe.set_progress_bar_config(disable=True)
    with watched(pipe, watcher):
        pipe.run(request)
    pipe._progress = bar


def rounding(pipe: Any, kit: Kit, truth: Trace, dtype: torch.dtype, on_disk: bool) -> Budget:
    """What our own runs in a dtype are off at each point, the module alone and along the run.

    `on_disk`: their traces, gigabytes at full size, lie in the kit's folder meanwhile.
    """

    def recorded(layout: torch.memory_format) -> Trace:
        recorder = Recorder(keeps=is_of_kit)
        with in_dtype(pipe, dtype, layout):
            run(pipe, kit, recorder)
        return mapped(recorder.trace, kit.folder) if on_disk else recorder.trace

    def replayed(trace: Trace) -> Replay:
        replay = Replay(trace)
        with exact_pipeline(pipe):
            run(pipe, kit, replay)
        return replay

    return two_runs(recorded, replayed, truth, dtype)


def mapped(trace: Trace, folder: Path) -> Trace:
    """A trace whose numbers are read from a file when they are wanted; the file is gone when they are."""
    with TemporaryDirectory(dir=folder) as beside:  # what is mapped stays until it is dropped
        trace.save(Path(beside) / FILE)
        return Trace.load(Path(beside) / FILE)


def two_runs(
    recorded: Callable[[torch.memory_format], Trace],
    replayed: Callable[[Trace], Replay],
    truth: Trace,
    dtype: torch.dtype,
) -> Budget:
    """What two runs of ours allow together: channels-last maps go through other kernels.

    Their rounding is as legitimate, and larger in norms.
    """
    budgets = []
    for layout in (torch.contiguous_format, torch.channels_last):
        trace = recorded(layout)
        budgets.append(Budget.measured(replayed(trace), trace, truth, dtype))
        del trace
        give_freed_memory_back()  # gigabytes at full size
    return budgets[0].widened(budgets[1])


@contextmanager
def in_dtype(pipe: Any, dtype: torch.dtype, layout: torch.memory_format) -> Iterator[None]:
    """A pipeline whose networks are copies in a dtype and a layout; the VAE is float32 where the others are float16."""
    networks = {part: getattr(pipe, part) for part in PARTS}
    try:
        for part, network in networks.items():
            if network is None:
                continue
            wanted = torch.float32 if part == "vae" and dtype == torch.float16 else dtype
            if is_without_weights(network):
                network.to(wanted)  # in which they are read
            elif next(network.parameters()).dtype != wanted:
                setattr(pipe, part, copy_in(network, wanted))
        with in_layout(pipe.unet, layout), in_layout(pipe.vae, layout):
            yield
    finally:
        for part, network in networks.items():
            setattr(pipe, part, network)
            if network is not None and is_without_weights(network):
                network.to(torch.float32)


@contextmanager
def in_layout(network: Any, layout: torch.memory_format) -> Iterator[None]:
    """A network whose norms are handed their maps in a layout in memory: which of two kernels they go through."""

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.contiguous(memory_format=layout) if getattr(arg, "ndim", 0) == 4 else arg for arg in args)

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_in(network: Any, dtype: torch.dtype) -> Any:
    """A plain copy of one of our networks, without its hooks."""
    with torch.device("meta"):
        empty = type(network)(network.config)
    empty.load_state_dict({name: tensor.to(dtype) for name, tensor in network.state_dict().items()}, assign=True)
    return empty.eval().requires_grad_(False)


def norm_of(value: Any) -> float:
    return value.norm if isinstance(value, Sketch) else float(value.double().norm())


def kept(trace: Trace, largest: int) -> Trace:
    """A trace in float32, with sketches for all tensors above a size."""
    values: dict[Key, Any] = {}
    done: dict[int, Any] = {}  # what is one tensor under two names stays one
    for key, value in trace.values.items():
        is_kept = isinstance(value, Sketch) or key.is_output or value.numel() * 4 <= largest  # no larger inputs
        if is_kept and id(value) not in done:
            done[id(value)] = smaller(key, value, largest)
        if is_kept:
            values[key] = done[id(value)]
    same = {key: other for key, other in trace.same.items() if other in values}
    return Trace(values, same, trace.settings)


def smaller(key: Key, value: Tensor | Sketch, largest: int) -> Tensor | Sketch:
    if isinstance(value, Sketch):
        return value
    small = value.float() if value.is_floating_point() and not is_exact(key) else value
    return small if value.numel() * 4 <= largest or key == RESULT else sketch_of(value)


def is_exact(key: Key) -> bool:
    return key.point.startswith(("schedule/", "tokens/"))
