"""Files of textual inversion: each form is read, what does not fit is refused in one line."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import save_file

from sdxl_ref.config import InputError
from sdxl_ref.text.inversion import Inversions
from sdxl_ref.weights.inversion_files import load_inversion

L = torch.arange(2 * 32).reshape(2, 32) / 64
G = torch.arange(3 * 64).reshape(3, 64) / 192
BASE = peers.TINY_BASE.text_encoders
REFINER = peers.TINY_REFINER.text_encoders


def written(folder: Path, name: str = "my-style.safetensors", **tensors: torch.Tensor) -> Path:
    path = folder / name
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)  # no two in one memory
    return path


@pytest.mark.parametrize(
    ("text_encoders", "tensors", "token", "expected"),
    [
        (BASE, {"clip_l": L, "clip_g": G}, "my-style", {"clip_l": L, "clip_g": G}),
        (BASE, {"clip_g": G}, "my-style", {"clip_g": G}),
        (REFINER, {"clip_g": G}, "my-style", {"clip_g": G}),
        (REFINER, {"clip_l": L, "clip_g": G}, "my-style", {"clip_g": G}),
        (BASE, {"<toy>": L}, "<toy>", {"clip_l": L}),
        (BASE, {"<toy>": G}, "<toy>", {"clip_g": G}),
        (BASE, {"<toy>": G[0]}, "<toy>", {"clip_g": G[:1]}),
        (BASE, {"emb_params": G}, "my-style", {"clip_g": G}),
        (REFINER, {"<toy>": G.half()}, "<toy>", {"clip_g": G.half()}),
    ],
)
def test_each_form_is_read(text_encoders: Any, tensors: Any, token: str, expected: Any, tmp_path: Path) -> None:
    inversions = Inversions(text_encoders)
    assert load_inversion(inversions, written(tmp_path, **tensors)) == token
    assert inversions.tokens == [token]
    for tower, loaded in inversions.vectors.items():
        assert (token in loaded) == (tower in expected)
        assert tower not in expected or torch.equal(loaded[token], expected[tower])


@pytest.mark.parametrize("tensors", [{"clip_l": L, "clip_g": G}, {"<toy>": G}])
def test_a_token_that_is_given_wins(tensors: Any, tmp_path: Path) -> None:
    inversions = Inversions(BASE)
    assert load_inversion(inversions, written(tmp_path, **tensors), token="<mine>") == "<mine>"
    assert inversions.tokens == ["<mine>"]


@pytest.mark.parametrize(
    ("text_encoders", "tensors", "message"),
    [
        (
            REFINER,
            {"clip_l": L},
            "does not fit the model: expected vectors of 64 numbers for clip_g; found clip_l (2, 32)",
        ),
        (REFINER, {"<toy>": L}, "expected vectors of 64 numbers for clip_g; found <toy> (2, 32)"),
        (
            BASE,
            {"<toy>": torch.zeros(1, 48)},
            "expected vectors of 32 numbers for clip_l, 64 numbers for clip_g; found",
        ),
        (
            BASE,
            {"clip_l": G, "clip_g": G},
            "expected 1 to 75 vectors of 32 numbers for clip_l, found a tensor of (3, 64)",
        ),
        (BASE, {"a": L, "b": G}, "is no textual inversion: expected clip_g and clip_l, or one tensor, found a, b"),
        (BASE, {"clip_l": L, "clip_g": G, "c": G}, "is no textual inversion"),
        (BASE, {"<toy>": torch.zeros(1, 1, 64)}, "expected 1 to 75 vectors of 64 numbers for clip_g"),
        (BASE, {}, "does not fit the model"),
    ],
)
def test_what_does_not_fit_is_an_error(text_encoders: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    inversions = Inversions(text_encoders)
    with pytest.raises(InputError) as caught:
        load_inversion(inversions, written(tmp_path, **tensors))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert inversions.tokens == []


@pytest.mark.parametrize("name", ["style.pt", "style.bin"])
def test_a_pickle_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, clip_g=G)  # what it holds is not looked at
    with pytest.raises(
        InputError, match="is a pickle, which can run any code when opened: expected a safetensors file"
    ):
        load_inversion(Inversions(BASE), path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_inversion(Inversions(BASE), tmp_path / "style.safetensors")
