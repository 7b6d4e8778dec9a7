"""The cache: what is in a shard, damaged shards, interrupted writing, fingerprints."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors import safe_open
from torch import nn
from training_data import LINES, Networks, bytes_of, rows_of, speckled, write_folder

from sdxl_ref.config import InputError
from sdxl_ref.training import cache as cache_module
from sdxl_ref.training.cache import fingerprint
from sdxl_ref.weights.file_saving import write_tensors
from sdxl_ref.weights.tensor_files import sha256_of


def test_shards_hold_one_bucket_and_say_what_they_are_made_of(
    refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "ROWS", 2)
    folder = write_folder(tmp_path / "data", LINES)
    cache = tmp_path / "cache"
    names = ("third", "fourth")
    for i, name in enumerate(names):
        speckled(5 + i, 128, 128).save(folder / f"{name}.png")
    write_folder(folder, [*LINES, *({"file_name": f"{name}.png", "text": "one more"} for name in names)])
    dataset = refiner.dataset(folder, cache)
    facts_of: dict[str, Any] = {}
    for path in cache.glob("latents-*"):
        with safe_open(path, framework="pt") as file:
            rows = json.loads(file.metadata()["rows"])
            assert len(rows) == len(file.get_tensor("mean")) <= 2
            assert len({tuple(facts["target_size"]) for facts in rows}) == 1
            facts_of |= {facts["file"]: facts for facts in rows}
    assert facts_of.keys() == {"square.png", "wide.png", "other.png", "third.png", "fourth.png"}
    assert facts_of["wide.png"]["sha256"] == sha256_of(folder / "wide.png")
    assert facts_of["wide.png"]["vae"] == fingerprint(refiner.parts["vae"])
    assert facts_of["wide.png"]["original_size"] == [30, 120]
    assert len(list(cache.glob("latents-*"))) == 3  # two rows, and two, of 128x128; one of 64x256
    assert len(dataset.shards) == 5 + 5  # captions: four and the empty one
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("left", [0, 5, 300, -100])
def test_a_shard_that_was_cut_short_is_made_again(left: int, refiner: Networks, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    cache = tmp_path / "cache"
    first = rows_of(refiner.dataset(folder, cache))
    before = bytes_of(cache)
    for kind in ("latents", "text"):
        path = sorted(cache.glob(f"{kind}-*"))[0]
        path.write_bytes(path.read_bytes()[:left])
    assert rows_of(refiner.dataset(folder, cache)) == first
    assert refiner.calls == {"vae": 1, "text_encoder_2": 3}
    assert bytes_of(cache) == before


def test_a_damaged_shard_that_is_no_longer_wanted_is_deleted_and_other_files_are_not(
    refiner: Networks, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "data", LINES[:2])
    cache = tmp_path / "cache"
    refiner.dataset(folder, cache)
    old = sorted(cache.glob("latents-*"))
    old[0].write_bytes(b"")
    for name in ("text-encoder.safetensors", "mine-0123456789abcdef.safetensors", "latents-mine.safetensors"):
        (cache / name).write_bytes(b"mine")
    refiner.dataset(write_folder(tmp_path / "data", [LINES[2]]), cache).clean()
    assert not set(old) & set(cache.iterdir())
    assert list(bytes_of(cache).values()).count(b"mine") == 3


def test_a_shard_that_is_gone_while_training_is_an_error_that_says_so(refiner: Networks, tmp_path: Path) -> None:
    dataset = refiner.dataset(write_folder(tmp_path / "data", LINES[:1]), tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"could not read the cache in .*start again to mend it"):
        dataset.batch([0])


def test_interrupted_caching_goes_on_where_it_was(refiner: Networks, tmp_path: Path) -> None:
    """When the user interrupts, nothing is lost: what was whole is written."""
    folder = write_folder(tmp_path / "data", LINES)
    expected = rows_of(refiner.dataset(folder, tmp_path / "whole"))

    def interrupt(*_: object) -> None:
        if refiner.calls["vae"] == 2:
            raise KeyboardInterrupt

    handle = refiner.parts["vae"].quant_conv.register_forward_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        refiner.dataset(folder, tmp_path / "parts")
    handle.remove()
    assert rows_of(refiner.dataset(folder, tmp_path / "parts")) == expected
    assert refiner.calls["vae"] == 2  # one of three was kept: the second was not whole


def test_a_process_that_is_killed_while_caching_loses_only_the_shard_in_the_making(
    refiner: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "data", LINES)
    expected = rows_of(refiner.dataset(folder, tmp_path / "whole"))
    counts = Counter[str]()

    def kill(*arguments: Any) -> None:
        counts["writes"] += 1
        if counts["writes"] > 1:
            raise KeyboardInterrupt
        write_tensors(*arguments)

    monkeypatch.setattr(cache_module, "ROWS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "write_tensors", kill)
        with pytest.raises(KeyboardInterrupt):
            refiner.dataset(folder, tmp_path / "killed")
    assert rows_of(refiner.dataset(folder, tmp_path / "killed")) == expected
    assert refiner.calls["vae"] == 2


def test_a_fingerprint_follows_names_dtypes_values_and_configuration() -> None:
    tower = peers.small_openclip()
    fingerprints = {fingerprint(tower)}
    assert {fingerprint(deepcopy(tower)), fingerprint(peers.small_openclip())} == fingerprints
    changed = deepcopy(tower)
    with torch.no_grad():
        changed.text_projection[3, 5] += 1e-6
    renamed = nn.ModuleDict({"tower": deepcopy(tower)})
    other_heads = deepcopy(tower)
    other_heads.config = replace(tower.config, heads=2)
    half = deepcopy(tower).to(torch.bfloat16)
    for module in (changed, renamed, other_heads, half, peers.small_openclip(seed=1)):
        fingerprints.add(fingerprint(module))
    assert len(fingerprints) == 6
    zeros = [nn.Module() for _ in range(2)]
    for module, dtype in zip(zeros, (torch.float16, torch.bfloat16), strict=True):
        module.register_buffer("zero", torch.zeros(3, dtype=dtype))  # the same bytes
    assert fingerprint(zeros[0]) != fingerprint(zeros[1])
