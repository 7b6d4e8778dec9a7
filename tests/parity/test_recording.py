"""`parity.record`: what a run computed, under official names, and the same run to the bit."""

from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pairs import seeded

from sdxl_ref import EnsemblePipeline, parity
from sdxl_ref.parity.sketch import Sketch
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.parity.two_traces import compare_traces
from sdxl_ref.pipelines.compiled import compile_networks


def refine(pipe: Any, **changes: Any) -> torch.Tensor:
    arguments = pairs.request(num_inference_steps=4, output_type="pt") | changes
    return pipe(**arguments, generator=[seeded(0)]).images  # type: ignore[no-any-return]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_run_is_the_same_to_the_bit(packed: bool, tiny_refiner_file: Path) -> None:
    pipe = pairs.ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    if packed:
        pipe.pack()
    usual = refine(pipe)
    with parity.record(pipe) as trace:
        recorded = refine(pipe)
    bound = 1e-4 if packed else 0.0  # hooks have packed blocks compute module by module
    assert float((recorded - usual).abs().max()) <= bound
    assert torch.equal(refine(pipe), usual)  # nothing is left
    assert torch.equal(trace.tensor(Key("picture")), recorded)  # type: ignore[arg-type]
    assert Key("unet/middle_block.1.transformer_blocks.0.attn1.to_q") in trace


@pytest.mark.sweep
def test_of_compiled_networks_the_outermost_is_seen(tiny_refiner_file: Path) -> None:
    """UNet, encoder and decoder are graphs, which have no modules inside; recording is no part of them."""
    pipe = pairs.ImageToImagePipeline.from_pretrained(tiny_refiner_file)
    with parity.record(pipe) as plain:
        refine(pipe)
    compile_networks([pipe], backend="eager")
    usual = refine(pipe)
    with parity.record(pipe) as trace:
        recorded = refine(pipe)
    assert torch.equal(recorded, usual)
    assert {point for point in trace.points() if point.startswith("unet")} == {"unet"}
    assert {"vae/encoder", "vae/decoder", "vae/quant_conv", "text_encoder_2/ln_final"} <= set(trace.points())
    report = compare_traces(plain, trace)
    assert report.culprits == []
    assert "points are not in the second trace: " in report.notes[0]


def test_what_a_trace_holds() -> None:
    pipe = pairs.refiner()
    with parity.record(pipe) as trace:
        refine(pipe)
    assert trace.tensor(Key("schedule/sigmas")).shape == (3,)  # type: ignore[union-attr]
    assert trace.tensor(Key("text_encoder_2", 0, "in.0")).shape == (2, 77)  # type: ignore[union-attr]
    numbers = trace.tensor(Key("conditioning/numbers"))
    assert numbers is not None
    assert numbers[:, -1].tolist() == [2.5, 6.0]  # the negative side first
    x, denoised, sigma = (trace.tensor(Key(f"denoiser/{name}")) for name in ("x", "denoised", "sigma"))
    eps, handed = trace.tensor(Key("unet")), trace.tensor(Key("unet", 0, "in.0"))
    assert not any(value is None for value in (x, denoised, sigma, eps, handed))
    assert torch.equal(handed, torch.cat([x, x]) / torch.sqrt(sigma**2 + 1))
    negative, positive = (x - sigma * side for side in eps.chunk(2))
    assert torch.equal(denoised, negative + 5.0 * (positive - negative))
    picture, noise = trace.tensor(Key("latents/picture")), trace.tensor(Key("noise", 1))
    assert not any(value is None for value in (picture, noise))
    assert torch.equal(x, picture + trace.tensor(Key("schedule/sigmas"))[0] * noise)  # type: ignore[index]
    assert torch.equal(trace.tensor(Key("sampler/0")), trace.tensor(Key("denoiser/x", 1)))  # type: ignore[arg-type]
    order = list(trace.values)
    assert (
        order.index(Key("unet/input_blocks.1.0")) < order.index(Key("unet/input_blocks.1")) < order.index(Key("unet"))
    )
    assert Key("unet/out.1", 0, "in.0") in trace.same  # an input that is an output is kept once


def test_a_selection_in_a_file_and_sketches(tmp_path: Path) -> None:
    pipe = pairs.refiner()
    with parity.record(pipe, points="unet/**", path=tmp_path / "t.safetensors", sketch=True):
        refine(pipe)
    trace = Trace.load(tmp_path / "t.safetensors")
    assert all(key.point.split("/")[0] == "unet" for key in trace.values)
    assert all(isinstance(value, Sketch) for value in trace.values.values())
    assert trace.settings["dtype"] == "float32"


def test_an_ensemble_has_its_refiner_apart() -> None:
    pipe = EnsemblePipeline(pairs.base(), pairs.refiner())
    arguments = pairs.SMALL | {"num_inference_steps": 5, "output_type": "pt"}
    with parity.record(pipe, points=["unet", "refiner/unet", "sampler/*"]) as trace:
        pipe("a cup", generator=[seeded(0)], **arguments)
    calls = {point: [key.call for key in trace.outputs() if key.point == point] for point in ("unet", "refiner/unet")}
    assert calls == {"unet": [0, 1, 2, 3], "refiner/unet": [0]}
    assert [point for point in trace.points() if point.startswith("sampler")] == [f"sampler/{i}" for i in range(5)]
