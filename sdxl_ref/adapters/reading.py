"""An adapter's file as layers: its tensors sorted by layer and role, in any form, and what they make.

Kinds beyond the usual two factors are imported only when a file has them.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from sdxl_ref.adapters.change import Change
from sdxl_ref.adapters.factors import factors_of
from sdxl_ref.adapters.form import Role, Settings
from sdxl_ref.adapters.forms import FORMS
from sdxl_ref.adapters.layer import Layer
from sdxl_ref.adapters.peft_settings import CONFIG_FILE
from sdxl_ref.config import InputError
from sdxl_ref.weights.regular import read_text
from sdxl_ref.weights.tensor_files import PICKLES, open_tensors, read_metadata

ROLES: dict[str, str] = {
    suffix: role for form in FORMS.values() for role, suffixes in form.suffixes.items() for suffix in suffixes
}
FACTORS: tuple[Role, ...] = ("down", "up", "mid")
DONE = "LoRA, LoCon, DoRA, LoHa, LoKr or whole differences"
FILE_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'
EMBEDDING = re.compile(r"bundle_emb\.(.+)\.[^.]+")  # an embedding in an adapter's file: a word of the prompt


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or the one in a folder. InputError where a folder has none or many."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    known = [file for file in files if file.name in FILE_NAMES]
    if len(known) == 1:
        return known[0]
    if len(files) != 1:
        names = ", ".join(file.name for file in known or files)
        pickles = "pickles alone, which are not opened" if any(map(is_pickle, path.iterdir())) else "none"
        found = f"{names or pickles}: {'name a file' if names else 'get the safetensors file'}"
        raise InputError(f"{path} is a folder: expected one adapter's safetensors file in it, found {found}")
    return files[0]


def is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES


def read(path: str | Path) -> dict[str, Change]:
    """The changes of a file by the names that it gives the layers, with `.bias` behind them for biases.

    `path` is a file or a folder with one. InputError for what is no adapter, a broken one, or one of a kind that is not
    done here. Embeddings in it are left out: `embeddings_in` lists them.
    """
    file = adapter_file(path)
    with open_tensors(file) as opened:
        keys = [key for key in opened.keys() if not EMBEDDING.fullmatch(key)]  # noqa: SIM118
        state = {key: opened.get_tensor(key) for key in keys}
    try:
        return changes_of(state, texts_of(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except Exception as error:  # shapes and metadata of any kind
        raise InputError(f"{file} is a broken adapter: its factors make no LoRA ({error!r})") from error


def texts_of(file: Path) -> dict[str, str]:
    """The texts of a file's header, and PEFT's configuration where that lies beside it, under its name."""
    texts = read_metadata(file)
    beside = file.with_name(CONFIG_FILE)
    if os.path.lexists(beside):
        texts[CONFIG_FILE] = read_text(beside)
    return texts


def embeddings_in(path: str | Path) -> list[str]:
    """The names of the embeddings that stand in an adapter's file."""
    with open_tensors(adapter_file(path)) as opened:
        matches = [EMBEDDING.fullmatch(key) for key in opened.keys()]  # noqa: SIM118
    return sorted({match[1].removesuffix(".string_to_param") for match in matches if match})


def changes_of(state: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Change]:
    """The changes that tensors make, with what the texts of their file say."""
    all_settings = [form.settings(texts) for form in FORMS.values()]
    settings = [one for one in all_settings if one is not None]
    changes: dict[str, Change] = {}
    for name, roles in by_layer(state).items():
        for one in settings:
            one.check(name, roles)
        changes |= changes_of_layer(Layer(name, roles, partial(alpha_of, name, roles, settings)))
    return changes


def changes_of_layer(layer: Layer) -> dict[str, Change]:
    """What one layer changes. The one place that imports the kinds beyond the usual factors, when a file has them."""
    if layer.roles.keys() <= {*FACTORS, "alpha"}:
        return {layer.name: factors_of(layer)}
    from sdxl_ref.adapters import kinds

    has_factors = any(role in layer.roles for role in FACTORS)
    return kinds.changes(layer, factors_of(layer) if has_factors else None)


def alpha_of(name: str, roles: Mapping[str, Tensor], settings: Sequence[Settings], rank: int) -> float:
    """The alpha of a layer: its own tensor's, else what its file's texts say, else the rank."""
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise InputError(f"layer {name} has an alpha of {roles['alpha'].numel()} numbers, expected one")
        alpha = float(roles["alpha"])
        if not math.isfinite(alpha):
            raise InputError(f"layer {name} has alpha {alpha}, expected a finite number")
        return alpha
    told = (one.alpha(name, rank) for one in settings)
    return next((alpha for alpha in told if alpha is not None), float(rank))


def by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and role. InputError for a key of no form, or a factor that is there twice."""
    layers: dict[str, dict[str, Tensor]] = {}
    names = {key: plain(key) for key in state}
    roles = roles_in(names)
    ends = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, sorted(roles, key=len, reverse=True))) + ")")
    strange = []
    for key, tensor in state.items():
        match = ends.fullmatch(names[key])
        if match is None:
            strange.append(key)
            continue
        name = match[1]
        role = roles[match[2]]
        if role in layers.setdefault(name, {}):
            raise InputError(f"it holds the {role} factor of {name} twice, under two names: one is {key}")
        layers[name][role] = tensor
    if strange or not layers:
        raise InputError(refusal(strange, state))
    return layers


def plain(key: str) -> str:
    """A key without what the tools of any form put around the layer's name."""
    for form in FORMS.values():
        key = form.plain(key)
    return key


def roles_in(names: Mapping[str, str]) -> dict[str, str]:
    """The roles by the ends of keys; those of kinds beyond the usual factors only where a key has no other end."""
    ends = tuple(f".{suffix}" for suffix in ROLES)
    if all(name.endswith(ends) for name in names.values()):
        return ROLES
    from sdxl_ref.adapters import kinds

    return ROLES | kinds.ROLES


def refusal(strange: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """Why a file is none that is read here, by the keys that no form has."""
    from sdxl_ref.adapters import unsupported

    for key in strange:
        kind = unsupported.kind_of(key, state[key].ndim)
        if kind is not None:
            return f"it is {kind}, which is not done here: expected {DONE}, found {key}"
    whose = ", ".join(owner for form in FORMS.values() for owner in form.whose)
    keys = ", ".join(strange[:3]) or "no tensors"
    return f"it is no LoRA in {whose} or official names: found {keys}"
