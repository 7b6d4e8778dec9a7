"""Training data: rows are what the networks make of pictures and captions, and only what changed is made again."""

from dataclasses import replace
from pathlib import Path

import profiles
import pytest
import torch
from training_data import CONFIGS, LINES, Networks, bytes_of, networks, rows_of, speckled, write_folder

from sdxl_ref.config import InputError
from sdxl_ref.pictures.images import load_image, to_tensor
from sdxl_ref.text.conditioning import encode_text
from sdxl_ref.training.buckets import buckets, crop_to_bucket
from sdxl_ref.training.data import Dataset
from sdxl_ref.training.image_folder import METADATA, read_folder


def encode(n: Networks, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (1,77,d) and pooled vector (1,e)."""
    return encode_text(n.parts.get("text_encoder"), n.parts["text_encoder_2"], [text], [text], "cpu")


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_what_the_networks_give(kind: str, tmp_path: Path) -> None:
    n = networks(kind)
    dataset = n.dataset(write_folder(tmp_path / "data", LINES), tmp_path / "cache")
    assert len(dataset) == 4
    assert dataset.sizes == [(128, 128), (64, 256), (128, 128), (128, 128)]
    batch = dataset.batch([2, 0, 3])
    assert batch.captions == ["a cup", "a cup", "the same cup"]
    for i, name in enumerate(["more/other", "square", "square"]):
        image, _ = crop_to_bucket(load_image(tmp_path / "data" / f"{name}.png"), buckets(128))
        posterior = n.parts["vae"].encode(to_tensor(image))  # type: ignore[operator]
        assert torch.equal(batch.mean[i], posterior.mean[0] * n.config.vae.scale_factor)
        assert torch.equal(batch.std[i], torch.exp(0.5 * posterior.logvar[0]) * n.config.vae.scale_factor)
    assert batch.context is not None
    assert batch.pooled is not None
    for i, text in enumerate(batch.captions):
        context, pooled = encode(n, text)
        assert torch.equal(batch.context[i], context[0])
        assert torch.equal(batch.pooled[i], pooled[0])
    context, pooled = encode(n, "")
    if kind == "base":
        context = torch.zeros_like(context)
        pooled = torch.zeros_like(pooled)
    assert torch.equal(dataset.dropped_text()[0], context[0])
    assert torch.equal(dataset.dropped_text()[1], pooled[0])
    last = {"refiner": [[6.0], [7.0], [5.5]], "base": [[128.0, 128.0]] * 3}[kind]
    sizes = [[128, 128, 0, 0], [100, 102, 0, 1], [100, 102, 0, 1]]
    assert batch.numbers.tolist() == [[*map(float, a), *b] for a, b in zip(sizes, last, strict=True)]


def test_the_colours_of_a_phones_photo(base: Networks, tmp_path: Path) -> None:
    """The latents are those of the same picture in sRGB."""
    folder = write_folder(tmp_path / "data", LINES)
    picture = speckled(1, 128, 128)
    picture.save(folder / "square.png", icc_profile=profiles.display_p3())
    load_image(folder / "square.png").save(folder / "more" / "other.png")
    batch = base.dataset(folder, tmp_path / "cache").batch([0, 2])
    assert torch.equal(batch.mean[0], batch.mean[1])
    plain = base.parts["vae"].encode(to_tensor(picture)).mean[0] * base.config.vae.scale_factor  # type: ignore[operator]
    assert not torch.equal(batch.mean[0], plain)


def test_some_pictures_of_a_batch(base: Networks, tmp_path: Path) -> None:
    batch = base.dataset(write_folder(tmp_path / "data", LINES), tmp_path / "cache").batch([2, 0, 3])
    part = batch.select(slice(1, 3))
    assert part.captions == ["a cup", "the same cup"]
    for name in ("mean", "std", "numbers", "context", "pooled"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:3])


def test_a_refiner_without_scores_is_told_a_constant_and_the_user_is_told_so(
    refiner: Networks, base: Networks, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "data", LINES)
    dataset = refiner.dataset(folder, tmp_path / "refiner", cache_text=False)
    assert dataset.notes == ["2 of 4 pictures have no aesthetic_score: 6.0 is used for them"]
    assert dataset.numbers[:, 4].tolist() == [7.0, 6.0, 6.0, 5.5]
    assert base.dataset(folder, tmp_path / "base", cache_text=False).notes == []
    scored = refiner.dataset(write_folder(tmp_path / "data", [LINES[0]]), tmp_path / "refiner", cache_text=False)
    assert scored.notes == []


def test_only_what_changed_is_computed_again(base: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES)
    cache = tmp_path / "cache"
    first = rows_of(base.dataset(folder, cache))
    assert base.calls == {"vae": 3, "text_encoder": 4, "text_encoder_2": 4}  # 3 captions and the empty prompt

    before = bytes_of(cache)
    again = base.dataset(folder, cache)
    assert base.calls == {}
    assert rows_of(again) == first
    assert bytes_of(cache) == before

    speckled(9, 100, 102).save(folder / "square.png")
    changed = rows_of(base.dataset(folder, cache))
    assert base.calls == {"vae": 1}
    assert [a == b for a, b in zip(changed, first, strict=True)] == [False, True, True, False]

    lines = [{**LINES[0], "text": "another cup", "aesthetic_score": 1}, *LINES[1:]]
    write_folder(folder, lines)  # with the pictures as they were at first
    speckled(9, 100, 102).save(folder / "square.png")
    assert base.dataset(folder, cache).batch([0]).captions == ["another cup"]
    assert base.calls == {"text_encoder": 1, "text_encoder_2": 1}


@pytest.mark.parametrize("changed", ["weights", "scale_factor", "resolution"])
def test_another_vae_or_resolution_makes_all_latents_again(changed: str, base: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    cache = tmp_path / "cache"
    mean = base.dataset(folder, cache).batch([0]).mean
    old = set(bytes_of(cache, "latents"))
    if changed == "weights":
        with torch.no_grad():
            next(base.parts["vae"].encoder.parameters()).mul_(1.01)  # type: ignore[union-attr]
    elif changed == "scale_factor":
        base.config = replace(base.config, vae=replace(base.config.vae, scale_factor=0.2))
    else:
        base.config = replace(base.config, resolution=256)
    dataset = base.dataset(folder, cache)
    assert base.calls == {"vae": 2}
    assert not torch.equal(dataset.batch([0]).mean, mean)
    assert old < set(bytes_of(cache, "latents"))  # nothing is lost before the run is known to be the same
    dataset.clean()
    assert not old & set(bytes_of(cache, "latents"))  # the old ones are gone


def test_another_tower_makes_all_text_again_and_no_latents(base: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    cache = tmp_path / "cache"
    before = base.dataset(folder, cache).batch([0]).context
    old = set(bytes_of(cache, "text"))
    assert before is not None
    with torch.no_grad():
        next(base.parts["text_encoder"].parameters()).mul_(1.01)
    dataset = base.dataset(folder, cache)
    dataset.clean()
    context = dataset.batch([0]).context
    assert base.calls == {"text_encoder": 3, "text_encoder_2": 3}
    assert context is not None
    assert not torch.equal(context[..., :32], before[..., :32])
    assert torch.equal(context[..., 32:], before[..., 32:])  # OpenCLIP's is the same
    assert not old & set(bytes_of(cache, "text"))


def test_without_text_none_is_encoded_and_what_is_cached_stays(refiner: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    cache = tmp_path / "cache"
    refiner.dataset(folder, cache)
    before = bytes_of(cache)
    dataset = refiner.dataset(folder, cache, cache_text=False)
    dataset.clean()
    batch = dataset.batch([1])
    assert (batch.context, batch.pooled) == (None, None)
    assert bytes_of(cache) == before
    assert refiner.dataset(folder, tmp_path / "other", cache_text=False).batch([0]).captions == ["a cup"]
    assert refiner.calls == {"vae": 2}


def test_text_keeps_the_towers_dtype_and_latents_are_float32(refiner: Networks, tmp_path: Path) -> None:
    for part in refiner.parts.values():
        part.to(torch.bfloat16)
    batch = refiner.dataset(write_folder(tmp_path / "data", LINES[:2]), tmp_path / "cache").batch([1, 1])
    assert batch.context is not None
    assert batch.pooled is not None
    assert (batch.context.dtype, batch.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (batch.mean.dtype, batch.std.dtype, batch.numbers.dtype) == (torch.float32,) * 3
    assert (batch.mean.shape, batch.std.shape, batch.numbers.shape) == ((2, 4, 8, 32), (2, 4, 8, 32), (2, 5))
    assert (batch.context.shape, batch.pooled.shape) == ((2, 77, 32), (2, 48))


def test_a_damaged_picture_is_named_and_nothing_is_overwritten(refiner: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES)
    cache = tmp_path / "cache"
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
    folder = write_folder(tmp_path / "data", LINES)
    cache = tmp_path / "cache"
    for name in ("square.png", "wide.png"):
        (folder / name).write_bytes(b"no picture")
    dataset = refiner.dataset(folder, cache, skip_bad=True)
    assert [example.path.name for example in dataset.examples] == ["other.png"]
    assert len(dataset) == len(dataset.sizes) == len(dataset.crops) == len(dataset.numbers) == 1
    names = ("square.png", "wide.png")
    assert [name in note for name, note in zip(names, dataset.notes, strict=False)] == [True, True]
    assert dataset.notes[2:] == ["1 of 1 pictures have no aesthetic_score: 6.0 is used for them"]
    (folder / "more" / "other.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"can read none of 4.*square\.png"):
        refiner.dataset(folder, cache, skip_bad=True)


def test_a_picture_that_is_gone_is_named(refiner: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES)
    examples = read_folder(folder).examples
    (folder / "wide.png").unlink()
    with pytest.raises(InputError, match=r"wide\.png.*--skip-bad"):
        Dataset(examples, tmp_path / "cache", refiner.config, refiner.parts, {"vae": "", "text_encoder_2": ""})


def test_other_refusals(refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    with pytest.raises(InputError, match="could not make the folder"):
        refiner.dataset(folder, folder / METADATA)
    with torch.no_grad():
        refiner.parts["vae"].quant_conv.bias.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(InputError, match="the VAE's encoder returned values that are not finite"):
        refiner.dataset(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_ref.weights.file_saving.save_file", full)
    with pytest.raises(InputError, match=r"could not write .*No space left on device"):
        networks("refiner").dataset(folder, tmp_path / "cache")
