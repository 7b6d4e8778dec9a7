"""Open a folder in diffusers' layout: one subfolder a part, with its configuration and its weights, sharded or not.

Names and shapes are translated by `sdxl_ref.weights.layouts` as tensors are read; nothing is converted beforehand.
Source: `DiffusionPipeline.from_pretrained` in diffusers, `PreTrainedModel.from_pretrained` in transformers.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sdxl_ref.config import InputError
from sdxl_ref.weights.checkpoint import Checkpoint, prefixes
from sdxl_ref.weights.fitting import check, is_extra
from sdxl_ref.weights.folder_config import model_config
from sdxl_ref.weights.folder_scheduler import read_scheduler
from sdxl_ref.weights.json_files import read_json
from sdxl_ref.weights.layouts import Rule, part_rules
from sdxl_ref.weights.tensor_files import PICKLES, Header, open_tensors, read_headers, read_metadata

EXTRAS_FILE = "official_extras.safetensors"  # what an official file holds and this layout has no place for
STEMS = ("diffusion_pytorch_model", "model")
SHARD = re.compile(r"-\d+-of-\d+")
OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))  # the VAE's names


class Stored(NamedTuple):
    """Where a tensor of the folder lies, under which name, and what its header says."""

    path: Path
    name: str
    header: Header


class Source(NamedTuple):
    """The tensors that make an official one, and the rule that does; None: the one tensor as it is."""

    rule: Rule | None
    tensors: list[Stored]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the official tensor."""
        shapes = [stored.header.shape for stored in self.tensors]
        first = shapes[0]
        if self.rule is not None and self.rule.kind == "transpose":
            return first[::-1]
        if self.rule is not None and self.rule.kind == "pointwise":
            return (*first, 1, 1) if len(first) == 2 else first
        return (sum(shape[0] for shape in shapes), *first[1:]) if len(shapes) > 1 else first


@dataclass(frozen=True)
class Folder(Checkpoint):
    """A checkpoint whose tensors lie in several files, under other names; `sources` has those of each official key."""

    sources: Mapping[str, Source] = field(default_factory=dict)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its official key; files stay mapped until the context ends."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def read(key: str) -> Tensor:
                rule, stored = self.sources[key]
                tensors = []
                for path, name, _ in stored:
                    if path not in files:
                        files[path] = stack.enter_context(open_tensors(path))
                    tensors.append(files[path].get_tensor(name))
                return tensors[0] if rule is None else rule.join(tensors).contiguous()

            yield read

    def files(self, prefix: str = "") -> list[Path]:
        """The files that hold the official keys with a prefix, in the order of their names."""
        return sorted(
            {stored.path for key, source in self.sources.items() if key.startswith(prefix) for stored in source.tensors}
        )


def open_folder(folder: Path, variant: str | None = None) -> Folder:
    """Open a folder with a `model_index.json`. `variant` picks files such as `model.fp16.safetensors`.

    InputError for another architecture, missing or damaged files, an index that points elsewhere, and as
    `open_checkpoint` raises it.
    """
    config = model_config(folder)
    prediction, defaults = read_scheduler(folder, config.kind)
    config = replace(config, prediction=prediction)
    sources: dict[str, Source] = {}
    unexpected: dict[str, tuple[int, ...]] = {}
    notes = [] if prediction == "epsilon" else [f"the UNet returns {prediction}, by the scheduler's settings"]
    for part, prefix in prefixes(config).items():
        _, rules = part_rules(part, config)
        file, note = weights_file(folder / part, variant)
        if note:
            notes.append(f"{part}: {note}")
        stored = tensors_of(file)
        for rule in rules:
            tensors = [stored.pop(name_in_file(name, stored), None) for name in rule.other]
            if tensors and None not in tensors:
                sources[prefix + rule.official] = Source(rule, [tensor for tensor in tensors if tensor is not None])
        unexpected |= {f"{part}/{name}": () for name in stored if not name.endswith("position_ids")}
    sources |= official_extras(folder / EXTRAS_FILE, prefixes(config)["text_encoder_2"] + "logit_scale")
    shapes = {key: source.shape for key, source in sources.items()}
    check(config, shapes | unexpected, folder)
    metadata = read_metadata(folder / EXTRAS_FILE) if (folder / EXTRAS_FILE).exists() else {}
    return Folder(folder, config, shapes, metadata, "; ".join(notes), defaults, sources)


def official_extras(path: Path, logit_scale: str) -> dict[str, Source]:
    """What our own conversion kept of an official file beside the parts; empty where there is no such file."""
    if not path.exists():
        return {}
    extras = {}
    for name, header in read_headers(path).items():
        if name != logit_scale and not is_extra(name):
            raise InputError(f"{path} holds {name}, expected what the parts have no place for: delete the file")
        extras[name] = Source(None, [Stored(path, name, header)])
    return extras


def name_in_file(name: str, names: Mapping[str, Any]) -> str:
    """The name that a file has for a tensor, which may be an older one, or a newer one."""
    for other in (name, name.removeprefix("text_model."), *(name.replace(*pair) for pair in OLD_ATTENTION)):
        if other in names:
            return other
    return name


def part_tensors(folder: Path, variant: str | None) -> dict[str, Stored]:
    """Every tensor of a part by the name that it has there."""
    file, _ = weights_file(folder, variant)
    return tensors_of(file)


def tensors_of(file: Path) -> dict[str, Stored]:
    """Every tensor of a file, or of the shards of an index, by the name that it has there."""
    return stored_in(file) if file.suffix == ".safetensors" else sharded(file)


def weights_file(folder: Path, variant: str | None) -> tuple[Path, str]:
    """The file of a part's weights, or the index of its shards, and a note where it is another than was asked for."""
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    found, note = choose(names, variant)
    if len(found) != 1:
        raise InputError(_no_single_file(folder, variant, names, found))
    return folder / found[0], note


def choose(names: Collection[str], variant: str | None) -> tuple[list[str], str]:
    """The files of weights (an index counts as one) among names of a part's folder, as a variant is asked for.

    A part without the variant has its plain file instead; without a variant asked for the only one there is is taken.
    """
    found = weights_of(names, variant)
    if found:
        return found, ""
    if variant:
        return weights_of(names, None), f"there is no variant {variant!r}, the plain file is used"
    variants = variants_in(names)
    if len(variants) != 1:
        return [], ""
    return weights_of(names, variants[0]), f"there is the variant {variants[0]!r} alone, which is used"


def weights_of(names: Collection[str], variant: str | None) -> list[str]:
    """Among these, the single files and the indices of a variant, or the plain ones."""
    middle = f".{variant}" if variant else ""
    known = [
        name for stem in STEMS for name in (f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json")
    ]
    return [name for name in known if name in names]


def variants_in(names: Collection[str]) -> list[str]:
    """The variants that there are single files or indices of."""
    pattern = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.([\w-]+)\.safetensors|\.safetensors\.index\.([\w-]+)\.json)")
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    return sorted({match[1] or match[2] for match in matches if not SHARD.search(match[0])})


def _no_single_file(folder: Path, variant: str | None, names: Collection[str], found: Sequence[str]) -> str:
    wanted = f"weights of variant {variant!r}" if variant else "weights"
    if found:
        return f"expected one file of {wanted} in {folder}, found {', '.join(found)}: remove one"
    hint = "complete the folder"
    if variants := variants_in(names):
        hint = f"there are the variants {', '.join(variants)}: name one"
    if any(name.endswith(PICKLES) for name in names):
        hint = "pickles are not opened: get the safetensors files"
    return f"expected {wanted} as safetensors in {folder}, found {', '.join(sorted(names)[:4]) or 'nothing'}: {hint}"


def sharded(index: Path) -> dict[str, Stored]:
    """The tensors of an index, each in the shard that it names, which has to lie beside it."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: expected a weight_map from tensors to shards, found none")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {shard!r}: expected a safetensors file in the same folder")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} names the shard {shard}, which is not there: complete the folder")
        tensors |= stored_in(index.parent / shard)
    absent = [name for name in shard_of if name not in tensors or tensors[name].path.name != shard_of[name]]
    if absent:
        raise InputError(f"{index} names {len(absent)} tensors that its shards do not hold: {', '.join(absent[:3])}")
    return tensors


def stored_in(path: Path) -> dict[str, Stored]:
    return {name: Stored(path, name, header) for name, header in read_headers(path).items()}


def sources_of(checkpoint: Checkpoint) -> dict[str, Source]:
    """Where each official tensor of a checkpoint of any kind lies, and what the headers say of it."""
    if isinstance(checkpoint, Folder):
        return dict(checkpoint.sources)
    return {name: Source(None, [stored]) for name, stored in stored_in(checkpoint.path).items()}
