"""What a safetensors file is that is no SDXL base or refiner, by the names of its tensors. Loaded only for such a file.

Names as ComfyUI's `model_detection.py` and diffusers' `single_file_utils.py` tell models by, and those of the tools
that write adapters.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import LABEL, Shapes

WHOLE = "expected the file of a whole model"
AS_LORA = "put it on a model: --lora FILE of sdxl-ref, or load_lora_weights in Python"
NOT_RUN = "this package runs bases, refiners and adapters of theirs"


class Kind(NamedTuple):
    """A kind of file: a pattern that is found in the name of one of its tensors, what it is, and what to do."""

    pattern: str
    what: str
    remedy: str = NOT_RUN


KINDS = (  # the first that is found counts: what stands inside another model's names comes before it
    Kind(r"^lora_controlnet$|^lllite_", "a ControlNet, as a LoRA"),
    Kind(
        r"^control_model\.|(^|\.)input_hint_block\.|(^|\.)zero_convs\.|(^|\.)controlnet_(cond_embedding|down_blocks|blocks)"
        r"|^control_add_embedding\.",
        "a ControlNet",
    ),
    Kind(r"^(ip_adapter|image_proj(_model)?)\.|\.to_[kv]_ip\.", "an IP-Adapter"),
    Kind(r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?(block1|in_conv)\.|^adapter\.(conv_in|body)\.", "a T2I-Adapter"),
    Kind(
        r"lora_(A|B|up|down|mid)\b|lora_linear_layer|lora_magnitude_vector|\.(hada_|lokr_|oft_|dora_scale|lora\.)|"
        r"^lora_(unet|te\d?)_",
        "an adapter (LoRA)",
        AS_LORA,
    ),
    Kind(r"(^|\.)motion_modules\.", "a motion module (AnimateDiff)"),
    Kind(r"(^|\.)(double_blocks\.\d+\.img_|single_transformer_blocks\.\d)", "a Flux model"),
    Kind(r"(^|\.)(joint_blocks\.\d|context_embedder\.)", "an SD 3 model"),
    Kind(r"^(clip_txt_mapper|effnet_mapper|clip_mapper)\.", "a Stable Cascade model"),
    Kind(r"(^|\.)(cap_embedder|double_layers\.\d|adaln_single|patchify_proj|t_embedder|txt_in)\.", "a transformer's"),
    Kind(r"(^|\.)cond_stage_model\.transformer\.", "an SD 1.x model"),
    Kind(r"(^|\.)cond_stage_model\.model\.", "an SD 2.x model"),
    Kind(r"^(emb_params|clip_[lg]|string_to_param.*|<.+>)$", "a textual inversion (an embedding)"),
    Kind(r"^latents$", "latents", "refine them: ImageToImagePipeline takes them as image="),
    Kind(r"^(taesd_)?(encoder|decoder)\.layers\.", "a small autoencoder (TAESD)"),
)
UNET = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|unet\.)?(input_blocks\.0\.0|conv_in)\.weight$")
DOWN = re.compile(r"(^|\.)(input_blocks\.\d|down_blocks\.\d)")
VAE = re.compile(r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid|mid_block|up|up_blocks|down_blocks)\.")
TEXT = re.compile(r"(^|\.)(text_model\.encoder\.layers|transformer\.resblocks)\.\d")
TO_K = re.compile(r"(input|down)_blocks\..*attn2\.to_k\.weight$")
CONTEXT_WIDTHS = {768: "an SD 1.x model", 1024: "an SD 2.x model"}  # of UNets without a vector


def kind_of(shapes: Shapes) -> Kind | None:
    """What a file with these tensors is; None where nothing is known of it."""
    for kind in KINDS:
        pattern = re.compile(kind.pattern)
        if any(pattern.search(key) for key in shapes):
            return kind
    has_unet = any(UNET.search(key) for key in shapes) and any(DOWN.search(key) for key in shapes)
    has_vae = any(VAE.search(key) for key in shapes)
    has_text = any(TEXT.search(key) for key in shapes)
    if has_unet:
        return other_unet(shapes) or (None if has_text else Kind("", "a UNet without text encoders", WHOLE))
    if has_vae and not has_text:
        return Kind("", "an autoencoder alone", "give it as --vae, or vae=, beside a model")
    return Kind("", "a text encoder alone", WHOLE) if has_text and not has_vae else None


def other_unet(shapes: Shapes) -> Kind | None:
    """Whose UNet it is, where it is not SDXL's, which alone reads a vector."""
    if any("label_emb." in key or "add_embedding." in key for key in shapes):
        return None
    widths = {shape[-1] for key, shape in shapes.items() if TO_K.search(key) and shape}
    return next((Kind("", what) for width, what in CONTEXT_WIDTHS.items() if width in widths), None)


PARTS = {  # of a folder in diffusers' layout, besides those of a base or a refiner
    "controlnet": "a ControlNet",
    "adapter": "a T2I-Adapter",
    "motion_adapter": "a motion module (AnimateDiff)",
    "image_encoder": "an image encoder (IP-Adapter)",
    "transformer": "a transformer (SD 3, Flux or another model)",
    "prior": "a prior (Stable Cascade or Kandinsky)",
}


def require_no_other_part(index: Mapping[str, object], where: object) -> None:
    """InputError where the index of a folder names a part that changes the picture and that we do not have."""
    for part, what in PARTS.items():
        if index.get(part) not in (None, [None, None]):
            raise InputError(f"{where} names a part {part}, {what}: {NOT_RUN}")


def refusal(path: object, shapes: Shapes) -> str:
    """The message for a file that is no SDXL checkpoint."""
    kind = kind_of(shapes)
    if kind is not None:
        return f"{path} is {kind.what}, no SDXL base or refiner: {kind.remedy}"
    stems = ", ".join(sorted({key.split(".")[0] for key in shapes})[:6]) or "no tensors"
    return f"{path} is no SDXL checkpoint in the official layout: no {LABEL}, found keys of {stems}"
