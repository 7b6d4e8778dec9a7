"""LoRA files: merge into a checkpoint, extract from two, convert between the forms in use."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdxl_ref.adapters import lora, writing
from sdxl_ref.adapters.factors import HIGHEST_RANK, Factors
from sdxl_ref.adapters.lora import Adapter
from sdxl_ref.adapters.places import Place, matrices
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.checkpoint import Checkpoint, prefixes
from sdxl_ref.weights.dtypes import is_finite
from sdxl_ref.weights.fitting import differences, extras
from sdxl_ref.weights.folder_scheduler import metadata_of
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.tensor_files import read_metadata
from weights_convert.adapter_metadata import still_holds
from weights_convert.convert import Report, dtypes_of, entry, model_spec, save
from weights_convert.reports import difference

Read = Callable[[str], Tensor]


def merge(
    source: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    target: str | Path,
    force: bool = False,
    dtype: torch.dtype | None = None,
) -> Report:
    """Write a checkpoint with adapters added to its weights, each times a scale.

    Every weight gets `dtype`, or stays in its own; the report says how much of the change that rounds away.
    """
    checkpoint = open_checkpoint(source)
    fitted = [(lora.load(path, checkpoint.config), scale) for path, scale in adapters]
    report = Report([f"{path}: {adapter}" for (path, _), (adapter, _) in zip(adapters, fitted, strict=True)])
    dtypes = dtypes_of(checkpoint)
    if dtype is not None:
        dtypes = {key: dtype if own.is_floating_point else own for key, own in dtypes.items()}
    with checkpoint.reader() as read:
        merging = Merging(read, fitted, dtypes, tensors_acted_on(fitted, checkpoint.config))
        entries = [entry(key, dtypes[key], checkpoint.shapes[key], merging.read) for key in sorted(checkpoint.shapes)]
        metadata = metadata_of(checkpoint) | model_spec(checkpoint.config)
        save(Path(target), entries, metadata, force)
    report.lines.append(f"{target}: {len(merging.acted_on)} of {len(entries)} tensors changed")
    report.lines.append(merging.loss())
    return report


def tensors_acted_on(fitted: Sequence[tuple[Adapter, float]], config: ModelConfig) -> dict[str, tuple[str, str]]:
    """The keys in a checkpoint of all tensors that adapters change -> (part, official name)."""
    names: dict[str, tuple[str, str]] = {}
    for adapter, _ in fitted:
        names |= {prefixes(config)[part] + key: (part, key) for part, key in adapter.changes}
    return names


class Merging:
    """Tensors with what adapters add to them, in their dtypes, and how much of that is lost to these."""

    def __init__(
        self,
        source: Read,
        fitted: Sequence[tuple[Adapter, float]],
        dtypes: Mapping[str, torch.dtype],
        acted_on: Mapping[str, tuple[str, str]],
    ) -> None:
        self.source = source
        self.fitted = fitted
        self.dtypes = dtypes
        self.acted_on = acted_on
        self.squares: dict[str, tuple[float, float]] = {}  # by key: of the change, and of what is lost of it

    def read(self, key: str) -> Tensor:
        """A tensor by its key. InputError where its dtype cannot hold the sum."""
        tensor = self.source(key)
        if key not in self.acted_on:
            return self._rounded(key, tensor)
        original = tensor.float()
        change = torch.zeros_like(original)
        for adapter, scale in self.fitted:
            lora.add(change, original, adapter.changes.get(self.acted_on[key], []), scale)
        merged = self._rounded(key, original + change)
        lost = merged.double() - original.double() - change.double()
        self.squares[key] = (float(change.double().square().sum()), float(lost.square().sum()))
        return merged

    def _rounded(self, key: str, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self.dtypes[key])
        if rounded is not tensor and not is_finite(rounded):
            advice = "use a lower scale, or another dtype"
            raise InputError(f"{key} would hold values that are not finite in {rounded.dtype}: {advice}")
        return rounded

    def loss(self) -> str:
        """What rounding takes from the change, in words."""
        change = sum(square for square, _ in self.squares.values())
        lost = sum(square for _, square in self.squares.values())
        error = math.sqrt(lost / change) if change else 0.0
        dtypes = sorted({str(self.dtypes[key]).removeprefix("torch.") for key in self.squares})
        advice = (
            ": --dtype float16 keeps more of it" if any(self.dtypes[key].itemsize == 1 for key in self.squares) else ""
        )
        return f"relative error of the change, as {' and '.join(dtypes)} rounds it: {error:.1e}{advice}"


def extract(
    first: str | Path, second: str | Path, target: str | Path, rank: int, form: str = "kohya", force: bool = False
) -> Report:
    """The best adapter of a rank that takes the first checkpoint to the second (singular values, layer by layer)."""
    if not 1 <= rank <= HIGHEST_RANK:
        raise InputError(f"the rank must be from 1 to {HIGHEST_RANK}, found {rank}")
    a = open_checkpoint(first)
    b = open_checkpoint(second)
    if problems := differences(weights(a), weights(b)):  # not of their metadata, which may be absent
        raise InputError(f"{first} and {second} are no two versions of one model: in the second {problems}")
    for checkpoint in (a, b):
        dtypes_of(checkpoint)  # InputError for what cannot be read
    with a.reader() as read_a, b.reader() as read_b:
        beyond = beyond_adapters(a, read_a, read_b)
        adapter, left_over = extracted(matrices(a.config), read_a, read_b, rank)
    if not adapter.layers:
        raise InputError(f"{first} and {second} have the same matrices: there is nothing to extract; {beyond}")
    write_adapter(target, adapter, a.config, form, force)
    layers = f"{len(adapter.layers)} layers of rank at most {rank}"
    return Report([f"{target}: {layers}; {left_over:.2e} of the change is left over", beyond])


def beyond_adapters(checkpoint: Checkpoint, read_a: Read, read_b: Read) -> str:
    """What differs between two checkpoints and no adapter can carry, in words."""
    others = sorted(weights(checkpoint).keys() - matrices(checkpoint.config).values())
    different = [key for key in others if difference(key, read_a(key).float(), read_b(key).float())]
    report = f"{len(different)} other tensors differ, which no adapter carries"
    if different:
        more = ", …" if len(different) > 3 else ""
        report += f": {', '.join(different[:3])}{more}"
    return report


def extracted(keys: Mapping[Place, str], read_a: Read, read_b: Read, rank: int) -> tuple[Adapter, float]:
    """An adapter of the changes of matrices, and the share of all change that it leaves over.

    `keys` are the keys of the matrices in a checkpoint. InputError for values that are not finite.
    """
    layers: dict[Place, Factors] = {}
    rest = 0.0
    whole = 0.0
    for place, key in tqdm(keys.items(), unit="layer", disable=None):
        change = place.block(read_b(key).float()) - place.block(read_a(key).float())
        if not torch.isfinite(change).all():
            raise InputError(f"{key} holds values that are not finite (NaN or infinite)")
        if change.any():
            factors = svd(change, rank)
            layers[place] = factors
            whole += float(change.square().sum())
            rest += float((change - factors.delta().reshape(change.shape)).square().sum())
    left_over = math.sqrt(rest / whole) if layers else 0.0
    return Adapter(layers), left_over


def weights(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what networks read and every file has."""
    others = extras(checkpoint)
    return {
        key: shape for key, shape in checkpoint.shapes.items() if key not in others and not key.endswith("logit_scale")
    }


def svd(change: Tensor, rank: int) -> Factors:
    """The nearest product of two factors (Eckart & Young 1936); both get the roots of the singular values.

    `change` is (out,in) or (out,in,kh,kw).
    """
    matrix = change.flatten(1)  # (out, in*kh*kw)
    rank = min(rank, *matrix.shape)
    if 4 * rank < min(matrix.shape):
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=6)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = (v[:, :rank] * root).T
    if change.ndim == 4:
        up = up[:, :, None, None]
        down = down.reshape(rank, *change.shape[1:])
    return Factors(down.contiguous(), up.contiguous(), float(rank))


def convert_adapter(
    source: str | Path, model: str | Path | ModelConfig, target: str | Path, form: str, force: bool = False
) -> Report:
    """An adapter of any form -> one of `sdxl_ref.adapters.forms`; `model` tells its sizes.

    The metadata that still hold are kept. InputError for a kind of change that the form has no place for.
    """
    config = model if isinstance(model, ModelConfig) else open_checkpoint(model).config
    adapter = lora.load(source, config)
    metadata = read_metadata(lora.adapter_file(source))
    kept = still_holds(metadata)
    write_adapter(target, adapter, config, form, force, kept)
    lines = [f"{source}: {adapter}", f"{target}: in the form {form}"]
    if left := sorted(metadata.keys() - kept.keys() - writing.metadata(config).keys()):
        lines.append(f"metadata that no longer hold are left out: {', '.join(left)}")
    return Report(lines)


def write_adapter(
    target: str | Path,
    adapter: Adapter,
    config: ModelConfig,
    form: str,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in a form, with metadata beside its own."""
    tensors = writing.tensors(adapter, config, form)
    entries = [entry(name, tensor.dtype, tensor.shape, tensors.__getitem__) for name, tensor in sorted(tensors.items())]
    save(Path(target), entries, dict(metadata or {}) | writing.metadata(config), force)
