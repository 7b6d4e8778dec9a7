"""Open a file that is not simply as the official ones are, and say what is wrong where it is no model.

A prefix before all names, the autoencoder's attention as matrices, a v-prediction by a marker or by the header, sizes
that only the shapes tell, no autoencoder: such files come from other tools. Loaded only for them. Markers as ComfyUI's
`supported_models.py` reads them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdxl_ref.config import SDXL, InputError, ModelConfig
from sdxl_ref.weights.checkpoint import (
    CONFIG_KEY,
    LABEL,
    PREDICTION_KEYS,
    SETTINGS_KEY,
    Checkpoint,
    Shapes,
    expected_shapes,
    identify,
)
from sdxl_ref.weights.fitting import V_MARKER, check, require_fit
from sdxl_ref.weights.folder import Folder, Source, Stored
from sdxl_ref.weights.folder_scheduler import kept_settings
from sdxl_ref.weights.identify import config_from_shapes
from sdxl_ref.weights.layouts import Rule, part_rules
from sdxl_ref.weights.strangers import refusal
from sdxl_ref.weights.tensor_files import Header

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LAST = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model."
SPELLINGS = {  # of what a UNet returns, in the metadata
    "v": ("v", "v_prediction", "v-prediction", "v_pred", "vpred", "v-pred", "velocity"),
    "epsilon": ("epsilon", "eps", "eps_prediction", "noise", ""),
}
REFUSED_MARKERS = {  # tensors that say how a model has to be run, and how that is
    "ztsnr": "its noise ends without any signal left (zero terminal SNR)",
    "edm_mean": "its latents and noise levels are EDM's (as Playground 2.5's)",
    "edm_std": "its latents and noise levels are EDM's (as Playground 2.5's)",
    "edm_vpred.sigma_max": "its noise levels are EDM's (as CosXL's)",
    "edm_vpred.sigma_min": "its noise levels are EDM's (as CosXL's)",
}
ASSUMED = f"no {CONFIG_KEY} in the metadata: sizes read from the shapes, 64 channels a head assumed"
NO_VAE = "holds no VAE: give one as --vae FILE, or vae= in Python"


def open_unusual(
    path: Path, headers: Mapping[str, Header], metadata: Mapping[str, str], config: ModelConfig | None, has_vae: bool
) -> Checkpoint:
    """Open a file by its headers. `config`: as its metadata or its label says. See `open_file`."""
    stored = without_prefix({key: Stored(path, key, header) for key, header in headers.items()}, path)
    shapes = {key: tensor.header.shape for key, tensor in stored.items()}
    if LABEL not in shapes or not any(key.startswith("conditioner.") for key in shapes):
        raise InputError(refusal(path, shapes))
    refuse_markers(shapes, path)
    config = config or identify({key: tensor.header for key, tensor in stored.items()}, metadata)
    notes = [] if config else [ASSUMED]
    config = with_channels(config or sizes_of(shapes, path), shapes)
    require_fit(config, path)
    prediction, source = prediction_of(config, shapes, metadata, path)
    if source:
        notes.append(f"the UNet returns {prediction}, by {source}")
    defaults = SDXL
    if SETTINGS_KEY in metadata:
        said, defaults = kept_settings(path, metadata, config.kind)
        prediction = "v" if said == "v" else prediction
    config = replace(config, prediction=prediction)
    sources = official_sources(config, stored)
    require_weights(config, sources, path, has_vae)
    shapes = {key: source.shape for key, source in sources.items()}
    note = "; ".join(notes)
    if all(source.rule is None and source.tensors[0].name == key for key, source in sources.items()):
        return Checkpoint(path, config, shapes, metadata, note, defaults)
    return Folder(path, config, shapes, metadata, note, defaults, sources)


def without_prefix(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The tensors by their official keys, where one prefix stands before all of them (`model.`, `state_dict.`)."""
    prefix = next((key.removesuffix(LABEL) for key in stored if key.endswith(LABEL)), "")
    if LABEL in stored:
        prefix = ""
    without = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    if len(without) < len(stored):
        raise InputError(
            f"{path} holds tensors twice, with and without {prefix} before their names: remove one of them"
        )
    return without


def sizes_of(shapes: Shapes, path: Path) -> ModelConfig:
    """The configuration that the shapes tell. InputError where they tell none."""
    try:
        return config_from_shapes(shapes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def refuse_markers(shapes: Shapes, path: Path) -> None:
    """InputError for a model whose noise levels are not SDXL's."""
    for marker, meaning in REFUSED_MARKERS.items():
        if marker in shapes:
            raise InputError(f"{path} has the marker {marker}: {meaning}, which no schedule of this package runs")


def with_channels(config: ModelConfig, shapes: Shapes) -> ModelConfig:
    """The configuration with the channels into and out of the UNet that is there: others mean another model."""
    first = shapes.get(FIRST, ())
    last = shapes.get(LAST, ())
    if len(first) != 4 or len(last) != 4:
        return config  # `check` says so
    return replace(config, unet=replace(config.unet, in_channels=first[1], out_channels=last[0]))


def prediction_of(config: ModelConfig, shapes: Shapes, metadata: Mapping[str, str], path: Path) -> tuple[str, str]:
    """What the UNet returns, and what says so besides the configuration: "" where nothing does.

    Where two disagree it is v: "epsilon" is often a default that nobody chose. InputError for another prediction.
    """
    if V_MARKER in shapes:
        return "v", f"the marker {V_MARKER}"
    for key in PREDICTION_KEYS:
        word = metadata.get(key, "").strip().lower()
        if not any(word in words for words in SPELLINGS.values()):
            raise InputError(f"{path} predicts {metadata[key]!r:.60} by its {key}: expected epsilon or v")
        if word in SPELLINGS["v"]:
            return "v", f"{key} in the metadata"
    if config.prediction == "v" and any(metadata.get(key) for key in PREDICTION_KEYS):
        return "v", f"{CONFIG_KEY} in the metadata, although {PREDICTION_KEYS[0]} is epsilon"
    return config.prediction, ""


def official_sources(config: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """Each tensor by its official key; the VAE's attention may be stored as matrices in place of 1x1 kernels."""
    _, rules = part_rules("vae", config)
    attention = {VAE + rule.official for rule in rules if rule.kind == "pointwise"}
    sources = {}
    for key, tensor in stored.items():
        is_matrix = key in attention and len(tensor.header.shape) == 2
        rule = Rule(key, (tensor.name,), "pointwise") if is_matrix else None
        sources[key] = Source(rule, [tensor])
    return sources


def require_weights(config: ModelConfig, sources: Mapping[str, Source], path: Path, has_vae: bool) -> None:
    """InputError unless there are all tensors, each in its shape and in floating point, and nothing else but extras.

    has_vae: they may lack all of the VAE's.
    """
    expected = expected_shapes(config)
    shapes = {key: source.shape for key, source in sources.items()}
    if not any(key.startswith(VAE) for key in shapes.keys() & expected.keys()):
        if not has_vae:
            raise InputError(f"{path} {NO_VAE}")
        shapes |= {key: shape for key, shape in expected.items() if key.startswith(VAE)}
    check(config, shapes, path)
    dtypes = {key: source.tensors[0].header.dtype for key, source in sources.items() if key in expected}
    whole = [key for key, dtype in dtypes.items() if "F" not in dtype]  # I64, U8, BOOL, …
    if whole:
        raise InputError(f"{path}: expected weights in floating point, found {len(whole)} others, as {whole[0]}")
