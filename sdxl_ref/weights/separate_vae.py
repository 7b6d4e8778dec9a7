"""An autoencoder of its own beside a checkpoint: in place of the one that the checkpoint has, or where it has none.

Read from a file in official names (alone, or a whole checkpoint), from one in diffusers' names, old or new, from a
folder of the VAE, or from a pipeline's folder. Loaded only where `vae=` or `--vae` names one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sdxl_ref.config import InputError, ModelConfig, VAEConfig
from sdxl_ref.weights.checkpoint import CONFIG_KEY, Checkpoint, build_empty, prefixes
from sdxl_ref.weights.fitting import by_sides, require_fit
from sdxl_ref.weights.folder import Folder, Source, Stored, name_in_file, part_tensors, sources_of, stored_in
from sdxl_ref.weights.folder_config import part_config
from sdxl_ref.weights.identify import vae_config as config_of_shapes
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.layouts import Rule, rules, vae_to_official
from sdxl_ref.weights.names import find_file
from sdxl_ref.weights.stated_config import config_from_json
from sdxl_ref.weights.strangers import kind_of
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, read_metadata

PREFIXES = ("", "first_stage_model.", "vae.", "model.first_stage_model.", "module.")  # before official names
FIRST = "encoder.conv_in.weight"
EXPECTED = "expected an SDXL autoencoder, in official or diffusers' names"
State = Mapping[str, Stored]


@dataclass(frozen=True)
class WithVAE(Folder):
    """A checkpoint with another autoencoder. Its sha256 is that of `original`: the autoencoder's stands in its name."""

    original: Checkpoint | None = None

    def sha256(self) -> str:
        assert self.original is not None
        return self.original.sha256()


def with_vae(checkpoint: Checkpoint, path: Path, variant: str | None = None) -> Checkpoint:
    """The checkpoint with the autoencoder that lies at a path. InputError where there is none that fits.

    Its latents are scaled as its own configuration says; where it has none, as the checkpoint's.
    """
    stored, own = read_vae(path, variant)
    config = replace(checkpoint.config, vae=vae_config(stored, own, checkpoint.config, path))
    require_fit(config, path)
    prefix = prefixes(config)["vae"]
    kept = {key: source for key, source in sources_of(checkpoint).items() if not key.startswith(prefix)}
    sources = kept | {prefix + key: source for key, source in vae_sources(stored, config, path).items()}
    shapes = {key: source.shape for key, source in sources.items()}
    known = (checkpoint.metadata, checkpoint.note, checkpoint.defaults)
    return WithVAE(checkpoint.path, config, shapes, *known, sources, checkpoint)


def read_vae(path: Path, variant: str | None = None) -> tuple[dict[str, Stored], VAEConfig | None]:
    """The tensors at a path by their names there, without a prefix; and the configuration that lies beside them."""
    if not path.exists():
        raise InputError(f"no such file or folder: {path}: {EXPECTED}")
    if (path / FOLDER_INDEX).is_file():
        path /= "vae"
    json = path / "config.json"
    if json.is_file():
        return part_tensors(path, variant), part_config("vae", json, read_json(json))
    file = find_file(path)
    text = read_metadata(file).get(CONFIG_KEY)
    return stored_in(file), config_from_json(text).vae if text else None


def vae_config(stored: State, own: VAEConfig | None, model: ModelConfig, path: Path) -> VAEConfig:
    """The sizes of an autoencoder: its own configuration's, or else those that its shapes tell."""
    if own is not None:
        return own
    names = without_prefix(stored)
    if FIRST not in names:
        kind = kind_of({name: tensor.header.shape for name, tensor in stored.items()})
        raise InputError(f"{path} is {kind.what if kind else 'no autoencoder'}: {EXPECTED}")
    try:
        sizes = config_of_shapes(vae_to_official({name: tensor.header.shape for name, tensor in names.items()}))
    except (KeyError, IndexError, ZeroDivisionError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole autoencoder ({error!r}): {EXPECTED}") from error
    return replace(sizes, scale_factor=model.vae.scale_factor)


def without_prefix(stored: State) -> dict[str, Stored]:
    """The tensors of an autoencoder by their names without what stands before all of them."""
    prefix = next((prefix for prefix in PREFIXES if prefix + FIRST in stored), "")
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def vae_sources(stored: State, config: ModelConfig, path: Path) -> dict[str, Source]:
    """Where each tensor of the autoencoder lies, by its name without the official prefix.

    Its attention may be stored as matrices in place of 1x1 kernels. InputError for what is missing or misshapen.
    """
    names = without_prefix(stored)
    state = build_empty("vae", config).state_dict()
    sources = {}
    for rule in rules("vae", state, config.vae):
        name = rule.official if rule.official in names else name_in_file(rule.other[0], names)
        tensor = names.get(name)
        expected = tuple(state[rule.official].shape)
        if tensor is None:
            raise InputError(f"{path} lacks {rule.official} of an autoencoder: {EXPECTED}")
        source = Source(Rule(rule.official, (tensor.name,), rule.kind), [tensor])
        if source.shape != expected or "F" not in tensor.header.dtype:
            found = f"{by_sides(source.shape)} in {tensor.header.dtype}"
            raise InputError(f"{path}: {tensor.name} is {found}: expected {by_sides(expected)} in floating point")
        sources[rule.official] = source
    return sources
