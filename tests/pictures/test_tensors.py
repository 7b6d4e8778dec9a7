"""Pictures to tensors and back: exact levels, and those of diffusers."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ref.pictures.images import from_tensor, to_tensor

RNG = np.random.default_rng(0)


def test_tensors_are_in_minus_one_to_one() -> None:
    corners = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [0, 0, 51]]], dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(corners))
    assert tensor.shape == (1, 3, 2, 2)
    assert tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert tensor[0, :, 0, 1].tolist() == [1, 1, 1]
    assert tensor[0, :, 1, 0].tolist() == [1, -1, -1]
    assert tensor[0, 2, 1, 1] == pytest.approx(-0.6)


def test_every_level_survives_the_round_trip() -> None:
    levels = np.stack([RNG.permutation(256) for _ in range(3)], axis=1).astype(np.uint8).reshape(16, 16, 3)
    [image] = from_tensor(to_tensor(Image.fromarray(levels)) * 0.5 + 0.5)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), levels)


def test_from_tensor_rounds_to_the_nearest_level_and_clips() -> None:
    values = torch.tensor([-3.0, 0.0, 0.4, 0.6, 127.4, 254.6, 255.0, 999.0]) / 255
    [image] = from_tensor(values.expand(1, 3, 1, -1))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 127, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_from_tensor_takes_other_dtypes_and_batches(dtype: torch.dtype) -> None:
    batch = torch.tensor([0.0, 1.0, 0.5]).reshape(3, 1, 1, 1).expand(3, 3, 2, 4).to(dtype)
    images = from_tensor(batch)
    assert [image.getpixel((1, 1)) for image in images] == [(0, 0, 0), (255, 255, 255), (128, 128, 128)]
    assert images[0].size == (4, 2)


def test_tensors_are_those_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=8)
    image = Image.fromarray(RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    assert torch.equal(to_tensor(image), processor.preprocess(image))
    decoded = torch.randn((3, 3, 24, 40), generator=torch.Generator().manual_seed(0))
    theirs = processor.postprocess(decoded, output_type="pil")
    for ours, peer in zip(from_tensor(decoded * 0.5 + 0.5), theirs, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(peer))
