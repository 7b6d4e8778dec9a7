"""Pictures as arrays and tensors: what diffusers makes of those in [0, 1], uint8 as a picture's, the rest refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.pictures.arrays import from_arrays
from sdxl_ref.pictures.images import from_tensor, to_tensor

RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)  # (b,h,w,3)
SHARES = RNG.random((2, 16, 24, 3), dtype=np.float32)
FORMS: dict[str, Callable[[np.ndarray], Any]] = {  # of pictures (b,h,w,3)
    "an array": lambda x: x,
    "an array of one": lambda x: x[0],
    "arrays": list,
    "arrays of one each": lambda x: [x[:1], x[1:]],
    "a tensor": lambda x: tensor(x),
    "a tensor of one": lambda x: tensor(x)[0],
    "tensors": lambda x: list(tensor(x)),
    "a tuple of tensors": lambda x: tuple(tensor(x)),
    "tensors of one each": lambda x: list(tensor(x).split(1)),
}


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).permute(0, 3, 1, 2)  # (b,h,w,3) -> (b,3,h,w)


def read(image: object, clean: bool = True) -> Tensor:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_arrays(image, 4, clean)


def diffusers(image: Any) -> Tensor:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=8).preprocess(list(image) if isinstance(image, tuple) else image)


THEIR_LISTS = pytest.mark.filterwarnings("ignore:Passing `image` as a list of 4d:FutureWarning")  # of batches


@THEIR_LISTS
@pytest.mark.parametrize("form", FORMS)
def test_floating_point_is_in_0_to_1_as_diffusers_has_it(form: str) -> None:
    found = read(FORMS[form](SHARES))
    assert torch.equal(found, diffusers(FORMS[form](SHARES)))
    assert torch.equal(found, 2 * tensor(SHARES)[: len(found)] - 1)


@THEIR_LISTS
@pytest.mark.parametrize("form", FORMS)
def test_with_negative_values_it_is_in_minus_1_to_1_as_diffusers_has_it(form: str) -> None:
    image = FORMS[form](2 * SHARES - 1)
    with pytest.warns(UserWarning, match=r"has values below 0 \(-0\.9.*\) and is taken as \[-1, 1\]"):
        found = from_arrays(image, 4, True)
    assert torch.equal(found, tensor(2 * SHARES - 1)[: len(found)])
    with pytest.warns(FutureWarning, match=r"\[-1,1\] is deprecated"):
        assert torch.equal(found, diffusers(image))


@pytest.mark.parametrize("form", FORMS)
def test_uint8_is_what_a_picture_of_these_levels_is(form: str) -> None:
    found = read(FORMS[form](LEVELS))
    assert torch.equal(found, torch.cat([to_tensor(Image.fromarray(levels)) for levels in LEVELS])[: len(found)])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_types_of_arrays(dtype: Any) -> None:
    assert torch.equal(read(SHARES.astype(dtype)), 2 * tensor(SHARES.astype(dtype).astype(np.float32)) - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_tensors(dtype: torch.dtype) -> None:
    found = read(tensor(SHARES).to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, 2 * tensor(SHARES).to(dtype).float() - 1)


def test_views_of_arrays() -> None:
    """As cv2's blue, green, red is turned round."""
    assert torch.equal(read(LEVELS[..., ::-1]), read(LEVELS.copy()).flip(1))


def test_what_output_types_give_comes_back_as_the_same_pixels() -> None:
    decoded = tensor(SHARES)  # (b,3,h,w) in [0,1], as "pt"
    pictures = from_tensor(decoded)  # "pil"
    for given in (decoded, decoded.permute(0, 2, 3, 1).numpy()):  # "np"
        assert [np.asarray(picture).tolist() for picture in from_tensor(read(given) / 2 + 0.5)] == [
            np.asarray(picture).tolist() for picture in pictures
        ]
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for given in (every, every / 255, torch.from_numpy(every / 255).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(from_tensor(read(given) / 2 + 0.5)[0]), every)


@pytest.mark.parametrize("levels", [0.0, 0.5, 1.0])
def test_plain_pictures_are_taken_by_their_type(levels: float) -> None:
    assert read(np.full((8, 8, 3), levels)).unique().tolist() == [2 * levels - 1]
    assert read(np.full((8, 8, 3), round(255 * levels), dtype=np.uint8)).unique().tolist() == [
        pytest.approx(2 * levels - 1, abs=0.004)
    ]


def test_latents_are_returned_as_they_are() -> None:
    latents = 3 * torch.randn(2, 4, 8, 8)
    for clean in (True, False):
        assert torch.equal(read(latents, clean), latents)
        assert torch.equal(read(list(latents), clean), latents)


# --- what is refused ----------------------------------------------------------------------------------------------

OK = torch.zeros(1, 3, 8, 8)
VALUES = "expected values from 0 to 1 in floating point, or uint8 from 0 to 255, found"
REFUSED: dict[str, tuple[Any, str]] = {
    "levels as floating point": (255 * SHARES, f"{VALUES} values from 0.*to 25"),
    "above 1": (SHARES + 0.5, f"{VALUES} values from 0.5.*to 1.49"),
    "below -1": (SHARES - 1.5, f"{VALUES} values from -1.49"),
    "NaN": (np.full((8, 8, 3), np.nan), "not finite"),
    "one infinity": (torch.where(torch.arange(8) == 3, torch.inf, 0.5).expand(1, 3, 8, 8), "not finite"),
    "NaN in latents": (torch.full((1, 4, 8, 8), torch.nan), "not finite"),
    "whole numbers": (LEVELS.astype(np.int64), f"{VALUES} int64"),
    "whole numbers in a tensor": (tensor(LEVELS).long(), f"{VALUES} int64"),
    "16 bits": (LEVELS.astype(np.uint16), f"{VALUES} uint16"),
    "yes and no": (LEVELS > 9, f"{VALUES} bool"),
    "yes and no in a tensor": (tensor(LEVELS) > 9, f"{VALUES} bool"),
    "objects": (LEVELS.astype(object), f"{VALUES} object"),
    "an array with channels first": (SHARES.transpose(0, 3, 1, 2), r"an array \(2, 3, 16, 24\): move the channels to"),
    "one array with channels first": (SHARES[0].transpose(2, 0, 1), r"an array \(3, 16, 24\): move the channels to"),
    "a tensor with channels last": (torch.from_numpy(SHARES), r"a tensor \(2, 16, 24, 3\): move the channels to the f"),
    "one tensor with channels last": (
        torch.from_numpy(SHARES[0]),
        r"a tensor \(16, 24, 3\): move the channels to the f",
    ),
    "grey": (SHARES[0, :, :, 0], r"expected a picture, its file, a tensor .* found an array \(16, 24\)"),
    "grey with a channel": (SHARES[..., :1], r"found an array \(2, 16, 24, 1\)"),
    "with alpha": (np.zeros((16, 24, 4), dtype=np.uint8), r"found an array \(16, 24, 4\)"),
    "with alpha, as a tensor": (torch.zeros(1, 4, 16, 24, dtype=torch.uint8), f"{VALUES} uint8"),
    "5 channels": (torch.zeros(1, 5, 8, 8), r"found a tensor \(1, 5, 8, 8\)"),
    "2 dimensions": (torch.zeros(8, 8), r"found a tensor \(8, 8\)"),
    "a number": (np.float32(3), "found float32"),
    "a number in a tensor": (torch.tensor(3.0), r"found a tensor \(\)"),
    "sides": (np.zeros((60, 64, 3)), "sides that are multiples of 8, found 60 x 64"),
    "several sizes": ([OK[0], torch.zeros(3, 8, 16)], r"one size, found \[\(8, 8\), \(8, 16\)\]"),
    "several types": ([OK, OK.byte()], r"one type, found \['torch.float32', 'torch.uint8'\]"),
    "pictures and arrays": ([Image.new("RGB", (8, 8)), OK], "found Image"),
    "a dict": ({"image": OK}, "found dict"),
    "none": ([], "expected a picture, or one for each prompt, found none"),
    "an empty batch": (OK[:0], "expected a picture, or one for each prompt, found none"),
    "an empty picture": (np.zeros((0, 8, 3)), "expected a picture, or one for each prompt, found none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_with_what_was_expected(case: str) -> None:
    image, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        read(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image", [OK, np.zeros((8, 8, 3)), Image.new("RGB", (8, 8)), [OK[0]], "a.png"])
def test_pictures_are_refused_where_noisy_latents_are_meant(image: Any) -> None:
    with pytest.raises(InputError, match=r"expected latents \(b,4,h,w\), since denoising_start and latents go on"):
        read(image, clean=False)
