"""Painting in a part of a picture: what stays is the picture's own bit for bit, whatever the sampler."""

from pathlib import Path
from typing import Any

import numpy as np
import pairs
import pytest
import torch
from cases import diagonal
from PIL import Image
from torch import Tensor

from sdxl_ref import SAMPLERS
from sdxl_ref.config import InputError
from sdxl_ref.diffusion.masks import Mask
from sdxl_ref.pictures.images import to_tensor
from sdxl_ref.pipelines.masking import read

SIZE = (96, 128)
CELLS = torch.zeros(1, 1, 12, 16, dtype=torch.bool)  # of the mask below
CELLS[..., 3:9, 5:13] = True
PIPELINES = {"refiner": pairs.refiner, "base": pairs.base, "ensemble": pairs.ensemble}


def mask(*, blurred: bool = False) -> Image.Image:
    """A rectangle of whole cells; or one pixel less on each side, with a margin of grey."""
    pixels = np.zeros(SIZE, dtype=np.uint8)
    if blurred:
        pixels[25:71, 41:103] = 128
        pixels[40:56, 56:88] = 255
    else:
        pixels[24:72, 40:104] = 255
    return Image.fromarray(pixels)


def run(kind: str, **arguments: Any) -> Any:
    call = pairs.request(**{"mask_image": mask(), "generator": pairs.seeds(7), "strength": 0.6} | arguments)
    if kind == "ensemble":
        call.setdefault("switch", 0.7)
    return PIPELINES[kind]()(**call).images


def clean() -> Tensor:
    """The picture's latents as a run samples them."""
    pipe = pairs.refiner()  # both models have one VAE
    image = to_tensor(pairs.picture())
    with torch.no_grad():
        return pipe.encode_image(image, pairs.seeds(7))


@pytest.mark.parametrize(("kind", "sampler"), diagonal(list(PIPELINES), list(SAMPLERS)))
def test_outside_is_bit_equal(kind: str, sampler: str) -> None:
    """With the hand-off inside the ensemble's run; and inside the mask something else is painted."""
    latents = run(kind, sampler=sampler)
    inside = CELLS.expand_as(latents)
    assert latents[~inside].equal(clean()[~inside])
    assert (latents - clean())[inside].abs().median() > 0.01


def test_pixels_that_stay_are_pasted() -> None:
    """In the decoded picture too, where the edge of a cell lies outside of the mask."""
    pixels = np.array(mask())
    pixels[20:72, 37:104] = 255  # no whole cells
    [picture] = run("refiner", mask_image=Image.fromarray(pixels), output_type="pil")
    original = np.asarray(pairs.picture())
    assert np.array_equal(np.asarray(picture)[pixels == 0], original[pixels == 0])
    assert not np.array_equal(np.asarray(picture)[pixels > 0], original[pixels > 0])


def test_a_cell_is_painted_where_any_pixel_of_it_is() -> None:
    pixels = np.zeros(SIZE, dtype=np.uint8)
    pixels[31, 47] = 1  # the last pixel of a cell
    latents = run("refiner", mask_image=Image.fromarray(pixels), sampler="euler")
    same = (latents == clean()).all(1)[0]  # (h,w)
    assert (~same).nonzero().tolist() == [[3, 5]]


def test_a_blurred_edge_blends_the_estimates() -> None:
    weight = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
    picture, estimate = torch.randn(2, 1, 4, 1, 3, generator=pairs.seeded(0))
    masked = Mask(weight, picture, lambda images: images).around(lambda x, sigma: estimate)
    blended = masked(torch.zeros(1, 4, 1, 3), torch.tensor(1.0))
    assert blended[..., 0].equal(picture[..., 0])
    assert blended[..., 2].equal(estimate[..., 2])
    torch.testing.assert_close(blended[..., 1], 0.75 * picture[..., 1] + 0.25 * estimate[..., 1])
    whole, soft = run("base"), run("base", mask_image=mask(blurred=True))
    assert not whole.equal(soft)
    assert soft[~CELLS.expand_as(soft)].equal(clean()[~CELLS.expand_as(soft)])


def test_a_run_that_stops_above_zero_keeps_the_noise_of_the_picture() -> None:
    """There the last latents are noisy everywhere, for another run to go on from."""
    stopped = run("base", denoising_end=0.8, sampler="euler")
    outside = ~CELLS.expand_as(stopped)
    sigma = pairs.base().plan(pairs.base().request(**pairs.request(strength=0.6, denoising_end=0.8))).grid.sigmas[-1]
    noise = (stopped - clean())[outside] / sigma
    assert 0.9 < float(noise.std()) < 1.1


def test_one_mask_for_all_pictures_or_one_for_each() -> None:
    pictures = [pairs.picture(), pairs.picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    flipped = mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = run("refiner", image=pictures, generator=pairs.seeds(7, 8), mask_image=[mask(), flipped])
    first = run("refiner", image=pictures, generator=pairs.seeds(7, 8))
    assert both[0].equal(first[0])
    assert not both[1].equal(first[1])
    one = run("refiner", mask_image=mask())
    torch.testing.assert_close(one[0], first[0], rtol=0, atol=1e-4)  # a batch sums in another order


@pytest.mark.parametrize("form", ["file", "array", "uint8", "boolean", "tensor", "of channels"])
def test_forms(form: str, tmp_path: Path) -> None:
    """All that a mask may be are the same mask."""
    pixels = np.array(mask())
    forms: dict[str, Any] = {
        "array": pixels / 255.0,
        "uint8": pixels,
        "boolean": pixels > 0,
        "tensor": torch.from_numpy(pixels).float() / 255,
        "of channels": torch.from_numpy(pixels)[None, None],
    }
    mask().save(tmp_path / "mask.png")
    assert read(forms.get(form, tmp_path / "mask.png")).equal(read(mask()))


def test_a_mask_is_cropped_with_its_picture() -> None:
    picture = pairs.picture().resize((131, 101))
    wide = Image.new("L", (131, 101))
    wide.paste(255, (1, 2, 9, 10))  # the first cell of what is left: one column and two rows go
    assert read(wide, picture)[0, 0].nonzero().tolist() == read(wide.crop((1, 2, 129, 98)))[0, 0].nonzero().tolist()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"mask_image": Image.new("L", (64, 64))}, r"the picture's size 128x96, found 64x64 \(width x"),
    "another size of an array": ({"mask_image": np.ones((64, 64))}, r"size \(96, 128\), found \(64, 64\)"),
    "empty": ({"mask_image": Image.new("L", (128, 96))}, "black everywhere, so that nothing would be painted"),
    "full": ({"mask_image": Image.new("L", (128, 96), 255)}, "leaves nothing as it is: leave mask_image out"),
    "not a number": ({"mask_image": torch.full(SIZE, float("nan"))}, "found values from nan to nan"),
    "255 in floating point": ({"mask_image": torch.full(SIZE, 255.0)}, "found values from 255 to 255"),
    "three channels": ({"mask_image": torch.ones(1, 3, *SIZE)}, r"found Tensor \(1, 3, 96, 128\)"),
    "a number": ({"mask_image": 1}, "expected a mask as .*, found int"),
    "noisy latents": (
        {"image": torch.zeros(1, 4, 12, 16), "strength": None, "denoising_start": 0.5},
        "a mask wants the picture without noise",
    ),
    "an empty one of two": (
        {
            "image": [pairs.picture()] * 2,
            "mask_image": [mask(), Image.new("L", (128, 96))],
            "generator": pairs.seeds(1, 2),
        },
        "black everywhere",
    ),
    "two for one": ({"mask_image": [mask(), mask()]}, "expected one mask, or one for each of 1 pictures, found 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        run("refiner", **arguments)
