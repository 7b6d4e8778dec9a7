"""Open a checkpoint in the official layout, tell what it is, and load its parts strictly.

A file is opened by its header alone; tensors are mapped from it, and cast one by one, so that memory holds one copy
of the weights in the wanted dtype. Only safetensors is opened, never a pickle.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdxl_ref.config import BASE_1_0, REFINER_1_0, InputError, ModelConfig
from sdxl_ref.networks.openclip_g import LOGIT_SCALE, OpenCLIPTextEncoder
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL

CONFIG_KEY = "sdxl_ref.config"  # where a file's metadata carries the configuration of a small model
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
EXTRAS = re.compile(  # what official files may carry besides the weights, and no network of ours reads
    r"denoiser\.sigmas|conditioner\.embedders\.\d+\.(model\.attn_mask|"
    r"transformer\.text_model\.embeddings\.position_ids)|model_ema\..*"
)
KNOWN_FILES = {  # sha256 -> the file and its VAE; the 0.9 VAE stands in files of its own
    "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f": ("sd_xl_refiner_1.0", "1.0"),
    "8d0ce6c016004cbdacd50f937dad381d8c396628d621a7f97191470532780164": ("sd_xl_refiner_1.0_0.9vae", "0.9"),
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": ("sd_xl_base_1.0", "1.0"),
    "e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff": ("sd_xl_base_1.0_0.9vae", "0.9"),
}


def prefixes(config: ModelConfig) -> dict[str, str]:
    """The official key prefix of each part, under the part's name in a pipeline."""
    parts = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    if config.kind == "base":
        parts["text_encoder"] = "conditioner.embedders.0.transformer."
    parts["text_encoder_2"] = f"conditioner.embedders.{len(config.text_encoders) - 1}.model."
    return parts


def build(part: str, config: ModelConfig) -> nn.Module:
    """The network of a part, freshly initialised."""
    if part == "unet":
        return UNet(config.unet)
    if part == "vae":
        return AutoencoderKL(config.vae)
    if part == "text_encoder":
        from sdxl_ref.networks.clip_l import CLIPTextEncoder  # a refiner has none

        return CLIPTextEncoder(config.text_encoders[0])
    return OpenCLIPTextEncoder(config.text_encoders[-1])


class _Empty(TorchFunctionMode):
    """On the meta device, with no initial values: drawing these there would import sympy, at 2 seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_empty(part: str, config: ModelConfig) -> nn.Module:
    """The network of a part on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _Empty():
        return build(part, config)


@dataclass(frozen=True)
class Checkpoint:
    """A file whose keys and shapes have been found to be those of `config`. `note` says what had to be assumed."""

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    note: str = ""

    @property
    def name(self) -> str:
        """What the file is, in words."""
        known = self.config in (REFINER_1_0, BASE_1_0)
        return f"SD-XL 1.0 {self.config.kind} (by its keys and shapes)" if known else f"SDXL-like {self.config.kind}"

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its key; what it returns may be mapped until the context ends."""
        with safe_open(self.path, framework="pt") as file:
            yield file.get_tensor

    def load(self, part: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """One part (a key of `prefixes`), for inference: in eval mode, without gradients."""
        network, prefix = build_empty(part, self.config), prefixes(self.config)[part]
        state, keys = {}, list(network.state_dict())
        for i in range(0, len(keys), 64):  # mapped pages count as memory until their file is closed
            with self.reader() as read:
                for key in keys[i : i + 64]:
                    found = prefix + key in self.shapes  # `logit_scale` is optional, see `check`
                    tensor = read(prefix + key) if found else torch.tensor(LOGIT_SCALE)
                    state[key] = tensor.to(device=device, dtype=dtype)
        network.load_state_dict(state, strict=True, assign=True)
        return network.eval().requires_grad_(False)

    def vae_name(self, digest: str) -> str:
        """Which VAE a file holds: its release where the file's sha256 is known, and always a hash of its tensors."""
        tensors, prefix = hashlib.sha256(), prefixes(self.config)["vae"]
        with self.reader() as read:
            for key in sorted(key for key in self.shapes if key.startswith(prefix)):
                tensors.update(read(key).contiguous().view(torch.uint8).numpy().data)
        return f"{KNOWN_FILES.get(digest, ('', 'unknown'))[1]}, tensors sha256 {tensors.hexdigest()}"

    def sha256(self) -> str:
        """Of the whole file."""
        return sha256_of(self.path)


def sha256_of(*paths: Path, start: int = 0) -> str:
    """Of files, one behind the other, each from byte `start` on; read once, in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def open_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Open a safetensors file in the official layout, a folder with just one of these, or one in diffusers' layout."""
    try:
        if os.path.isfile(Path(path) / "model_index.json"):
            from sdxl_ref.folder import open_folder

            return open_folder(Path(path), variant)
        path = Path(path)
        if path.suffix.lower() in PICKLES or not os.path.isfile(path):
            from sdxl_ref.folder import find_file

            path = find_file(path)
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            whole = [key for key in shapes if "F" not in file.get_slice(key).get_dtype() and not EXTRAS.fullmatch(key)]
            metadata = dict(file.metadata() or {})
        config, note = identify(shapes, metadata, path)
        check(config, shapes, path)
        if whole:  # I64, U8, BOOL, …
            raise InputError(f"{path}: expected weights in floating point, found {len(whole)} others, as {whole[0]}")
    except InputError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a whole safetensors file, could not read {path}: {error}") from error
    except Exception as error:  # no network can be built of such sizes
        raise InputError(f"{path}: its configuration or its shapes make no SDXL network ({error!r})") from error
    return Checkpoint(path, config, shapes, metadata, note)


def identify(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], path: Path) -> tuple[ModelConfig, str]:
    """The configuration that a file carries, or else that its shapes tell, with a note on what was assumed."""
    if CONFIG_KEY in metadata:
        return ModelConfig.from_json(metadata[CONFIG_KEY]), ""
    label = "model.diffusion_model.label_emb.0.0.weight"
    if label not in shapes:
        found = ", ".join(sorted({key.split(".")[0] for key in shapes})[:6]) or "no tensors"
        raise InputError(f"{path} is no SDXL checkpoint in the official layout: no {label}, found keys of {found}")
    for config in (REFINER_1_0, BASE_1_0):
        if shapes[label] == (4 * config.unet.model_channels, config.unet.adm_in_channels):
            return config, ""
    from sdxl_ref.identify import config_from_shapes

    config = config_from_shapes(shapes)
    return config, f"no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"


def check(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Every key of every part there, in its shape, and nothing else but known extras; `logit_scale` may be missing."""
    expected: dict[str, tuple[int, ...]] = {}
    for part, prefix in prefixes(config).items():
        state = build_empty(part, config).state_dict()
        expected |= {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    found = {key: shape for key, shape in shapes.items() if not EXTRAS.fullmatch(key)}
    found |= {key: () for key in expected if key.endswith(".logit_scale") and key not in found}
    if found != expected:
        from sdxl_ref.identify import differences

        problems = differences(expected, found)
        raise InputError(f"{path} looks like an SDXL {config.kind}, but its tensors do not fit: {problems}")
