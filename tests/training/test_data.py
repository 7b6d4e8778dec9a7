"""Training data: a folder's lines, aspect buckets, what is told of each picture, the cache of latents and text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from torch import nn

from sdxl_ref.checkpoint import build, sha256_of
from sdxl_ref.conditioning import encode_text
from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.images import load_image, to_tensor
from sdxl_ref.saving import write
from sdxl_ref.training import data
from sdxl_ref.training.data import METADATA, Dataset, buckets, draw, place, prepare, read_folder
from sdxl_ref.training.finetune import fingerprint

CONFIGS = {"base": replace(peers.SMALL_BASE, resolution=128), "refiner": replace(peers.SMALL_REFINER, resolution=128)}
TOWERS = {"base": ("text_encoder", "text_encoder_2"), "refiner": ("text_encoder_2",)}
LINES: list[dict[str, Any]] = [
    {"file_name": "square.png", "text": "a cup", "aesthetic_score": 7},
    {"file_name": "wide.png", "text": "two cups"},
    {"file_name": "more/other.png", "text": "a cup"},
    {"file_name": "square.png", "text": "the same cup", "aesthetic_score": 5.5},
]


def gradient(height: int, width: int) -> Image.Image:
    """Each pixel says where it is: red from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def speckled(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(folder: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    """A folder with these lines and three small pictures, of two buckets."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for i, (name, height, width) in enumerate([("square", 100, 102), ("wide", 30, 120), ("more/other", 128, 128)]):
        speckled(i, height, width).save(folder / f"{name}.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")
    return folder


# --- the folder ---------------------------------------------------------------------------------------------------


def test_lines_are_read_in_their_order(tmp_path: Path) -> None:
    odd = '{"file_name": "wide.png", "text": "a\u2028cup \\u00e9", "aesthetic_score": null, "more": [1]}'
    found = read_folder(folder_of(tmp_path, ["\ufeff" + json.dumps(LINES[0]), "", "  ", odd, *LINES[2:]]))
    assert [example.path.relative_to(tmp_path).as_posix() for example in found] == [
        "square.png",
        "wide.png",
        "more/other.png",
        "square.png",
    ]
    assert [example.text for example in found] == ["a cup", "a\u2028cup é", "a cup", "the same cup"]
    assert [example.aesthetic_score for example in found] == [7.0, None, None, 5.5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name': 'square.png'}", r"line 2: expected JSON as .*found \"\{'file_name"),
        ("[" * 100_000, "line 2: expected JSON"),
        ('["square.png", "a cup"]', "line 2: expected JSON"),
        ({"text": "a cup"}, "line 2: expected file_name, a text, found None"),
        ({"file_name": "", "text": "a cup"}, "line 2: expected file_name, a text, found ''"),
        ({"file_name": 3, "text": "a cup"}, "line 2: expected file_name, a text, found 3"),
        ({"file_name": "square.png"}, "line 2: expected text, a text, found None"),
        ({"file_name": "square.png", "text": ["a cup"]}, r"line 2: expected text, a text, found \['a cup'\]"),
        ({"file_name": "none.png", "text": ""}, "line 2: no such picture in .*'none.png'"),
        ({"file_name": "more", "text": ""}, "line 2: no such picture"),
        ({"file_name": "a\0b", "text": ""}, "line 2: no such picture"),
        ({"file_name": "x" * 5000, "text": ""}, "line 2: no such picture"),
        ({"file_name": "../outside.png", "text": ""}, "line 2: expected a file_name inside .*found '../outside.png'"),
        ({"file_name": "more/../../outside.png", "text": ""}, "line 2: expected a file_name inside"),
        ({"file_name": "/outside.png", "text": ""}, "line 2: expected a file_name inside .*found '/outside.png'"),
        ({**LINES[0], "aesthetic_score": "6"}, "line 2: expected a finite number as aesthetic_score, found '6'"),
        ({**LINES[0], "aesthetic_score": True}, "line 2: expected a finite number as aesthetic_score, found True"),
        ({**LINES[0], "aesthetic_score": math.nan}, "line 2: expected a finite number as aesthetic_score, found nan"),
        ({**LINES[0], "aesthetic_score": -math.inf}, "line 2: expected a finite number as aesthetic_score, found -inf"),
        ({**LINES[0], "aesthetic_score": 10**400}, "line 2: expected a finite number as aesthetic_score, found 1000"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    speckled(0, 8, 8).save(tmp_path / "outside.png")
    folder = folder_of(tmp_path / "data", [LINES[0], line])
    with pytest.raises(InputError, match=message) as error:
        read_folder(folder)
    assert str(folder / METADATA) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder of pictures: .*none"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match=f"expected {METADATA} in .*write a line for each picture"):
        read_folder(tmp_path)
    for text in ("", "\n \n"):
        (tmp_path / METADATA).write_text(text)
        with pytest.raises(InputError, match=f"{METADATA} is empty: write a line"):
            read_folder(tmp_path)
    (tmp_path / METADATA).write_bytes(b'{"file_name": "\xff\xfe"}')
    with pytest.raises(InputError, match="as UTF-8 text"):
        read_folder(tmp_path)


# --- buckets ------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_the_paper() -> None:
    found = buckets(1024)
    assert len(found) == len(set(found)) == 40
    assert all(side % 64 == 0 for size in found for side in size)
    assert all(abs(height * width / 1024**2 - 1) < 0.1 for height, width in found)
    ratios = [height / width for height, width in found]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[20], ratios[-1]) == (0.25, 1, 4)
    known = {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (1344, 768), (704, 1472), (640, 1536)}
    assert known <= set(found)


def test_buckets_scale_with_the_resolution() -> None:
    assert all(side % 8 == 0 for size in buckets(128) for side in size)
    for small, large in zip(buckets(128), buckets(1024), strict=True):
        assert (8 * small[0], 8 * small[1]) == large
    assert buckets(512)[0] == (256, 1024)
    for resolution in (0, -128, 64, 1000):
        with pytest.raises(InputError, match=f"multiple of 128, found {resolution}"):
            buckets(resolution)


def test_a_picture_of_a_buckets_size_goes_there_whole() -> None:
    for size in buckets(128):
        placed = place(size, buckets(128))
        assert (placed.target_size, placed.resized, placed.crop) == (size, size, (0, 0))
    image = speckled(0, 104, 152)  # 832x1216 at 1024
    assert prepare(image, buckets(128))[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("size", "target", "resized", "crop"),
    [
        ((256, 256), (128, 128), (128, 128), (0, 0)),
        ((150, 200), (112, 144), (112, 149), (0, 2)),
        ((200, 150), (144, 112), (149, 112), (2, 0)),
        ((40, 30), (144, 112), (149, 112), (2, 0)),  # enlarged
        ((100, 1000), (64, 256), (64, 640), (0, 192)),  # wider than the widest
        ((1000, 100), (256, 64), (640, 64), (192, 0)),
        ((1, 3000), (64, 256), (64, 192_000), (0, 95_872)),
    ],
)
def test_the_nearest_shape_is_covered_and_the_centre_kept(
    size: tuple[int, int], target: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]
) -> None:
    placed = place(size, buckets(128))
    assert placed == data.Placed(size, resized, crop, target)


@pytest.mark.parametrize("size", [(100, 1000), (1000, 100), (150, 200), (30, 40), (129, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_numbers_tell_which_pixels_are_left(tmp_path: Path, size: tuple[int, int], turned: bool) -> None:
    upright, exif = gradient(*size), Image.Exif()
    stored = upright.transpose(Image.Transpose.ROTATE_90) if turned else upright
    exif[0x0112] = 6 if turned else 1  # shown turned to the right by a quarter
    stored.save(tmp_path / "picture.png", exif=exif)
    image, placed = prepare(load_image(tmp_path / "picture.png"), buckets(128))
    assert placed.original_size == size
    assert (image.height, image.width) == placed.target_size
    pixels = np.asarray(image).astype(float)
    for axis, channel, line in ((0, 1, pixels[:, image.width // 2]), (1, 0, pixels[image.height // 2])):
        scale = size[axis] / placed.resized[axis]  # pixels of the original for one
        where = (placed.crop[axis] + np.arange(placed.target_size[axis]) + 0.5) * scale - 0.5
        shown = line[:, channel] / 255 * (size[axis] - 1)
        inside = (where > 1) & (where < size[axis] - 2)  # at the edges the filter is cut
        assert np.abs(shown - where)[inside].max() < 0.5 + size[axis] / 255
    top, left = placed.crop
    whole = upright.resize(placed.resized[::-1], Image.Resampling.LANCZOS)
    cut = whole.crop((left, top, left + image.width, top + image.height))
    assert np.abs(np.asarray(cut).astype(int) - np.asarray(image)).max() <= 1


# --- the cache ----------------------------------------------------------------------------------------------------


@dataclass
class Networks:
    """The networks of one kind, and how often each was called."""

    config: ModelConfig
    parts: dict[str, nn.Module]
    calls: Counter[str]

    def dataset(self, folder: Path, cache: Path, **options: Any) -> Dataset:
        self.calls.clear()
        fingerprints = {name: fingerprint(part) for name, part in self.parts.items()}
        return Dataset(read_folder(folder), cache, self.config, self.parts, fingerprints, **options)


def networks(kind: str) -> Networks:
    config, calls = CONFIGS[kind], Counter[str]()
    parts = {name: peers.randomise(build(name, config), seed=1) for name in ("vae", *TOWERS[kind])}

    def count(name: str) -> Any:
        return lambda *_: calls.update([name])

    for name, part in parts.items():
        (part.encoder if name == "vae" else part).register_forward_hook(count(name))
    return Networks(config, parts, calls)


@pytest.fixture
def base() -> Networks:
    return networks("base")


@pytest.fixture
def refiner() -> Networks:
    return networks("refiner")


def bytes_of(cache: Path, kind: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob(f"{kind}*")}


def everything(dataset: Dataset) -> list[Any]:
    rows = [dataset.batch([i]) for i in range(len(dataset))]
    return [(row.mean.tolist(), row.std.tolist(), row.captions, row.numbers.tolist()) for row in rows]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_what_the_networks_give(kind: str, tmp_path: Path) -> None:
    n = networks(kind)
    found = n.dataset(folder_of(tmp_path / "data", LINES), tmp_path / "cache")
    assert len(found) == 4
    assert found.sizes == [(128, 128), (64, 256), (128, 128), (128, 128)]
    rows = found.batch([2, 0, 3])
    assert rows.captions == ["a cup", "a cup", "the same cup"]
    for i, name in enumerate(["more/other", "square", "square"]):
        image, _ = prepare(load_image(tmp_path / "data" / f"{name}.png"), buckets(128))
        posterior = n.parts["vae"].encode(to_tensor(image))  # type: ignore[operator]
        assert torch.equal(rows.mean[i], posterior.mean[0] * n.config.vae.scale_factor)
        assert torch.equal(rows.std[i], torch.exp(0.5 * posterior.logvar[0]) * n.config.vae.scale_factor)
    assert rows.context is not None
    assert rows.pooled is not None
    for i, text in enumerate(rows.captions):
        context, pooled = encode_text(n.parts.get("text_encoder"), n.parts["text_encoder_2"], [text], [text])
        assert torch.equal(rows.context[i], context[0])
        assert torch.equal(rows.pooled[i], pooled[0])
    context, pooled = encode_text(n.parts.get("text_encoder"), n.parts["text_encoder_2"], [""], [""])
    kept = kind == "refiner"  # a base is told zeros
    assert torch.equal(found.empty()[0], context[0] * kept)
    assert torch.equal(found.empty()[1], pooled[0] * kept)
    last = {"refiner": [[6.0], [7.0], [5.5]], "base": [[128.0, 128.0]] * 3}[kind]
    sizes = [[128, 128, 0, 0], [100, 102, 0, 1], [100, 102, 0, 1]]
    assert rows.numbers.tolist() == [[*map(float, a), *b] for a, b in zip(sizes, last, strict=True)]


def test_a_refiner_without_scores_is_told_a_constant_and_the_user_is_told_so(
    refiner: Networks, base: Networks, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "data", LINES)
    found = refiner.dataset(folder, tmp_path / "refiner", cache_text=False)
    assert found.notes == ["2 of 4 pictures have no aesthetic_score: 6.0 is used for them"]
    assert found.numbers[:, 4].tolist() == [7.0, 6.0, 6.0, 5.5]
    assert base.dataset(folder, tmp_path / "base", cache_text=False).notes == []
    found = refiner.dataset(folder_of(tmp_path / "data", [LINES[0]]), tmp_path / "refiner", cache_text=False)
    assert found.notes == []


def test_only_what_changed_is_computed_again(base: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES), tmp_path / "cache"
    first = everything(base.dataset(folder, cache))
    assert base.calls == {"vae": 3, "text_encoder": 4, "text_encoder_2": 4}  # 3 captions and the empty prompt

    before = bytes_of(cache)
    again = base.dataset(folder, cache)
    assert base.calls == {}
    assert everything(again) == first
    assert bytes_of(cache) == before

    speckled(9, 100, 102).save(folder / "square.png")
    changed = everything(base.dataset(folder, cache))
    assert base.calls == {"vae": 1}
    assert [a == b for a, b in zip(changed, first, strict=True)] == [False, True, True, False]

    lines = [{**LINES[0], "text": "another cup", "aesthetic_score": 1}, *LINES[1:]]
    folder_of(folder, lines)  # with the pictures as they were at first
    speckled(9, 100, 102).save(folder / "square.png")
    assert base.dataset(folder, cache).batch([0]).captions == ["another cup"]
    assert base.calls == {"text_encoder": 1, "text_encoder_2": 1}


@pytest.mark.parametrize("changed", ["weights", "scale_factor", "resolution"])
def test_another_vae_or_resolution_makes_all_latents_again(changed: str, base: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache"
    first, old = base.dataset(folder, cache), set(bytes_of(cache, "latents"))
    mean = first.batch([0]).mean
    if changed == "weights":
        with torch.no_grad():
            next(base.parts["vae"].encoder.parameters()).mul_(1.01)  # type: ignore[union-attr]
    elif changed == "scale_factor":
        base.config = replace(base.config, vae=replace(base.config.vae, scale_factor=0.2))
    else:
        base.config = replace(base.config, resolution=256)
    found = base.dataset(folder, cache)
    assert base.calls == {"vae": 2}
    assert not torch.equal(found.batch([0]).mean, mean)
    assert old < set(bytes_of(cache, "latents"))  # nothing is lost before the run is known to be the same
    found.clean()
    assert not old & set(bytes_of(cache, "latents"))  # the old ones are gone


def test_another_tower_makes_all_text_again_and_no_latents(base: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache"
    context, old = base.dataset(folder, cache).batch([0]).context, set(bytes_of(cache, "text"))
    assert context is not None
    with torch.no_grad():
        next(base.parts["text_encoder"].parameters()).mul_(1.01)
    dataset = base.dataset(folder, cache)
    dataset.clean()
    found = dataset.batch([0]).context
    assert base.calls == {"text_encoder": 3, "text_encoder_2": 3}
    assert found is not None
    assert not torch.equal(found[..., :32], context[..., :32])
    assert torch.equal(found[..., 32:], context[..., 32:])  # OpenCLIP's is the same
    assert not old & set(bytes_of(cache, "text"))


def test_without_text_none_is_encoded_and_what_is_cached_stays(refiner: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache"
    refiner.dataset(folder, cache)
    before = bytes_of(cache)
    found = refiner.dataset(folder, cache, cache_text=False)
    found.clean()
    rows = found.batch([1])
    assert (rows.context, rows.pooled) == (None, None)
    assert bytes_of(cache) == before
    assert refiner.dataset(folder, tmp_path / "other", cache_text=False).batch([0]).captions == ["a cup"]
    assert refiner.calls == {"vae": 2}


def test_text_keeps_the_towers_dtype_and_latents_are_float32(refiner: Networks, tmp_path: Path) -> None:
    for part in refiner.parts.values():
        part.to(torch.bfloat16)
    rows = refiner.dataset(folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache").batch([1, 1])
    assert rows.context is not None
    assert rows.pooled is not None
    assert (rows.context.dtype, rows.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (rows.mean.dtype, rows.std.dtype, rows.numbers.dtype) == (torch.float32,) * 3
    assert (rows.mean.shape, rows.std.shape, rows.numbers.shape) == ((2, 4, 8, 32), (2, 4, 8, 32), (2, 5))
    assert (rows.context.shape, rows.pooled.shape) == ((2, 77, 64), (2, 48))


def test_shards_hold_one_bucket_and_say_what_they_are_made_of(
    refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    monkeypatch.setattr(data, "ROWS", 2)
    folder, cache = folder_of(tmp_path / "data", LINES), tmp_path / "cache"
    for i, name in enumerate(("third", "fourth")):
        speckled(5 + i, 128, 128).save(folder / f"{name}.png")
    folder_of(folder, [*LINES, *({"file_name": f"{name}.png", "text": "one more"} for name in ("third", "fourth"))])
    found = refiner.dataset(folder, cache)
    rows: dict[str, Any] = {}
    for path in cache.glob("latents-*"):
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["rows"])
            assert len(facts) == len(file.get_tensor("mean")) <= 2
            assert len({tuple(each["target_size"]) for each in facts}) == 1
            rows |= {each["file"]: each for each in facts}
    assert rows.keys() == {"square.png", "wide.png", "other.png", "third.png", "fourth.png"}
    assert rows["wide.png"]["sha256"] == sha256_of(folder / "wide.png")
    assert rows["wide.png"]["vae"] == fingerprint(refiner.parts["vae"])
    assert rows["wide.png"]["original_size"] == [30, 120]
    assert len(list(cache.glob("latents-*"))) == 3  # two rows, and two, of 128x128; one of 64x256
    assert len(found.shards.places) == 5 + 5  # captions: four and the empty one
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("left", [0, 5, 300, -100])
def test_a_shard_that_was_cut_short_is_made_again(left: int, refiner: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache"
    first = everything(refiner.dataset(folder, cache))
    before = bytes_of(cache)
    for kind in ("latents", "text"):
        path = sorted(cache.glob(f"{kind}-*"))[0]
        path.write_bytes(path.read_bytes()[:left])
    assert everything(refiner.dataset(folder, cache)) == first
    assert refiner.calls == {"vae": 1, "text_encoder_2": 3}
    assert bytes_of(cache) == before


def test_a_damaged_shard_that_is_no_longer_wanted_is_deleted_and_other_files_are_not(
    refiner: Networks, tmp_path: Path
) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES[:2]), tmp_path / "cache"
    refiner.dataset(folder, cache)
    old = sorted(cache.glob("latents-*"))
    old[0].write_bytes(b"")
    for name in ("text-encoder.safetensors", "mine-0123456789abcdef.safetensors", "latents-mine.safetensors"):
        (cache / name).write_bytes(b"mine")
    refiner.dataset(folder_of(tmp_path / "data", [LINES[2]]), cache).clean()
    assert not set(old) & set(cache.iterdir())
    assert sum(content == b"mine" for content in bytes_of(cache).values()) == 3


def test_a_shard_that_is_gone_while_training_is_an_error_that_says_so(refiner: Networks, tmp_path: Path) -> None:
    found = refiner.dataset(folder_of(tmp_path / "data", LINES[:1]), tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"could not read the cache in .*start again to mend it"):
        found.batch([0])


def test_interrupted_caching_goes_on_where_it_was(
    refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, nothing is lost; killed outright, no more than the shard in the making."""
    folder, whole = folder_of(tmp_path / "data", LINES), tmp_path / "whole"
    expected = everything(refiner.dataset(folder, whole))

    def interrupt(*_: object) -> None:
        if refiner.calls["vae"] == 2:
            raise KeyboardInterrupt

    handle = refiner.parts["vae"].quant_conv.register_forward_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        refiner.dataset(folder, tmp_path / "parts")
    handle.remove()
    assert everything(refiner.dataset(folder, tmp_path / "parts")) == expected
    assert refiner.calls["vae"] == 2  # one of three was kept: the second was not whole

    killed = Counter[str]()

    def kill(*arguments: Any) -> None:
        killed["writes"] += 1
        if killed["writes"] > 1:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(data, "write", kill)
    monkeypatch.setattr(data, "ROWS", 1)
    with pytest.raises(KeyboardInterrupt):
        refiner.dataset(folder, tmp_path / "killed")
    monkeypatch.setattr(data, "write", write)
    assert everything(refiner.dataset(folder, tmp_path / "killed")) == expected
    assert refiner.calls["vae"] == 2


# --- damaged pictures ---------------------------------------------------------------------------------------------


def test_a_damaged_picture_is_named_and_nothing_is_overwritten(refiner: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES), tmp_path / "cache"
    refiner.dataset(folder, cache)
    before = bytes_of(cache)
    whole = (folder / "wide.png").read_bytes()
    for damaged in (b"", b"no picture", whole[:-2000]):
        (folder / "wide.png").write_bytes(damaged)
        with pytest.raises(InputError, match=r"could not read .*wide\.png.*leave it out with --skip-bad") as error:
            refiner.dataset(folder, cache)
        assert "\n" not in str(error.value)
        assert refiner.calls == {}  # found before anything is encoded
        assert bytes_of(cache) == before


def test_damaged_pictures_are_skipped_when_asked(refiner: Networks, tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "data", LINES), tmp_path / "cache"
    for name in ("square.png", "wide.png"):
        (folder / name).write_bytes(b"no picture")
    found = refiner.dataset(folder, cache, skip_bad=True)
    assert [example.path.name for example in found.examples] == ["other.png"]
    assert len(found) == len(found.sizes) == len(found.placed) == len(found.numbers) == 1
    assert [f"{name}.png" in note for name, note in zip(("square", "wide"), found.notes, strict=False)] == [True, True]
    assert found.notes[2:] == ["1 of 1 pictures have no aesthetic_score: 6.0 is used for them"]
    (folder / "more" / "other.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"can read none of 4.*square\.png"):
        refiner.dataset(folder, cache, skip_bad=True)


def test_a_picture_that_is_gone_is_named(refiner: Networks, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", LINES)
    examples = read_folder(folder)
    (folder / "wide.png").unlink()
    with pytest.raises(InputError, match=r"wide\.png.*--skip-bad"):
        Dataset(examples, tmp_path / "cache", refiner.config, refiner.parts, {"vae": "", "text_encoder_2": ""})


def test_other_refusals(refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "data", LINES[:2])
    with pytest.raises(InputError, match="could not make the folder"):
        refiner.dataset(folder, folder / METADATA)
    with torch.no_grad():
        refiner.parts["vae"].quant_conv.bias.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(InputError, match="the VAE's encoder returned values that are not finite"):
        refiner.dataset(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_ref.saving.save_file", full)
    with pytest.raises(InputError, match=r"could not write .*No space left on device"):
        networks("refiner").dataset(folder, tmp_path / "cache")


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_names_dtypes_values_and_configuration() -> None:
    tower = peers.small_openclip()
    found = {fingerprint(tower)}
    assert {fingerprint(deepcopy(tower)), fingerprint(peers.small_openclip())} == found
    changed = deepcopy(tower)
    with torch.no_grad():
        changed.text_projection[3, 5] += 1e-6
    renamed = nn.ModuleDict({"tower": deepcopy(tower)})
    other_heads = deepcopy(tower)
    other_heads.config = replace(tower.config, heads=2)
    half = deepcopy(tower).to(torch.bfloat16)
    found |= {fingerprint(module) for module in (changed, renamed, other_heads, half, peers.small_openclip(seed=1))}
    assert len(found) == 6
    zeros = [nn.Module() for _ in range(2)]
    for module, dtype in zip(zeros, (torch.float16, torch.bfloat16), strict=True):
        module.register_buffer("zero", torch.zeros(3, dtype=dtype))  # the same bytes
    assert fingerprint(zeros[0]) != fingerprint(zeros[1])


# --- draws --------------------------------------------------------------------------------------------------------

SIZES = [(128, 128)] * 12 + [(64, 256)] * 6 + [(256, 64)] * 2


def test_a_draw_is_of_one_bucket_and_its_rows_differ_where_there_are_enough() -> None:
    seen = set()
    for seed in range(60):
        rows = draw(SIZES, 4, torch.Generator().manual_seed(seed))
        size = {SIZES[i] for i in rows}
        assert len(rows) == 4
        assert len(size) == 1
        assert len(set(rows)) == 4 or size == {(256, 64)}  # which has two only
        seen |= size
    assert seen == set(SIZES)


def test_draws_are_a_function_of_the_generator_alone() -> None:
    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(SIZES, 3, generator) for _ in range(20)]

    expected = draws(0)
    torch.manual_seed(5)
    assert draws(0) == expected
    assert draws(1) != expected
    state = torch.Generator().manual_seed(0)
    for _ in range(10):
        draw(SIZES, 3, state)
    resumed = torch.Generator()
    resumed.set_state(state.get_state())
    assert [draw(SIZES, 3, resumed) for _ in range(10)] == expected[10:]


def test_every_picture_is_drawn_equally_often() -> None:
    generator, counts, n = torch.Generator().manual_seed(0), Counter[int](), 20_000
    for _ in range(n):
        counts.update(draw(SIZES, 3, generator))
    expected = 3 * n / len(SIZES)
    assert all(counts[i] == pytest.approx(expected, rel=0.1) for i in range(len(SIZES)))
    share = sum(counts[i] for i in range(12)) / (3 * n)
    assert share == pytest.approx(0.6, abs=0.015)
