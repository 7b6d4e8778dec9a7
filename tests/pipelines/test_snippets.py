"""The calls of diffusers' SDXL documentation and of the model cards, with the import line changed.

Each runs, or says in one line what to do. Source: docs/source/en/using-diffusers/sdxl.md, and the model cards of base
and refiner. Repositories are small seeded files here, addresses the photo that ships, and the device is the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import diffusers
import peers
import pytest
import torch
from cases import sample
from PIL import Image

from sdxl_ref import DiffusionPipeline, ImageToImagePipeline, TextToImagePipeline, load_image
from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint_saving import save_checkpoint

NAMES = {  # what the changed import lines give
    "torch": torch,
    "load_image": load_image,
    "DiffusionPipeline": DiffusionPipeline,
    "AutoPipelineForText2Image": TextToImagePipeline,
    "AutoPipelineForImage2Image": ImageToImagePipeline,
    "AutoPipelineForInpainting": ImageToImagePipeline,
    "StableDiffusionXLPipeline": TextToImagePipeline,
    "StableDiffusionXLImg2ImgPipeline": ImageToImagePipeline,
    "StableDiffusionXLInpaintPipeline": ImageToImagePipeline,
    "DPMSolverMultistepScheduler": diffusers.DPMSolverMultistepScheduler,
}
WORDS = {  # what is put in the place of what only a large machine has
    '"stabilityai/stable-diffusion-xl-base-1.0"': "BASE",
    '"stabilityai/stable-diffusion-xl-refiner-1.0"': "REFINER",
    '"./sd_xl_base_1.0.safetensors"': "BASE",
    '"./sd_xl_refiner_1.0.safetensors"': "REFINER",
    'torch_dtype=torch.float16, variant="fp16"': "torch_dtype=torch.float32",
    '"cuda"': '"cpu"',
    "_cpu_offload()": '_cpu_offload("cpu")',
    'mode="reduce-overhead"': 'backend="eager"',
}
BASE = """
pipe = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16, variant="fp16", use_safetensors=True
).to("cuda")
"""
BOTH = """
base = DiffusionPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16, variant="fp16", use_safetensors=True
)
refiner = DiffusionPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-refiner-1.0",
    text_encoder_2=base.text_encoder_2,
    vae=base.vae,
    torch_dtype=torch.float16, variant="fp16",
    use_safetensors=True,
)
"""
RUN = {
    "single files": """
pipe = StableDiffusionXLPipeline.from_single_file("./sd_xl_base_1.0.safetensors", torch_dtype=torch.float32).to("cuda")
refiner = StableDiffusionXLImg2ImgPipeline.from_single_file("./sd_xl_refiner_1.0.safetensors", use_safetensors=True)
image = refiner.to("cuda")("a fox", image=load_image(PHOTO), num_inference_steps=4).images[0]
""",
    "text to image": BASE
    + """
image = pipe(prompt="a fox in the snow", num_inference_steps=2).images[0]
""",
    "image to image by from_pipe": BASE
    + """
pipeline = AutoPipelineForImage2Image.from_pipe(pipe).to("cuda")
init_image = load_image(PHOTO).convert("RGB")
image = pipeline("a fox", image=init_image, strength=0.8, guidance_scale=10.5, num_inference_steps=2).images[0]
""",
    "image to image by components": BASE
    + """
pipeline = StableDiffusionXLImg2ImgPipeline(**pipe.components)
image = pipeline("a fox", image=load_image(PHOTO), strength=0.8, num_inference_steps=2).images[0]
""",
    "inpainting": BASE
    + """
pipeline = AutoPipelineForInpainting.from_pipe(pipe).to("cuda")
mask_image = load_image(MASK).convert("RGB")
image = pipeline(
    prompt="a fox", image=load_image(PHOTO), mask_image=mask_image, strength=0.85, guidance_scale=12.5,
    num_inference_steps=2,
).images[0]
""",
    "two experts": BOTH
    + """
base.to("cuda")
refiner.to("cuda")
image = base(prompt="a fox", num_inference_steps=5, denoising_end=0.8, output_type="latent").images
image = refiner(prompt="a fox", num_inference_steps=5, denoising_start=0.8, image=image).images[0]
""",
    "a finished picture refined": BOTH
    + """
image = base(prompt="a fox", num_inference_steps=2, output_type="latent").images[0]
image = refiner(prompt="a fox", num_inference_steps=4, image=image[None, :]).images[0]
""",
    "two prompts and negative ones": BASE
    + """
image = pipe(
    prompt="a fox", prompt_2="an oil painting", negative_prompt="blurry", negative_prompt_2="grey",
    num_inference_steps=2,
).images[0]
""",
    "sizes and crops": BASE
    + """
image = pipe(prompt="a fox", crops_coords_top_left=(256, 0), num_inference_steps=2).images[0]
image = pipe(
    prompt="a fox", negative_original_size=(512, 512), negative_crops_coords_top_left=(0, 0),
    negative_target_size=(1024, 1024), num_inference_steps=2,
).images[0]
""",
    "offload": BOTH
    + """
base.enable_model_cpu_offload()
image = base(prompt="a fox", num_inference_steps=2).images[0]
""",
    "offload by layers": BASE.replace('.to("cuda")', "")
    + """
pipe.enable_sequential_cpu_offload()
image = pipe(prompt="a fox", num_inference_steps=2).images[0]
""",
    "compiled": BASE
    + """
pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
image = pipe(prompt="a fox", num_inference_steps=1, spacing="trailing").images[0]
""",
    "what is not needed": BASE
    + """
pipe.enable_xformers_memory_efficient_attention()
pipe.enable_attention_slicing()
pipe.enable_vae_slicing()
pipe.upcast_vae()
image = pipe(prompt="a fox", num_inference_steps=2).images[0]
""",
    "callbacks, a tuple, no bar": BASE
    + """
pipe.set_progress_bar_config(disable=True)

def stop(pipeline, i, t, callback_kwargs):
    pipeline._interrupt = i == 1
    return callback_kwargs

(images,) = pipe(
    "a fox", num_inference_steps=3, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latents"],
    generator=[torch.Generator("cuda").manual_seed(0)], return_dict=False,
)
image = images[0]
""",
    "saved and opened": BASE
    + """
pipe.save_pretrained(FOLDER, safe_serialization=True)
image = DiffusionPipeline.from_pretrained(FOLDER)("a fox", num_inference_steps=2).images[0]
""",
}
REFUSED = {
    "another scheduler": (
        BASE
        + """
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
""",
        AttributeError,
        r"the call takes sampler=, spacing=, karras=.*sampler=\"dpmpp_2m\", spacing=\"leading\", karras=True",
    ),
    "a watermark as diffusers asks for it": (
        BASE.replace("use_safetensors=True", "add_watermarker=False"),
        TypeError,
        "argument 'add_watermarker'",
    ),
    "pickles": (
        'StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", use_safetensors=False)',
        InputError,
        "leave use_safetensors=False out",
    ),
    "a base where a refiner's score is given": (
        BASE + 'pipe("a fox", aesthetic_score=7.0, num_inference_steps=2)',
        InputError,
        "aesthetic_score is of no use to an SDXL base: leave it out",
    ),
    "inpainting with two experts": (
        BOTH
        + """
image = base(prompt="a fox", num_inference_steps=5, denoising_end=0.8, output_type="latent").images
image = refiner(
    prompt="a fox", image=image, mask_image=load_image(MASK), num_inference_steps=5, denoising_start=0.8
).images[0]
""",
        InputError,
        "a mask wants the picture without noise: give image and strength, or use EnsemblePipeline",
    ),
    "an IP-Adapter": (BASE + 'pipe.load_ip_adapter("h94/IP-Adapter")', AttributeError, "are not supported"),
    "FreeU": (BASE + "pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)", AttributeError, "in forward hooks on"),
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a snippet's names stand for."""
    folder = tmp_path_factory.mktemp("snippets")
    for kind, config in (("base", peers.TINY_BASE), ("refiner", peers.TINY_REFINER)):
        small = replace(config, resolution=64)
        save_checkpoint(folder / f"{kind}.safetensors", small, peers.networks(small), torch.float16)
    Image.open(str(files("sdxl_ref") / "data" / "photo.jpg")).resize((64, 64)).save(folder / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(folder / "mask.png")
    paths = {"PHOTO": folder / "photo.png", "MASK": folder / "mask.png", "FOLDER": folder / "saved"}
    paths |= {"BASE": folder / "base.safetensors", "REFINER": folder / "refiner.safetensors"}
    return NAMES | {name: str(path) for name, path in paths.items()}


def run(snippet: str, names: dict[str, Any]) -> dict[str, Any]:
    for theirs, here in WORDS.items():
        snippet = snippet.replace(theirs, here)
    own = dict(names)
    exec(compile(snippet, "snippet", "exec"), own)
    return own


@pytest.mark.filterwarnings("ignore:.* is not needed and changes nothing", 'ignore:"leading" with . steps')
@pytest.mark.parametrize("snippet", sample(RUN, *(RUN.keys() - {"compiled"})))
def test_a_snippet_runs(snippet: str, names: dict[str, Any]) -> None:
    image = run(RUN[snippet], names)["image"]
    assert isinstance(image, Image.Image)
    assert image.size == (64, 64)


@pytest.mark.parametrize("snippet", REFUSED)
def test_a_snippet_says_what_to_do(snippet: str, names: dict[str, Any]) -> None:
    code, error_type, message = REFUSED[snippet]
    with pytest.raises(error_type, match=message) as error:
        run(code, names)
    assert "\n" not in str(error.value)
