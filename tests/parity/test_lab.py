"""The lab on live peers: a planted fault is named and explained, two at once are both found, a clean run agrees.

The peer is diffusers' pipeline on the same weights; ours is untouched.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pairs
import pytest
import torch
import torch.nn.functional as F
from cases import sample
from short_kits import short_kits
from torch import nn

from sdxl_ref.networks.layers import QuickGELU
from sdxl_ref.parity import live
from sdxl_ref.parity.kit import Kit, make_kit
from sdxl_ref.parity.pipelines import compare_with_kit
from sdxl_ref.parity.report import Report
from sdxl_ref.parity.trace import Trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOLDERS = TemporaryDirectory(prefix="sdxl-ref-kits-")  # until the process ends
Fault = Callable[[Any], None]


def block(peer: Any) -> Any:
    return peer.unet.mid_block.attentions[0].transformer_blocks[0]


def transformer_eps(peer: Any) -> None:
    peer.unet.mid_block.attentions[0].norm.eps = 1e-5


def resblock_eps(peer: Any) -> None:
    peer.unet.down_blocks[1].resnets[0].norm1.eps = 1e-6


def sines_first(peer: Any) -> None:
    peer.unet.time_proj.flip_sin_to_cos = False


def tanh_gelu(peer: Any) -> None:
    block(peer).ff.net[0].gelu = lambda gate: F.gelu(gate, approximate="tanh")


def swapped_halves(peer: Any) -> None:
    geglu = block(peer).ff.net[0]
    geglu.forward = lambda x: F.gelu(geglu.proj(x).chunk(2, -1)[0]) * geglu.proj(x).chunk(2, -1)[1]


def q_and_k_exchanged(peer: Any) -> None:
    attention = block(peer).attn1
    attention.to_q, attention.to_k = attention.to_k, attention.to_q


def unscaled_scores(peer: Any) -> None:
    def processor(attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2))

    block(peer).attn2.processor = processor


def transposed_weight(peer: Any) -> None:
    weight = block(peer).attn1.to_v.weight
    block(peer).attn1.to_v.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)


def quick_gelu(peer: Any) -> None:
    peer.text_encoder_2.text_model.encoder.layers[0].mlp.activation_fn = QuickGELU()


def vae_eps(peer: Any) -> None:
    peer.vae.decoder.mid_block.resnets[0].norm1.eps = 1e-3


def symmetric_padding(peer: Any) -> None:
    down = peer.vae.encoder.down_blocks[0].downsamplers[0]
    down.padding = 1
    down.conv.padding = (1, 1)


def height_and_width_swapped(peer: Any) -> None:
    numbers = peer._get_add_time_ids
    peer._get_add_time_ids = lambda *args, **options: tuple(
        ids[:, [1, 0, *range(2, ids.shape[1])]] for ids in numbers(*args, **options)
    )


def narrow_sizes(peer: Any) -> None:
    numbers = peer._get_add_time_ids
    peer._get_add_time_ids = lambda *args, **options: tuple(ids.bfloat16().float() for ids in numbers(*args, **options))


def padded_with_end(peer: Any) -> None:
    peer.tokenizer_2 = live.tokenizer("<|endoftext|>")


def no_offset(peer: Any) -> None:
    peer.scheduler.register_to_config(steps_offset=0)


def unscaled_latents(peer: Any) -> None:
    peer.vae.register_to_config(scaling_factor=1.0)


MID = "unet/middle_block.1"
INSIDE = f"{MID}.transformer_blocks.0"
FAULTS: dict[Fault, tuple[str, str]] = {  # who is named, and what is said
    transformer_eps: (f"{MID}.norm", "eps 1e-05"),
    resblock_eps: ("unet/input_blocks.3.0.in_layers.0", "eps 1e-06"),
    sines_first: ("unet", "sines before cosines"),
    tanh_gelu: (f"{INSIDE}.ff.net.0", "tanh"),
    swapped_halves: (f"{INSIDE}.ff.net.0", "halves of GEGLU swapped"),
    q_and_k_exchanged: (f"{INSIDE}.attn1.to_q", "to_q with the weights of to_k"),
    unscaled_scores: (f"{INSIDE}.attn2", "not divided by sqrt(d)"),
    transposed_weight: (f"{INSIDE}.attn1.to_v", "transposed"),
    quick_gelu: ("text_encoder_2/transformer.resblocks.0.mlp.gelu", "quick gelu"),
    vae_eps: ("vae/decoder.mid.block_1.norm1", "eps 0.001"),
    symmetric_padding: ("vae/encoder.down.0.downsample", "symmetric padding"),
    height_and_width_swapped: ("conditioning/y", "height and width of the original size exchanged"),
    narrow_sizes: ("conditioning/y", "sizes in bfloat16"),
    padded_with_end: ("tokens/text_encoder_2", "padding with the end-of-text token"),
    no_offset: ("schedule/sigmas", "steps_offset 0"),
    unscaled_latents: ("latents/picture", "the scale 0.13025 missing"),
}


@lru_cache
def ours() -> Any:
    """A tiny refiner whose weights are numbers of float16, as those of files are."""
    networks = pairs.own_networks("refiner")
    for network in networks.values():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())
    return pairs.ImageToImagePipeline(pairs.REFINER, **networks)


@lru_cache
def kit(dtype: torch.dtype = torch.float32) -> Kit:
    """Of a tiny refiner. diffusers has the sizes in the networks' dtype: in bfloat16 a kit has sizes that it holds."""
    whole = dtype == torch.bfloat16
    folder = Path(FOLDERS.name) / str(dtype)
    with short_kits():
        return make_kit(ours(), folder, (dtype,), side=64, whole_sizes=whole, say=lambda text: None)


def peer_trace(*faults: Fault, dtype: torch.dtype = torch.float32) -> Trace:
    peer = live.diffusers_pipeline(ours(), dtype)
    for fault in faults:
        fault(peer)
    return live.recorded(peer, ours(), kit(dtype))


def judged(*faults: Fault) -> Report:
    return compare_with_kit(peer_trace(*faults), kit(), ours())


@pytest.mark.parametrize("dtype", sample(DTYPES, torch.float32), ids=str)
def test_a_clean_peer_agrees(dtype: torch.dtype) -> None:
    report = compare_with_kit(peer_trace(dtype=dtype), kit(dtype), ours())
    assert report.culprits == []
    assert report.verdict == "agrees"
    assert sum(point.own is not None for point in report.points) > 200


@pytest.mark.parametrize("fault", sample(FAULTS, resblock_eps), ids=lambda fault: fault.__name__)
def test_a_fault_is_named_and_explained(fault: Fault) -> None:
    name, cause = FAULTS[fault]
    report = judged(fault)
    assert report.first == name, report.culprits
    assert cause in report.causes[name]


def apart(first: Fault, second: Fault) -> bool:
    """Whether two faults can stand side by side: one does not hide that the other's module is at fault."""
    return FAULTS[first][0] != FAULTS[second][0] and {first, second} not in ({height_and_width_swapped, narrow_sizes},)


PAIRS = [pair for pair in combinations(FAULTS, 2) if apart(*pair)]
TWENTY = Random(0).sample(PAIRS, 20)


@pytest.mark.parametrize("pair", sample(TWENTY, TWENTY[0]), ids=lambda pair: "-".join(fault.__name__ for fault in pair))
def test_two_faults_are_both_named(pair: tuple[Fault, Fault]) -> None:
    report = compare_with_kit(peer_trace(*pair), kit(), ours(), causes=False)
    assert {FAULTS[fault][0] for fault in pair} <= set(report.culprits)


@pytest.mark.sweep
def test_from_a_recorded_file_alone(tmp_path: Path) -> None:
    peer_trace(q_and_k_exchanged).save(tmp_path / "theirs.safetensors")
    report = compare_with_kit(Trace.load(tmp_path / "theirs.safetensors"), kit(), ours())
    assert report.first == FAULTS[q_and_k_exchanged][0]


@pytest.mark.sweep
def test_the_smallest_fault_is_above_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """By how much is printed: an eps of 1e-5 for 1e-6 on random weights is the least that the table has."""
    report = judged(transformer_eps)
    point = next(point for point in report.points if point.name == FAULTS[transformer_eps][0])
    assert point.own is not None
    margin = point.own / point.budget
    print(f"{point.name}: own error {point.own:.1e}, budget {point.budget:.1e}: {margin:.1f} times it")
    assert margin > 1.2
