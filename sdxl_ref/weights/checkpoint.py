"""A checkpoint in the official layout: what it holds, and its parts, loaded strictly.

A file is opened by its header alone; tensors are mapped from it, and cast one by one, so that memory holds one copy
of the weights in the wanted dtype. `sdxl_ref.weights.opening` opens a checkpoint of any kind.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
