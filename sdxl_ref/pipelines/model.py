"""The networks of one checkpoint: opened, moved, shared between pipelines."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import Module

from sdxl_ref.config import SDXL, Defaults, InputError, ModelConfig, unknown
from sdxl_ref.pipelines.calling import CallablePipeline
from sdxl_ref.weights.checkpoint import PARTS, Checkpoint, prefixes
from sdxl_ref.weights.opening import open_checkpoint

if TYPE_CHECKING:
    from sdxl_ref.weights.offload import Offload

Self = TypeVar("Self", bound="Model")
Dtype = torch.dtype | None
KINDS = {"refiner": "refiner (one text encoder, aesthetic score)", "base": "base (two text encoders, target size)"}


class Model(CallablePipeline):
    """The networks of one checkpoint. `text_encoder` is CLIP-L (None on a refiner), `text_encoder_2` OpenCLIP bigG.

    Every part may be replaced (compiled, fine-tuned); it is looked up when a run starts.
    """

    kinds: tuple[str, ...]  # what it runs, "base" or "refiner"; the first one is what "pocket" is

    def __init__(
        self,
        config: ModelConfig,
        unet: Module,
        vae: Module,
        text_encoder_2: Module,
        text_encoder: Module | None = None,
        checkpoint: Checkpoint | None = None,
        defaults: Defaults = SDXL,
        offload: "Offload | None" = None,
    ) -> None:
        super().__init__()
        self.check(config)
        self.config = config
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.checkpoint = checkpoint
        self.defaults = defaults
        self.offload = offload  # where parts come when they work
        self.tiles_vae = False  # whether the VAE works by tiles
        self.inversions: Any = None  # words that stand for vectors: see `prompts`
        self.vae_scale_factor = int(2 ** (len(config.vae.ch_mult) - 1))  # how many times smaller a latent's side is

    @classmethod
    def check(cls, config: ModelConfig, path: str | Path = "") -> None:
        """InputError where this pipeline cannot run a model of this configuration."""
        if config.kind not in cls.kinds:
            check_kind(cls.kinds[0], config, path)

    @classmethod
    def open(cls, name: str | Path | Checkpoint, variant: str | None = None, **hub: Any) -> Checkpoint:
        """Open a checkpoint without reading its weights. InputError unless this pipeline can run it."""
        checkpoint = open_checkpoint(name, cls.kinds[0], variant=variant, **hub)
        cls.check(checkpoint.config, checkpoint.path)
        return checkpoint

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path | Checkpoint,
        *,
        variant: str | None = None,
        torch_dtype: Dtype = None,
        dtype: Dtype = None,
        vae_dtype: Dtype = None,
        device: Any = "cpu",
        prediction: str | None = None,
        offload: "Offload | None" = None,
        use_safetensors: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **parts: Any,
    ) -> Self:
        """Open a file, a folder in diffusers' layout, "pocket", a repository of the hub, or an open checkpoint.

        Weights are float32 unless `dtype` (or `torch_dtype`) says otherwise; the VAE's, which overflows in float16,
        at least float32 unless `vae_dtype` does. `variant` ("fp16") picks files such as `model.fp16.safetensors`.
        `prediction` ("epsilon" or "v") is what the UNet returns, in place of what the file says. `parts` (`vae=`,
        `text_encoder_2=`, …) are shared instead of loaded; `vae` may also be the path of one. With `offload`, an
        `Offload`, each part is read when it works and dropped for the next.
        """
        if not use_safetensors:
            raise InputError("only safetensors files are opened, never a pickle: leave use_safetensors=False out")
        hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        for part in parts.keys() - PARTS:
            names = [*PARTS, *(cls.from_pretrained.__kwdefaults__ or ())]
            raise TypeError(f"{cls.__name__}: {unknown('argument', part, names)}")
        checkpoint = cls.open(name, variant, vae=parts.get("vae"), **hub)
        if isinstance(parts.get("vae"), str | Path):
            del parts["vae"]  # it is the checkpoint's now
        config = checkpoint.config
        if prediction is not None:
            config = replace(config, prediction=prediction)
        if "vae" in parts:  # its scale, and what it makes of a picture
            config = replace(config, vae=getattr(parts["vae"], "config", config.vae))
        dtype = dtype or torch_dtype or torch.float32
        if unusable := parts.keys() - prefixes(config).keys():
            raise InputError(f"an SDXL {config.kind} has no {' and no '.join(sorted(unusable))}: leave it out")
        for part in prefixes(config):
            if part in parts:
                continue
            part_dtype = vae_dtype or torch.promote_types(dtype, torch.float32) if part == "vae" else dtype
            if offload is None:
                parts[part] = checkpoint.load(part, part_dtype, device)
            else:
                parts[part] = offload.read(checkpoint, part, part_dtype)
        return cls(config, **parts, checkpoint=checkpoint, defaults=checkpoint.defaults, offload=offload)

    from_single_file = from_pretrained

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a dtype or both, as `torch.nn.Module.to`; a dtype leaves the VAE as it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if self.offload is not None and device is not None:
            raise InputError("the parts come to a device when they work, and cannot be moved to another one")
        for network in (self.unet, self.text_encoder, self.text_encoder_2):
            if network is not None:
                network.to(device=device, dtype=dtype)
        self.vae.to(device=device)
        return self

    @property
    def autoencoder(self) -> Any:
        """The VAE, in bands of rows where it is to need less memory: see `enable_vae_tiling`."""
        return self.tiled_vae() if self.tiles_vae else self.vae

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        if self.offload is not None:
            return self.offload.device
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype


def check_kind(kind: str, config: ModelConfig, path: str | Path = "") -> None:
    """InputError for a base where a refiner is expected, and the other way round."""
    if config.kind != kind:
        where = f": {path}" if path else ""
        raise InputError(f"expected a {KINDS[kind]}, found an SDXL {config.kind}{where}")
