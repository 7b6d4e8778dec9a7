"""Files of textual inversion, whose vectors `text.inversion` puts in the place of words.

They come as SDXL's usual form, tensors `clip_g` and `clip_l` (n,width); as diffusers', one tensor under the token's
name; and as the web UI's, one tensor `emb_params`. In the last two the width says for which tower the vectors are.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.text.inversion import TOWERS, Inversions
from sdxl_ref.weights.tensor_files import open_tensors

UNNAMED = "emb_params"


def load_inversion(inversions: Inversions, path: str | Path, token: str | None = None) -> str:
    """Have a token stand for a file's vectors, and return it: `token`, else the file's own, else the file's name.

    Vectors for a tower that the model does not have are left where they are, if others fit. InputError where nothing
    fits, and for what is no safetensors file: pickles are not opened.
    """
    path = Path(path)
    with open_tensors(path) as file:
        names = list(file.keys())
        is_named = len(names) == 1 and names[0] not in (*TOWERS, UNNAMED)
        if not is_named and not (set(names) <= set(TOWERS) or names == [UNNAMED]):
            few = ", ".join(names[:4])
            raise InputError(f"{path} is no textual inversion: expected clip_g and clip_l, or one tensor, found {few}")
        tensors = {name: file.get_tensor(name) for name in names}
    rows = {name: tensor.unsqueeze(0) if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
    vectors = by_tower(inversions, rows, path)
    token = token or (names[0] if is_named else path.name.removesuffix(".safetensors"))
    inversions.add(token, vectors)
    return token


def by_tower(inversions: Inversions, rows: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The vectors of a file for each tower of the model. InputError where there are none."""
    if set(rows) <= set(TOWERS):
        vectors = {tower: tensor for tower, tensor in rows.items() if tower in inversions.widths}
    else:
        [tensor] = rows.values()
        vectors = {tower: tensor for tower, width in inversions.widths.items() if tensor.shape[-1] == width}
    if not vectors:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in rows.items())
        expected = ", ".join(f"{width} numbers for {tower}" for tower, width in inversions.widths.items())
        raise InputError(f"{path} does not fit the model: expected vectors of {expected}; found {found}")
    return vectors
