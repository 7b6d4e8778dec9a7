"""A checkpoint in the official layout: what it holds, and its parts, loaded strictly.

A file is opened by its header alone; tensors are mapped from it, and cast one by one, so that memory holds one copy
of the weights in the wanted dtype. `sdxl_ref.weights.opening` opens a checkpoint of any kind.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdxl_ref.config import BASE_1_0, REFINER_1_0, SDXL, Defaults, InputError, ModelConfig
from sdxl_ref.networks.openclip_g import LOGIT_SCALE, OpenCLIPTextEncoder
from sdxl_ref.networks.unet import UNet
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.weights.tensor_files import Header, open_tensors, sha256_of, stamp

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # of a pipeline; a refiner has no text_encoder
CONFIG_KEY = "sdxl_ref.config"  # where a file's metadata carries the configuration of a small model
SETTINGS_KEY = "sdxl_ref.folder"  # and how a folder said that its model is run, from which it was converted
EXTRAS = re.compile(  # what files may carry besides the weights, and no network of ours reads
    r"denoiser\.sigmas|(first_stage_model\.)?model_ema\..*|first_stage_model\.loss\..*|"
    r"conditioner\.embedders\.\d+\.model\.attn_mask|(.*\.)?(position_ids|logit_scale)|"
    r"conditioner\.embedders\.0\.(.*\.)?text_projection(\.weight)?|"  # of CLIP-L; a refiner's is a weight
    r"betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_[a-z0-9_]+|lvlb_weights|logvar"  # schedules
)
KNOWN_FILES = {  # sha256 -> the file and its VAE; the 0.9 VAE stands in files of its own
    "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f": ("sd_xl_refiner_1.0", "1.0"),
    "8d0ce6c016004cbdacd50f937dad381d8c396628d621a7f97191470532780164": ("sd_xl_refiner_1.0_0.9vae", "0.9"),
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": ("sd_xl_base_1.0", "1.0"),
    "e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff": ("sd_xl_base_1.0_0.9vae", "0.9"),
}
LABEL = "model.diffusion_model.label_emb.0.0.weight"  # its shape tells a base from a refiner
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # of the metadata; ComfyUI's is the second
READ_AT_ONCE = 64  # tensors; mapped pages count as memory until their file is closed
Shapes = Mapping[str, tuple[int, ...]]


def prefixes(config: ModelConfig) -> dict[str, str]:
    """The official key prefix of each part, under the part's name in a pipeline."""
    parts = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    if config.kind == "base":
        parts["text_encoder"] = "conditioner.embedders.0.transformer."
    parts["text_encoder_2"] = f"conditioner.embedders.{len(config.text_encoders) - 1}.model."
    return parts


def build(part: str, config: ModelConfig) -> nn.Module:
    """The network of a part, freshly initialised. The one place that imports CLIP-L, which a refiner does not have."""
    if part == "unet":
        return UNet(config.unet)
    if part == "vae":
        return AutoencoderKL(config.vae)
    if part == "text_encoder":
        from sdxl_ref.networks.clip_l import CLIPTextEncoder

        return CLIPTextEncoder(config.text_encoders[0])
    return OpenCLIPTextEncoder(config.text_encoders[-1])


class _Uninitialised(TorchFunctionMode):
    """No initial values are drawn: on the meta device that would import sympy, which takes 2 seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_empty(part: str, config: ModelConfig) -> nn.Module:
    """The network of a part on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _Uninitialised():
        return build(part, config)


@dataclass(frozen=True)
class Checkpoint:
    """A file whose keys and shapes have been found to be those of `config`. `note` says what had to be assumed.

    `stamps` tell whether its files are still those that were opened.
    """

    path: Path
    config: ModelConfig
    shapes: Shapes
    metadata: Mapping[str, str]
    note: str = ""
    defaults: Defaults = SDXL
    stamps: dict[Path, tuple[int, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.stamps.update((path, stamp(path)) for path in self.files())

    def files(self, prefix: str = "") -> list[Path]:
        """The files that hold the keys with a prefix."""
        return [self.path]

    @property
    def name(self) -> str:
        """What the file is, in words."""
        known = replace(self.config, prediction="epsilon") in (REFINER_1_0, BASE_1_0)
        return f"SD-XL 1.0 {self.config.kind} (by its keys and shapes)" if known else f"SDXL-like {self.config.kind}"

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its key; what it returns may be mapped until the context ends."""
        with open_tensors(self.path) as file:
            yield file.get_tensor

    def load(self, part: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """One part (a key of `prefixes`), for inference: in eval mode, without gradients."""
        network = build_empty(part, self.config)
        self.fill(network, part, dtype, device)
        return network.eval().requires_grad_(False)

    def fill(self, network: nn.Module, part: str, dtype: torch.dtype, device: torch.device | str) -> None:
        """Give a network of this part its weights, in place of those that it has (or has not: on the meta device)."""
        prefix = prefixes(self.config)[part]
        keys = list(network.state_dict())
        state = {}
        for i in range(0, len(keys), READ_AT_ONCE):
            with self.reader() as read:
                for key in keys[i : i + READ_AT_ONCE]:
                    is_there = prefix + key in self.shapes  # `logit_scale` is optional, see `check`
                    tensor = read(prefix + key) if is_there else torch.tensor(LOGIT_SCALE)
                    state[key] = tensor.to(device=device, dtype=dtype)
        self.require_unchanged()
        network.load_state_dict(state, strict=True, assign=True)

    def vae_name(self, digest: str) -> str:
        """Which VAE a file holds: its release where the file's sha256 is known, and always a hash of its tensors."""
        tensors = hashlib.sha256()
        prefix = prefixes(self.config)["vae"]
        keys = [key for key in expected_shapes(self.config) if key.startswith(prefix) and key in self.shapes]
        with self.reader() as read:
            for key in sorted(keys):
                tensors.update(read(key).contiguous().view(torch.uint8).numpy().data)
        self.require_unchanged()
        _, release = KNOWN_FILES.get(digest, ("", "unknown"))
        return f"{release}, tensors sha256 {tensors.hexdigest()}"

    def sha256(self) -> str:
        """Of all the files, one behind the other in the order of their names. InputError as `require_unchanged`."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = sha256_of(*self.files())
        self.require_unchanged()
        return digest

    def changed(self) -> list[Path]:
        """The files that are not those any more that were opened: replaced meanwhile, or written to."""
        return [path for path, opened in self.stamps.items() if stamp(path) != opened]

    def require_unchanged(self) -> None:
        """InputError where a file has changed: what is read of it now goes with nothing that was read before."""
        if paths := self.changed():
            raise InputError(f"{paths[0]} has changed since it was opened: start again")


def identify(headers: Mapping[str, Header], metadata: Mapping[str, str]) -> ModelConfig | None:
    """The configuration that a file carries, or that of the official model whose sizes it has."""
    if CONFIG_KEY in metadata:
        from sdxl_ref.weights.stated_config import config_from_json

        return config_from_json(metadata[CONFIG_KEY])
    for config in (REFINER_1_0, BASE_1_0):
        if LABEL in headers and headers[LABEL].shape == (4 * config.unet.model_channels, config.unet.adm_in_channels):
            return config
    return None


def is_plain(config: ModelConfig, headers: Mapping[str, Header], metadata: Mapping[str, str]) -> bool:
    """Whether a file holds this configuration's tensors and known extras, and nothing says that it predicts otherwise.

    `logit_scale` may be missing.
    """
    expected = expected_shapes(config)
    weights = {key: header for key, header in headers.items() if key in expected or not EXTRAS.fullmatch(key)}
    shapes: dict[str, tuple[int, ...]] = {key: () for key in expected if key.endswith(".logit_scale")}
    shapes |= {key: header.shape for key, header in weights.items()}
    is_float = all("F" in header.dtype for header in weights.values())  # no I64, U8, BOOL, …
    predictions = {metadata.get(key, config.prediction) for key in PREDICTION_KEYS}
    if CONFIG_KEY in metadata:
        from sdxl_ref.weights.stated_config import misfit

        is_float = is_float and not misfit(config)
    return shapes == expected and is_float and predictions == {config.prediction} and SETTINGS_KEY not in metadata


@lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Shapes:
    """The keys and shapes of all parts, `logit_scale` included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, prefix in prefixes(config).items():
        state = build_empty(part, config).state_dict()
        shapes |= {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    return MappingProxyType(shapes)
