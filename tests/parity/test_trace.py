"""A trace in a file, in a folder of another tool, and names of points."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import seeded
from safetensors.torch import save_file

from sdxl_ref.config import InputError
from sdxl_ref.parity.sketch import Sketch, sketch
from sdxl_ref.parity.trace import Key, Trace, matches


@pytest.mark.parametrize(
    "text", ["unet", "unet/middle_block.1", "unet/out.0#12", "unet:in.3", "text_encoder_2#1:out.1"]
)
def test_a_key_is_its_text(text: str) -> None:
    assert str(Key.parse(text)) == text


@pytest.mark.parametrize("text", ["", "unet#x", "unet:in", "unet:middle.0", "a#1#2"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(InputError, match="expected a name such as unet/middle_block"):
        Key.parse(text)


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, generator=seeded(0))
    turned = x.t()  # under two names, and not row by row in memory
    values: dict[Key, torch.Tensor | Sketch] = {
        Key("unet/b"): x,
        Key("unet/a", 1): x.bfloat16(),
        Key("unet"): sketch(x),
    }
    values |= {Key("vae/c"): turned, Key("vae"): turned}
    Trace(values, {Key("unet/b", 0, "in.0"): Key("unet/b")}, {"dtype": "float32"}).save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    assert list(again.values) == list(values)
    assert torch.equal(again.tensor(Key("unet/b", 0, "in.0")), x)  # type: ignore[arg-type]
    assert again.tensor(Key("unet/a", 1)).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert torch.equal(again.tensor(Key("vae")), turned)  # type: ignore[arg-type]
    kept = again.get(Key("unet"))
    assert isinstance(kept, Sketch)
    assert torch.equal(kept.sums, sketch(x).sums)
    assert kept.figures == sketch(x).figures
    assert again.settings == {"dtype": "float32"}


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "unet").mkdir()
    np.save(tmp_path / "unet" / "middle_block.1#2.npy", x)
    np.save(tmp_path / "vae__decoder.npy", x)
    trace = Trace.load(tmp_path)
    assert set(trace.values) == {Key("unet/middle_block.1", 2), Key("vae/decoder")}
    assert np.array_equal(trace.tensor(Key("vae/decoder")), x)


def test_what_is_no_trace(tmp_path: Path) -> None:
    save_file({"unet": torch.zeros(1)}, tmp_path / "v9.safetensors", {"sdxl_ref.parity": '{"version": 9}'})
    with pytest.raises(InputError, match="a trace of version 9, expected 1"):
        Trace.load(tmp_path / "v9.safetensors")
    whole = (tmp_path / "v9.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-2])
    (tmp_path / "text.safetensors").write_text("no trace")
    for name in ("cut.safetensors", "text.safetensors", "none.safetensors"):
        with pytest.raises(InputError, match="is no trace, or not a whole one"):
            Trace.load(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.npy files"):
        Trace.load(tmp_path / "empty")
    (tmp_path / "empty" / "unet.npy").write_text("no array")
    with pytest.raises(InputError, match="is no array that can be read"):
        Trace.load(tmp_path / "empty")


def test_channels_last_maps_and_other_names() -> None:
    x = torch.randn(2, 4, 6, 3, generator=seeded(0))
    trace = Trace({Key("mid", 1): x}).channels_first().renamed({"mid": "unet/middle_block"})
    assert torch.equal(trace.tensor(Key("unet/middle_block", 1)), x.permute(0, 3, 1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("glob", "point", "is_in"),
    [
        ("**", "unet/out.0", True),
        ("unet/**", "unet", True),
        ("unet/**", "vae/decoder", False),
        ("unet/input_blocks.*", "unet/input_blocks.4.1.norm", True),
        ("*", "unet/out.0", False),
        ("unet/out.?", "unet/out.2", True),
        ("unet/out.?", "unet/outs2", False),
    ],
)
def test_globs(glob: str, point: str, is_in: bool) -> None:
    assert matches(point, glob) is is_in


@pytest.mark.parametrize(
    "header",
    ["(", "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}", "{'descr': '|O'}", "9" * 5000],
    ids=["cut off", "of 373 GiB", "of objects", "a number"],
)
def test_an_array_whose_header_is_wrong(header: str, tmp_path: Path) -> None:
    """Found by `make fuzz`: numpy raises MemoryError, TokenError and others."""
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
    (tmp_path / "unet__a.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"unet__a\.npy is no array that can be read"):
        Trace.load(tmp_path)
