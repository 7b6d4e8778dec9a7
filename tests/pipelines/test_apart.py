"""`batch_invariant`: the same bits whatever is in the batch."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from cases import diagonal

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.samplers import SAMPLERS
from sdxl_ref.pipelines import EnsemblePipeline, ImageToImagePipeline, TextToImagePipeline

PROMPTS = ["a barn", "a cup of coffee", "a dog"]
SIZE = 72, 40  # pixels: latents of 9 x 5, whose numbers fill no vector of a CPU evenly


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline(kind: str, dtype: torch.dtype, packed: bool) -> Any:
    base = TextToImagePipeline(peers.TINY_BASE, **peers.networks(peers.TINY_BASE))
    refiner = ImageToImagePipeline(peers.TINY_REFINER, **peers.networks(peers.TINY_REFINER))
    pipe = {"base": base, "refiner": refiner}.get(kind) or EnsemblePipeline(base, refiner)
    pipe.to(dtype)
    if packed:
        pipe.pack()
    return pipe


def run(pipe: Any, places: list[int], **options: Any) -> torch.Tensor:
    """Pictures of some of three jobs, each with its own prompts, seed, picture and scale."""
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(7))
    given: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1]}
    if isinstance(pipe, ImageToImagePipeline) and pipe.config.kind == "refiner":
        masks = torch.zeros(3, *SIZE)
        masks[:, :30, :20] = torch.linspace(0.3, 1, 20)
        given = {"image": images[places], "mask_image": masks[places], "strength": 0.7}
    given["negative_prompt"] = [f"no {PROMPTS[i]}" for i in places]
    scales = torch.tensor([2.0, 5.0, 3.0])
    return pipe(
        [PROMPTS[i] for i in places],
        generator=generators(*places),
        guidance_scale=scales[places],
        guidance_rescale=0.5,
        num_inference_steps=4,
        output_type="pt",
        batch_invariant=True,
        **(given | options),
    ).images


@pytest.mark.parametrize(
    ("kind", "dtype", "packed", "threads"),
    diagonal(["base", "refiner", "ensemble"], [torch.float32, torch.bfloat16], [False, True], [1, 2]),
)
def test_a_picture_does_not_depend_on_its_batch(kind: str, dtype: torch.dtype, packed: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if packed and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("this CPU packs no bfloat16")
        pipe = pipeline(kind, dtype, packed)
        together = run(pipe, [0, 1, 2])
        for places in ([0], [2], [1, 0], [2, 1]):
            assert torch.equal(run(pipe, places), together[places])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sampler", diagonal(list(SAMPLERS)))
def test_with_every_sampler(sampler: str) -> None:
    pipe = pipeline("ensemble", torch.float32, packed=False)
    together = run(pipe, [0, 1], sampler=sampler)
    assert torch.equal(run(pipe, [1], sampler=sampler), together[1:])


def test_several_pictures_of_a_prompt_and_embeds() -> None:
    """Each prompt serves pictures in a row; embeds that are handed in are taken apart as prompts are."""
    pipe = pipeline("base", torch.float32, packed=False)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt", "batch_invariant": True}
    together = pipe(PROMPTS[:2], num_images_per_prompt=2, generator=generators(0, 1, 2, 3), **size).images
    assert torch.equal(pipe(PROMPTS[1], generator=generators(2), **size).images, together[2:3])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = zip(*(pipe.encode_prompt(prompt) for prompt in PROMPTS[:2]), strict=True)
    handed = {name: torch.cat(both) for name, both in zip(names, embeds, strict=True)}
    assert torch.equal(
        pipe(num_images_per_prompt=2, generator=generators(0, 1, 2, 3), **handed, **size).images, together
    )


def test_texts_that_do_not_go_round() -> None:
    pipe = pipeline("base", torch.float32, packed=False)
    with pytest.raises(InputError, match=r"expected one prompt, or one for each image, found 2 for 3"):
        run(pipe, [0, 1, 2], negative_prompt=["no barn", "no cup"])
