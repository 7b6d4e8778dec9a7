"""Run our networks on another implementation's numbers: each module's own error, apart from what it inherits.

A reference run, in float64, goes on from their numbers wherever they were recorded: what a module of ours makes of
their input is compared with what theirs made of it. So a module at fault shows whatever came before it, and hides
nothing that comes after; of several all are found. What lies between the modules, a residual sum or a softmax, is
compared where their inputs are recorded, and is its module's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_ref.parity.trace import Key, Trace

SOURCES = {  # who makes what a network is handed
    "unet:in.0": "denoiser/input",
    "unet:in.1": "denoiser/timestep",
    "unet:in.2": "conditioning/context",
    "unet:in.3": "conditioning/y",
    "text_encoder:in.0": "tokens/text_encoder",
    "text_encoder_2:in.0": "tokens/text_encoder_2",
    "vae/encoder:in.0": "picture/input",
    "vae/post_quant_conv:in.0": "latents/decoder_input",
    "vae/quant_conv:in.0": "vae/encoder",
    "vae/decoder:in.0": "vae/post_quant_conv",
}

LAST_TOKEN = 49407  # of CLIP's vocabulary; ours has no embedding of a higher one

FIRST_SEEN = {  # the same, of a trace without what whole networks were handed: where that is seen first
    "unet/label_emb.0:in.0": "unet:in.3",
    "text_encoder/text_model.embeddings.token_embedding:in.0": "text_encoder:in.0",
    "text_encoder_2/token_embedding:in.0": "text_encoder_2:in.0",
}


class Difference(NamedTuple):
    """Of a tensor and the one that it should be."""

    relative_l2: float
    max_abs: float
    cosine: float
    ulp: float  # the largest difference in units in the last place of their dtype


@dataclass(frozen=True)
class Check:
    """One tensor of theirs beside ours from the same input. `point` is who answers for it.

    `since` are the keys that were passed since one of theirs was met: what ours did there is in the difference too.
    """

    key: Key
    point: str
    own: Difference
    dtype: torch.dtype
    shape: tuple[int, ...]
    since: tuple[Key, ...] = ()
    note: str = ""


def difference(value: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> Difference:
    """Of `value` from `expected`, in float64; units in the last place are those of `dtype`, or of value's own."""
    info = torch.finfo(dtype or value.dtype) if (dtype or value.dtype).is_floating_point else None
    a, b = value.detach().cpu().double().flatten(), expected.detach().cpu().double().flatten()
    gap = (a - b).abs()
    norm = float(b.norm())
    largest = float(gap.max()) if len(gap) else 0.0
    relative = float(gap.norm()) / norm if norm else (0.0 if largest == 0 else float("inf"))
    both = norm * float(a.norm())
    cosine = float(a @ b) / both if both else float(norm == float(a.norm()))
    if info is None or not len(gap):
        return Difference(relative, largest, cosine, largest)
    spacing = info.eps * 2.0 ** torch.floor(torch.log2(b.abs().clamp(min=info.tiny)))
    return Difference(relative, largest, cosine, float((gap / spacing).max()))


@dataclass
class _Running:
    """A module that runs: whether others ran inside it, its numbers were met, and it returned what it was handed."""

    point: str
    handed: list[Tensor]
    has_children: bool = False
    is_met: bool = False
    is_given: bool = False  # whether theirs was handed the same: what differs inside is its own then
    is_unfit: str = ""  # who answers for what it was handed, if that is of another shape
    is_identity: bool = False


class Replay:
    """A `Watcher` that exchanges our numbers for theirs, and keeps how far apart they were."""

    def __init__(self, theirs: Trace, reference: Trace | None = None) -> None:
        self.theirs = theirs
        self.reference = reference
        self.checks: list[Check] = []
        self.roots: dict[Key, Tensor] = {}  # what whole networks were handed first
        self.ours: dict[Key, Tensor] = {}  # what ours made between the networks
        self.between: dict[Key, tuple[Tensor, Tensor]] = {}  # ours and theirs, of what no module inside a network makes
        self.inherited: dict[Key, float] = {}  # what is left of the distance to the reference, were the module ours
        self._running: list[_Running] = []
        self._unseen: list[str] = []  # leaves that ended since their numbers were last met
        self._since: list[Key] = []  # and all keys
        self._is_unfit = ""  # who handed on what is of another shape
        self._is_spoiled = False  # whether a value of theirs was not finite
        self._handed: list[Tensor] = []  # to the module that is about to run
        self._is_given = False  # whether that was met in theirs

    def enters(self, point: str) -> None:
        if self._running:
            self._running[-1].has_children = True
        self._running.append(_Running(point, self._handed, is_given=self._is_given, is_unfit=self._is_unfit))
        self._handed, self._is_given, self._is_unfit = [], False, ""

    def leaves(self, point: str) -> None:
        ended = self._running.pop()
        if not (ended.has_children or ended.is_met or ended.is_identity):
            self._unseen.append(point)

    def handed(self, key: Key, value: Tensor) -> Tensor:
        other = self._exchange(key, value, self._answers_for(key, value))
        self._handed = [*self._handed, value, other]
        self._is_given |= key in self.theirs
        if not self._running and key.call == 0:
            self.roots[key] = other.detach().clone()
        return other

    def returned(self, key: Key, value: Tensor) -> Tensor:
        expected = None if self.reference is None else self.reference.tensor(key)
        if expected is not None and expected.shape == value.shape:
            self.inherited[key] = difference(value, expected).relative_l2
        if self._running and self._running[-1].point == key.point:
            self._running[-1].is_met = key in self.theirs
            self._running[-1].is_identity = any(value is handed for handed in self._running[-1].handed)
        if not self._running:
            self.ours[key] = value.detach().cpu().clone()
        is_own = bool(self._running) and self._running[-1].point == key.point
        return self._exchange(key, value, (is_own and self._running[-1].is_unfit) or key.point)

    def _answers_for(self, key: Key, value: Tensor) -> str:
        """Who made what a module is handed: the one leaf that ran unseen since, or the module that runs around it.

        A module that only hands on what it was handed itself has not made it, unless theirs was handed that too.
        """
        prefix = "refiner/" if key.point.startswith("refiner/") else ""
        name = str(key._replace(point=key.point.removeprefix(prefix), call=0))
        handed = FIRST_SEEN.get(name)
        if handed is not None and Key.parse(prefix + handed) not in self.theirs:
            name = handed
        source = SOURCES.get(name)
        if source is not None:
            return prefix + source
        if len(set(self._unseen)) == 1:
            return self._unseen[-1]
        for module in reversed(self._running):
            if module.is_given or not any(value is handed for handed in module.handed):
                return module.point
        return self._running[0].point if self._running else key.point

    def _exchange(self, key: Key, value: Tensor, point: str) -> Tensor:
        theirs = self.theirs.tensor(key)
        if theirs is None:
            self._since.append(key)
            return value
        since = tuple(self._since)
        if not since and self.checks and self.checks[-1].key.point.split("/")[0] == key.point.split("/")[0]:
            since = self.checks[-1].since  # another result of the same lines, such as mean and logvar
        self._since.clear()
        self._unseen.clear()
        fit = fitted(theirs, value)
        if fit is None:
            note = f"expected {tuple(value.shape)}, found {tuple(theirs.shape)}"
            nowhere = Difference(float("inf"), float("inf"), 0.0, float("inf"))
            self._is_unfit = "" if key.is_output else point
            self.checks.append(Check(key, point, nowhere, theirs.dtype, tuple(theirs.shape), since, note))
            return value
        if not self._running or (key.is_output is False and point in SOURCES.values()):
            self.between[key] = (value.detach().cpu().clone(), fit.detach().cpu())
        is_finite = bool(torch.isfinite(fit).all())
        if is_finite or not self._is_spoiled:  # of values that are not finite the first one is at fault
            own = difference(fit, value, theirs.dtype)
            self.checks.append(Check(key, point, own, theirs.dtype, tuple(theirs.shape), since))
        self._is_spoiled |= not is_finite
        is_usable = is_finite and (fit.is_floating_point() or bool(((fit >= 0) & (fit <= LAST_TOKEN)).all()))
        return fit.to(value) if is_usable else value  # what is not finite would spoil all that comes after


def fitted(theirs: Tensor, ours: Tensor) -> Tensor | None:
    """Their tensor in our shape: as it is, or in another order of the same axes; None where it is of another shape."""
    if theirs.shape == ours.shape:
        return theirs
    return min(ways_into(theirs, ours.shape), key=lambda way: float((way.to(ours) - ours).norm()), default=None)


def ways_into(theirs: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Their tensor in a shape, in every way that it could be meant.

    Pixels may be tokens there (b,n,c), or stand in one row (b,c,n); a batch of one may have no axis of its own; one
    timestep may serve the whole batch.
    """
    shape = tuple(shape)
    ways = [theirs] if tuple(theirs.shape) == shape else []
    if theirs.ndim == 3 and len(shape) == 4:
        row = (*shape[:2], shape[2] * shape[3])
        ways += [way.reshape(shape) for way in (theirs, theirs.transpose(1, 2)) if tuple(way.shape) == row]
    if theirs.ndim == 4 and len(shape) == 3 and tuple(theirs.flatten(2).transpose(1, 2).shape) == shape:
        ways.append(theirs.flatten(2).transpose(1, 2))
    if not ways and [side for side in theirs.shape if side > 1] == [side for side in shape if side > 1]:
        ways.append(theirs.reshape(shape))
    if theirs.numel() == 1 and len(shape) == 1:
        ways.append(theirs.reshape(1).expand(shape))
    return ways
