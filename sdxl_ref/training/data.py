"""Training data: a folder of captioned pictures, SDXL's aspect buckets, and a cache of what the networks make of them.

Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3 (sizes, crops, aspect buckets) and appendix I (the
40 buckets); the folder with `metadata.jsonl` is the convention of the datasets library's `imagefolder`.
Shapes: b batch, h w of the latents, d of the context, e of the pooled vector, k numbers. Sizes are (height, width).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.checkpoint import sha256_of
from sdxl_ref.conditioning import Numbers, encode_text
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.images import load_image, to_tensor
from sdxl_ref.pipelines.pipeline import check_finite
from sdxl_ref.saving import clear, write

METADATA = "metadata.jsonl"
LINE = '{"file_name": "cup.png", "text": "a cup of coffee"}'  # what a line of it looks like
TABLE = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344
768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832
1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512
2048x512
"""
SCORE = 6.0  # told to a refiner of a picture whose score is not known
ROWS = 64  # at most, in a shard
RULES = 1  # raised whenever the same picture, caption and weights come to other rows: older shards are made again
Size = tuple[int, int]
Row = tuple[dict[str, Any], dict[str, Tensor]]  # what it was made of and its key, its tensors


@dataclass(frozen=True)
class Example:
    """A line of `metadata.jsonl`."""

    path: Path
    text: str
    aesthetic_score: float | None = None


def read_folder(folder: Path) -> list[Example]:
    """The lines of a folder's `metadata.jsonl`, in their order. A picture may have several, each with its caption.

    A line has `file_name` (relative to the folder), `text`, and optionally `aesthetic_score`. InputError names the
    line that has not, or whose picture is not there.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder of pictures: {folder}")
    path = folder / METADATA
    if not path.is_file():
        raise InputError(f"expected {METADATA} in {folder}, found none: write a line for each picture, as {LINE}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a caption may hold U+2028
    except (OSError, ValueError) as error:
        raise InputError(f"could not read {path} as UTF-8 text: {error}") from error
    examples = [_example(folder, line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise InputError(f"{path} is empty: write a line for each picture, as {LINE}")
    return examples


def _example(folder: Path, line: str, place: str) -> Example:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{place}: expected JSON as {LINE}, found {line.strip()[:60]!r}")
    for field in ("file_name", "text"):
        if not isinstance(found.get(field), str) or not (found[field] or field == "text"):
            raise InputError(f"{place}: expected {field}, a text, found {found.get(field)!r}: write it as in {LINE}")
    name, score = found["file_name"], found.get("aesthetic_score")
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise InputError(f"{place}: expected a file_name inside {folder}, found {name!r}: move the picture there")
    if not os.path.isfile(folder / name):
        raise InputError(f"{place}: no such picture in {folder}: {name!r}")
    if score is not None and (type(score) not in (int, float) or not abs(score) < 1e9):
        raise InputError(f"{place}: expected a finite number as aesthetic_score, found {score!r}: mend it or omit it")
    return Example(folder / name, found["text"], None if score is None else float(score))


def buckets(resolution: int) -> list[Size]:
    """SDXL's 40 aspect buckets, scaled from 1024 to the resolution of a model; their sides are multiples of 8."""
    if resolution < 128 or resolution % 128:
        raise InputError(f"expected a model's resolution, for its buckets a multiple of 128, found {resolution}")
    sides = [each.split("x") for each in TABLE.split()]
    return [(int(height) * resolution // 1024, int(width) * resolution // 1024) for height, width in sides]


@dataclass(frozen=True)
class Placed:
    """What happens to a picture: resized so that it just covers its bucket, then the bucket's size cut from it."""

    original_size: Size  # upright, before it is resized
    resized: Size
    crop: tuple[int, int]  # top, left, in the resized picture
    target_size: Size  # the bucket


def place(original: Size, sizes: Sequence[Size]) -> Placed:
    """Into the bucket of the nearest aspect ratio (by its logarithm), cropped around the centre, enlarged if small."""
    height, width = original
    target = rows, columns = min(sizes, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))
    scale = max(rows / height, columns / width)
    resized = round(height * scale), round(width * scale)
    return Placed(original, resized, ((resized[0] - rows) // 2, (resized[1] - columns) // 2), target)


def prepare(image: Image.Image, sizes: Sequence[Size]) -> tuple[Image.Image, Placed]:
    """An upright picture, as `load_image` gives it -> the picture in its bucket (Lanczos), and what happened to it."""
    placed = place((image.height, image.width), sizes)
    (top, left), (rows, columns) = placed.crop, placed.target_size
    y, x = image.height / placed.resized[0], image.width / placed.resized[1]  # pixels of the original for one resized
    box = left * x, top * y, min((left + columns) * x, image.width), min((top + rows) * y, image.height)
    return image.resize((columns, rows), Image.Resampling.LANCZOS, box), placed  # what is cut off is not even resized


def key_of(*sources: object) -> str:
    return hashlib.sha256(json.dumps([RULES, *sources]).encode()).hexdigest()


class Shards:
    """Rows by their key, in files `KIND-*.safetensors` of a folder: at most ROWS of one shape in each.

    A file's name comes from the keys in it; its metadata say of each row what it was made of (`facts`), of which the
    key is the hash. A file that was cut short counts as not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, sorted(folder.glob(f"*-{'[0-9a-f]' * 16}.safetensors"))
        self.places: dict[str, tuple[Path, int, dict[str, Any]]] = {}  # by key: the file, the row in it, its facts
        for path in self.before:
            try:
                with safe_open(path, framework="pt") as file:
                    self._note(path, json.loads(file.metadata()["rows"]))
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                continue

    def _note(self, path: Path, facts: list[dict[str, Any]]) -> None:
        self.places |= {each["key"]: (path, i, each) for i, each in enumerate(facts)}

    def fill(self, kind: str, rows: Iterable[Row]) -> None:
        """Write rows as they come. What was computed is written where an error or the user ends it, too."""
        pending: list[Row] = []
        try:
            for row in rows:
                shapes = [[tensor.shape for tensor in each[1].values()] for each in (row, *pending[:1])]
                if len(pending) == ROWS or shapes[0] != shapes[-1]:
                    self._write(kind, pending)
                    pending = []
                pending.append(row)
        finally:
            if pending:
                self._write(kind, pending)

    def _write(self, kind: str, rows: list[Row]) -> None:
        facts, tensors = [row[0] for row in rows], [row[1] for row in rows]
        path = self.folder / f"{kind}-{key_of([each['key'] for each in facts])[:16]}.safetensors"
        state = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}  # (rows,...)
        write(path, state, {"rows": json.dumps(facts)})
        self._note(path, facts)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of rows that have one shape, by name, one behind the other (b,...)."""
        found: list[dict[str, Tensor]] = []
        try:
            for path, i, _ in map(self.places.__getitem__, keys):
                with safe_open(path, framework="pt") as file:
                    found.append({name: file.get_slice(name)[i] for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"could not read the cache in {self.folder}, start again to mend it: {error}") from error
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def clean(self, kind: str, wanted: Iterable[str]) -> None:
        """Delete the files of a kind that were there at first and hold none of the wanted rows."""
        used = {self.places[key][0] for key in wanted}
        for path in self.before:
            if path.name.startswith(f"{kind}-") and path not in used:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Rows:
    """A batch of one bucket, on the CPU: the latents' posterior, scaled, in float32, and what the UNet is told."""

    mean: Tensor  # (b,4,h,w)
    std: Tensor  # (b,4,h,w)
    captions: list[str]
    numbers: Tensor  # (b,k)
    context: Tensor | None  # (b,77,d), of the captions; None where no text is cached
    pooled: Tensor | None  # (b,e), likewise


@torch.no_grad()
def encode(vae: nn.Module, image: Image.Image, scale_factor: float) -> dict[str, Tensor]:
    """Mean and standard deviation (4,h,w) of a picture's latents, scaled, in float32, on the CPU."""
    posterior = vae.encode(to_tensor(image).to(next(vae.parameters())))  # type: ignore[operator]
    tensors = {"mean": posterior.mean.float(), "std": torch.exp(0.5 * posterior.logvar.float())}
    return {name: check_finite("the VAE's encoder", t[0].cpu() * scale_factor) for name, t in tensors.items()}


class Dataset:
    """Examples, and in a folder what a model's VAE and text encoders make of them, computed once.

    `parts` are the networks by their names in a pipeline (`vae`; `text_encoder` on a base; `text_encoder_2`), each on
    its own device; `fingerprints`, by the same names, say which weights they have. Pictures and captions go through
    one at a time: a row does not depend on which others were missing. Without `cache_text` no text is encoded.
    `notes` are lines for the user. InputError names a damaged picture, or with `skip_bad` a note does.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        folder: Path,
        config: ModelConfig,
        parts: Mapping[str, nn.Module],
        fingerprints: Mapping[str, str],
        cache_text: bool = True,
        skip_bad: bool = False,
    ) -> None:
        self.config, self.fingerprints = config, fingerprints  # not the parts: the caller may need their memory
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"could not make the folder {folder}: {error.strerror}") from error
        clear(folder)
        self.shards, self.notes = Shards(folder), list[str]()
        keys = self._latents(examples, parts["vae"], skip_bad)
        self.examples = [example for example in examples if example.path in keys]
        if not self.examples:
            raise InputError(f"expected pictures, can read none of {len(examples)}; {'; '.join(self.notes[:1])}")
        self.latent_keys = [keys[example.path] for example in self.examples]
        self.text_keys = self._texts(parts) if cache_text else {}
        facts = [self.shards.places[key][2] for key in self.latent_keys]
        self.placed = [Placed(*(tuple(each[field.name]) for field in fields(Placed))) for each in facts]
        self.sizes = [placed.target_size for placed in self.placed]  # the bucket of each picture
        self.numbers = self._numbers()  # (examples,k)

    def __len__(self) -> int:
        return len(self.examples)

    def clean(self) -> None:
        """Delete what the cache holds for other pictures, captions or networks."""
        self.shards.clean("latents", self.latent_keys)
        if self.text_keys:
            self.shards.clean("text", self.text_keys.values())

    def batch(self, indices: Sequence[int]) -> Rows:
        """The rows of examples that share a bucket, in this order."""
        assert len({self.sizes[i] for i in indices}) == 1
        captions = [self.examples[i].text for i in indices]
        moments = self.shards.read(self.latent_keys[i] for i in indices)
        text = self.shards.read(self.text_keys[caption] for caption in captions) if self.text_keys else {}
        numbers = self.numbers[list(indices)]
        return Rows(moments["mean"], moments["std"], captions, numbers, text.get("context"), text.get("pooled"))

    def empty(self) -> tuple[Tensor, Tensor]:
        """Context (77,d) and pooled (e,) of a dropped caption, if text is cached; zeros on a base."""
        text = self.shards.read([self.text_keys[""]])
        kept = self.config.kind == "refiner"
        return text["context"][0] * kept, text["pooled"][0] * kept

    def _latents(self, examples: Sequence[Example], vae: nn.Module, skip_bad: bool) -> dict[Path, str]:
        """The key of each picture that is no damaged one; their rows are in the shards then.

        New pictures are opened twice, so that a damaged one is named before hours of encoding, not after.
        """
        resolution, scale, made_by = self.config.resolution, self.config.vae.scale_factor, self.fingerprints["vae"]
        sizes, keys, missing = buckets(resolution), dict[Path, str](), list[tuple[Size, Path, str]]()
        for path in tqdm(dict.fromkeys(example.path for example in examples), desc="pictures", disable=None):
            try:
                key = key_of(digest := sha256_of(path), resolution, scale, made_by)
                if key not in self.shards.places:
                    missing.append((place(load_image(path).size[::-1], sizes).target_size, path, digest))
                keys[path] = key
            except (InputError, OSError) as error:
                if not skip_bad:
                    raise InputError(f"{error}: mend it, take its line out, or leave it out with --skip-bad") from error
                self.notes.append(f"left out: {error}")

        def rows() -> Iterator[Row]:  # bucket after bucket
            for _, path, digest in tqdm(sorted(missing), desc="latents", disable=None):
                image, placed = prepare(load_image(path), sizes)
                facts = {"key": keys[path], "file": path.name, "sha256": digest, "vae": made_by, **asdict(placed)}
                yield facts, encode(vae, image, scale)

        self.shards.fill("latents", rows())
        return keys

    def _texts(self, parts: Mapping[str, nn.Module]) -> dict[str, str]:
        """The key of each different caption and of the empty prompt; their rows are in the shards then."""
        names = ("text_encoder", "text_encoder_2")[-len(self.config.text_encoders) :]
        made_by = {name: self.fingerprints[name] for name in names}
        keys = {text: key_of(text, made_by) for text in ("", *(example.text for example in self.examples))}
        missing = [text for text, key in keys.items() if key not in self.shards.places]

        def rows() -> Iterator[Row]:
            clip_l = parts["text_encoder"] if "text_encoder" in names else None
            for text in tqdm(missing, desc="captions", disable=None):
                with torch.no_grad():
                    context, pooled = encode_text(clip_l, parts["text_encoder_2"], [text], [text])
                tensors = {"context": context[0].cpu(), "pooled": pooled[0].cpu()}
                yield {"key": keys[text], "text": text, **made_by}, tensors

        self.shards.fill("text", rows())
        return keys

    def _numbers(self) -> Tensor:
        """What the UNet is told of each picture (examples,k); a note where a refiner has to be told SCORE."""
        scores = [example.aesthetic_score for example in self.examples]
        if self.config.kind == "refiner" and (missing := scores.count(None)):
            self.notes.append(f"{missing} of {len(scores)} pictures have no aesthetic_score: {SCORE} is used for them")
        found = [
            Numbers(p.original_size, p.crop, p.target_size, SCORE if score is None else score)
            for p, score in zip(self.placed, scores, strict=True)
        ]
        return torch.stack([each.tensor(self.config.kind) for each in found])


def draw(sizes: Sequence[Size], batch: int, generator: torch.Generator) -> list[int]:
    """A batch of one bucket, drawn on the CPU: a bucket in proportion to its pictures, then as many of them.

    Without replacement, if the bucket has enough. Nothing but the generator decides, so a run can go on where it was.
    """
    size = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
    members = [i for i, each in enumerate(sizes) if each == size]
    chosen = torch.randperm(len(members), generator=generator)[:batch]
    if len(members) < batch:
        chosen = torch.randint(len(members), (batch,), generator=generator)
    return [members[i] for i in chosen.tolist()]
