"""What `--lora FILE[:SCALE]` says, and the adapters that it puts on a pipeline. Loaded where it is given."""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.pipelines.adapting import adapters
from sdxl_ref.weights.tensor_files import sha256_of


def path_and_scale(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE` -> the adapter's file and its scale, 1 where there is none."""
    name, colon, number = text.rpartition(":")
    try:
        path = Path(name if colon else text)
        scale = float(number) if colon else 1.0
    except ValueError:
        if os.path.exists(name) and not os.path.exists(text):
            raise InputError(f"the scale of an adapter must be a number behind its file, found {number!r}") from None
        path = Path(text)
        scale = 1.0
    if not math.isfinite(scale):
        raise InputError(f"the scale of an adapter must be a finite number, found {text}")
    return path, scale


def files(texts: Sequence[str]) -> list[Path]:
    """The adapters' files, each once."""
    return list(dict.fromkeys(path_and_scale(text)[0] for text in texts))


def put_on(pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Put adapters on a pipeline and say where they fit; returns what its settings say."""
    active = adapters(pipe)
    names = []
    scales = []
    digests = []
    for i, text in enumerate(texts):
        path, scale = path_and_scale(text)
        name = f"{i} {path.stem}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what of it does not fit is in the report
            reports = active.load(path, name, activate=False)
        for model, report in reports:
            print(f"{path.name} at {scale:g} on the {model.config.kind}: {report}")
        names.append(name)
        scales.append(scale)
        digests.append(sha256_of(active.file(name)))
    pipe.set_adapters(names, scales)
    hashes = ", ".join(f"{name.split(' ', 1)[1]}: {digest[:12]}" for name, digest in zip(names, digests, strict=True))
    return {"lora": list(texts), "lora_sha256": digests, "lora_hashes": hashes}
