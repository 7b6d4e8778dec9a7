"""open_clip's tokenizer: text -> ids, as both of SDXL's text towers were trained with.

The byte-pair encoding and its vocabulary are open_clip's own `tokenizer.py`, loaded as a single file: importing the
package would bring in torchvision and timm. Only the framing to 77 ids stands here.
"""

import importlib.util
import runpy
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT_LENGTH = 77
START, END = 49406, 49407  # <start_of_text>, <end_of_text>


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """open_clip's `SimpleTokenizer`, from its file, without importing the package `open_clip`."""
    package = importlib.util.find_spec("open_clip")  # finds, does not import
    if package is None or package.origin is None:
        raise ImportError("open_clip_torch is not installed: pip install open_clip_torch")
    return runpy.run_path(str(Path(package.origin).with_name("tokenizer.py")))["_tokenizer"]


def tokenize(texts: str | Sequence[str], pad: str = "zero") -> Tensor:
    """Prompts -> ids (n,77) int64: start, text, end, padding.

    pad: "zero" (OpenCLIP's towers) or "eos" (CLIP-L: the end-of-text id again). A longer text is cut to 75 ids, with
    end-of-text last, and a warning shows what was cut. ValueError on another `pad`.
    """
    if pad not in ("zero", "eos"):
        raise ValueError(f'expected pad "zero" or "eos", found {pad!r}')
    texts = [texts] if isinstance(texts, str) else texts
    ids = torch.full((len(texts), CONTEXT_LENGTH), 0 if pad == "zero" else END, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        encoded = _tokenizer().encode(text)
        kept, cut = encoded[: CONTEXT_LENGTH - 2], encoded[CONTEXT_LENGTH - 2 :]
        if cut:
            lost = _tokenizer().decode(cut).strip()
            warnings.warn(f"the prompt is longer than {CONTEXT_LENGTH} tokens; cut: {lost!r}", stacklevel=2)
        row[: len(kept) + 2] = torch.tensor([START, *kept, END])
    return ids
