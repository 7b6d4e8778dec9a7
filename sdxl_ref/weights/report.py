"""What a checkpoint is: its parts with their sizes and dtypes, extras, its autoencoder, its metadata, in words or JSON.

Told from the headers, the autoencoder's tensors, and, where a file has the size of an official one, its hash. A check
reads all of it.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from sdxl_ref.config import SDXL, Defaults, InputError
from sdxl_ref.weights import layouts
from sdxl_ref.weights.checkpoint import CONFIG_KEY, Checkpoint, prefixes
from sdxl_ref.weights.dtypes import DTYPE_NAMES, DTYPES, is_finite
from sdxl_ref.weights.fitting import extras
from sdxl_ref.weights.folder import Folder, Source, stored_in
from sdxl_ref.weights.folder import sources_of as sources_of
from sdxl_ref.weights.identity import KNOWN_FILES, name_of, vae_name
from sdxl_ref.weights.lone_parts import LonePart, find_lone_part, open_part
from sdxl_ref.weights.opening import open_checkpoint
from sdxl_ref.weights.tensor_files import sha256_of

OFFICIAL_SIZES = (6_075_981_930, 6_938_078_334)  # bytes of the official files, with either VAE: others need no hash
VAES = {  # sha256 of files that hold a VAE alone -> whose they are, as the hub's repositories list them
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": "stabilityai/sdxl-vae",
    "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341": "stabilityai/sdxl-vae",
    "bcb60880a46b63dea58e9bc591abe15f8350bde47b405f9c38f4be70c6161e68": "stabilityai/sdxl-vae in float16",
    "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1": "fp16-fix (madebyollin/sdxl-vae-fp16-fix)",
    "1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c": "fp16-fix (madebyollin/sdxl-vae-fp16-fix)",
}
LONGEST = 200  # characters of a metadata value: beyond, it is a picture or a configuration
HEADER_LENGTH = 8  # bytes that tell the length of a file's header
Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """How many tensors and parameters a part has, and their dtypes."""

    tensors: int
    parameters: int
    dtypes: frozenset[torch.dtype]

    def line(self, name: str) -> str:
        dtypes = ", ".join(sorted(DTYPE_NAMES[dtype] for dtype in self.dtypes))
        return f"{name:<15} {self.tensors:>5} tensors {self.parameters:>13,} parameters  {dtypes}"

    def to_json(self) -> Json:
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return {"tensors": self.tensors, "parameters": self.parameters, "dtypes": dtypes}


@dataclass(frozen=True)
class Description:
    """What `describe` tells of a checkpoint. `checks` are lines on what reading all of it has shown."""

    path: Path
    model: str
    parts: Mapping[str, Part]
    vae: str
    note: str = ""
    extras: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)  # of a kind of file, under their names

    def lines(self) -> list[str]:
        """The report, without characters that a terminal would act on: a file may name its tensors as it likes."""
        lines = [f"{self.path}: {self.model}"]
        if self.note:
            lines.append(f"note: {self.note}")
        lines += [part.line(name) for name, part in self.parts.items()]
        lines += [f"{name}: {text}" for name, text in self.details.items()]
        lines.append(f"extras: {', '.join(self.extras) or 'none'}")
        lines += [f"{key}: {shortened(text)}" for key, text in self.metadata.items() if key != CONFIG_KEY]
        lines += self.checks
        if self.vae:
            lines.append(f"VAE: {self.vae}")
        return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]

    def to_json(self) -> Json:
        return {
            "path": str(self.path),
            "model": self.model,
            "note": self.note,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "extras": sorted(self.extras),
            "vae": self.vae,
            "metadata": {key: text for key, text in self.metadata.items() if len(text) < LONGEST},
            **({"details": dict(self.details)} if self.details else {}),
        }


def describe(name: str | Path, variant: str | None = None, check: bool = False) -> Description:
    """What a file, folder or repository is; it may also hold a UNet, an autoencoder or a text encoder alone.

    With `check` the whole of it is read: its sha256 is told, and InputError names tensors with NaN or infinite values.
    InputError too for what cannot be opened, and for dtypes that no weights have.
    """
    path = Path(name)
    lone = find_lone_part(path, variant) if os.path.exists(path) else None
    if lone is not None:
        return describe_part(lone, check)
    return describe_checkpoint(open_checkpoint(name, variant=variant), check)


def describe_checkpoint(checkpoint: Checkpoint, check: bool = False) -> Description:
    """What an open checkpoint is. See `describe`."""
    sources = sources_of(checkpoint)
    dtypes = dtypes_of(checkpoint)
    others = extras(checkpoint)
    parts = {}
    for name, prefix in prefixes(checkpoint.config).items():
        keys = [key for key in sources if key.startswith(prefix) and key not in others]
        parts[name] = summary(keys, checkpoint.shapes, dtypes)
    digest = scan(checkpoint) if check else ""
    return Description(
        checkpoint.path,
        name_of(checkpoint),
        parts,
        vae_of(checkpoint, digest),
        checkpoint.note,
        tuple(others),
        dict(sorted(checkpoint.metadata.items())),
        checks(digest) if check else (),
        {"its own settings": own} if (own := own_settings(checkpoint.defaults)) else {},
    )


def own_settings(defaults: Defaults) -> str:
    """How a model is run by what lies beside its weights, where that is not SDXL's way."""
    unlike = [name for name, value in vars(defaults).items() if value != getattr(SDXL, name)]
    return ", ".join(f"{name} {getattr(defaults, name)}" for name in unlike)


def describe_part(lone: LonePart, check: bool = False) -> Description:
    """The same of one part alone; an autoencoder is named by the sha256 of its file. What does not fit is noted."""
    sources = {name: Source(None, [stored]) for name, stored in lone.stored.items()}
    shapes = {name: source.shape for name, source in sources.items()}
    dtypes = dtypes_in(sources)
    note = ""
    own = set(sources)
    try:
        checkpoint = open_part(lone)
        state, _ = layouts.part_rules(lone.part, checkpoint.config)
        own = {stored.name for key in state if key in checkpoint.sources for stored in checkpoint.sources[key].tensors}
    except InputError as error:
        note = str(error)
    digest = ""
    if check:
        digest = scan_files(*lone.files)
    elif lone.part == "vae":
        digest = sha256_of(*lone.files)
    return Description(
        lone.path,
        lone.name,
        {lone.part: summary(sorted(own), shapes, dtypes)},
        f"{VAES.get(digest, 'unknown')}, file sha256 {digest}" if lone.part == "vae" else "",
        note,
        tuple(name for name in sources if name not in own),
        dict(sorted(lone.metadata.items())),
        checks(digest) if check else (),
    )


def summary(keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> Part:
    """What there is to tell of some tensors."""
    parameters = sum(math.prod(shapes[key]) for key in keys)
    return Part(len(keys), parameters, frozenset(dtypes[key] for key in keys))


def checks(digest: str) -> tuple[str, ...]:
    """The lines on what was read whole and found finite."""
    file, _ = KNOWN_FILES.get(digest, ("not an official file", ""))
    return f"sha256: {digest} ({VAES.get(digest, file)})", "finite: every value of every tensor"


def shortened(text: str) -> str:
    """A value of the metadata, or the beginning of a long one."""
    return text if len(text) < LONGEST else f"{text[:LONGEST]}…"


# --- the autoencoder ------------------------------------------------------------------------------------------------


def vae_of(checkpoint: Checkpoint, digest: str = "") -> str:
    """Which autoencoder a checkpoint holds: by the sha256 of an official file, or of a folder's file of the VAE.

    `digest` is the file's sha256 where it is known already.
    """
    if isinstance(checkpoint, Folder):
        digest = sha256_of(*checkpoint.files(prefixes(checkpoint.config)["vae"]))
    elif not digest and checkpoint.path.stat().st_size in OFFICIAL_SIZES:
        digest = checkpoint.sha256()
    name = vae_name(checkpoint, digest)  # "unknown, …" where no official file has this hash
    return VAES[digest] + name.removeprefix("unknown") if digest in VAES else name


# --- headers --------------------------------------------------------------------------------------------------------


def alone(file: Path) -> dict[str, Source]:
    """The tensors of a file, each as it is."""
    return {name: Source(None, [stored]) for name, stored in stored_in(file).items()}


def dtypes_of(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The dtype of every tensor, from the headers alone. InputError for one that no weights have."""
    return dtypes_in(sources_of(checkpoint))


def dtypes_in(sources: Mapping[str, Source]) -> dict[str, torch.dtype]:
    """The dtype of every tensor, from the headers alone. InputError for one that no weights have."""
    for source in sources.values():
        for path, name, header in source.tensors:
            if header.dtype not in DTYPES:
                raise InputError(f"{path}: {name} has the dtype {header.dtype}, expected one of {', '.join(DTYPES)}")
    return {key: common_dtype(source) for key, source in sources.items()}


def common_dtype(source: Source) -> torch.dtype:
    """The dtype that holds all that a tensor is made of: q, k and v may come in several. InputError for 8-bit ones."""
    path, name, _ = source.tensors[0]
    dtypes = {DTYPES[stored.header.dtype] for stored in source.tensors}
    if len(dtypes) > 1 and any(dtype.itemsize == 1 for dtype in dtypes):
        found = ", ".join(stored.header.dtype for stored in source.tensors)
        raise InputError(f"{path}: {name} and those beside it make one tensor, and have several dtypes: {found}")
    return reduce(torch.promote_types, dtypes)


# --- values ---------------------------------------------------------------------------------------------------------


def scan(checkpoint: Checkpoint) -> str:
    """Read all of a checkpoint: its sha256. InputError names tensors with values that are not finite."""
    if not isinstance(checkpoint, Folder):
        return scan_files(checkpoint.path)
    with checkpoint.reader() as read:
        require_finite(checkpoint.path, [key for key in checkpoint.shapes if not is_finite(read(key))])
    return checkpoint.sha256()


def scan_files(*paths: Path) -> str:
    """Read files once, front to back and one behind the other. Returns and raises as `scan` does."""
    digest = hashlib.sha256()
    for path in paths:
        not_finite = []
        with path.open("rb") as file:
            length = file.read(HEADER_LENGTH)
            header = file.read(int.from_bytes(length, "little"))
            digest.update(length)
            digest.update(header)
            for name, dtype, size in in_order(header):
                values = bytearray(size)
                file.readinto(values)
                digest.update(values)
                if size and dtype.is_floating_point and not is_finite(torch.frombuffer(values, dtype=dtype)):
                    not_finite.append(name)
        require_finite(path, not_finite)
    return digest.hexdigest()


def in_order(header: bytes) -> list[tuple[str, torch.dtype, int]]:
    """Name, dtype and size in bytes of a file's tensors, in the order in which they lie there without gaps."""
    spans = []
    for name, fields in json.loads(header).items():
        if name != "__metadata__":
            begin, end = fields["data_offsets"]
            spans.append((begin, end, name, DTYPES[fields["dtype"]]))
    return [(name, dtype, end - begin) for begin, end, name, dtype in sorted(spans, key=itemgetter(0, 1))]


def require_finite(path: Path, not_finite: Sequence[str]) -> None:
    if not_finite:
        names = ", ".join(not_finite[:5])
        raise InputError(f"{path}: {len(not_finite)} tensors hold NaN or infinite values: {names}")
