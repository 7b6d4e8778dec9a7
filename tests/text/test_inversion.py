"""Tokens that stand for vectors: where they stand in a prompt, and what the towers make of them, against diffusers."""

from pathlib import Path
from typing import Any

import pairs
import peers
import pytest
import torch
from cases import sample
from safetensors.torch import save_file
from torch import Tensor

from sdxl_ref import pack
from sdxl_ref.config import InputError
from sdxl_ref.networks.packing import why_not
from sdxl_ref.text import a1111
from sdxl_ref.text.chunks import read_plain
from sdxl_ref.text.inversion import FIRST, Inversions, Placeholders
from sdxl_ref.text.prompt_encoding import encode_prompts
from sdxl_ref.text.tokenizer import encode
from sdxl_ref.weights.inversion_files import load_inversion

PARITY = 1e-5  # float32, two towers
WIDTHS = {"clip_l": 32, "clip_g": 64}


def vectors(count: int, *towers: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tower: 0.3 * torch.randn(count, WIDTHS[tower], generator=generator) for tower in towers or WIDTHS}


def inversions(**counts: int) -> Inversions:
    """Tokens `<name>` of so many vectors each, on both towers."""
    loaded = Inversions(pairs.BASE.text_encoders)
    for name, count in counts.items():
        loaded.add(f"<{name}>", vectors(count, seed=len(name)))
    return loaded


def placeholders(**tokens: int) -> Placeholders:
    """Words of so many vectors each, on OpenCLIP."""
    loaded = Inversions(pairs.REFINER.text_encoders)
    for token, count in tokens.items():
        loaded.add(token, vectors(count, "clip_g"))
    return loaded.placeholders("clip_g")


# --- against diffusers --------------------------------------------------------------------------------------------


def diffusers_with(folder: Path, tokens: dict[str, dict[str, Tensor]], kind: str) -> Any:
    """A pipeline of diffusers that loaded each token as its documentation says: first and second tower apart."""
    networks = pairs.networks(kind)
    parts = {
        "tokenizer_2": peers.clip_tokenizer(folder / "tokenizer_2", pad="!"),
        "text_encoder_2": peers.transformers_openclip(networks["text_encoder_2"]),
    }
    if kind == "base":
        parts["tokenizer"] = peers.clip_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
        parts["text_encoder"] = peers.transformers_clip(networks["text_encoder"])
    name = "StableDiffusionXLPipeline"
    peer = pairs.diffusers_pipeline(name, kind, "EulerDiscreteScheduler", "leading", {}, **parts)
    for token, rows in tokens.items():
        for tower, suffix in (("clip_l", ""), ("clip_g", "_2")):
            if tower in rows and f"tokenizer{suffix}" in parts:
                encoder, tokenizer = parts[f"text_encoder{suffix}"], parts[f"tokenizer{suffix}"]
                peer.load_textual_inversion(rows[tower], token=token, text_encoder=encoder, tokenizer=tokenizer)
    return peer


PROMPTS = ["a <cat-toy> on a mat, <many>", "<many>, <many> and a<CAT-TOY>s", "no token here", "a sks dog, asksb"]


@pytest.mark.parametrize("kind", sample(["base", "refiner"], "base"))
def test_tokens_are_read_as_by_diffusers(kind: str, tmp_path: Path) -> None:
    """The same ids in the same places, and the same states behind them."""
    tokens = {"<cat-toy>": vectors(1), "<many>": vectors(4, seed=1), "sks": vectors(2, seed=2)}
    peer = diffusers_with(tmp_path, tokens, kind)
    ours = Inversions(pairs.CONFIGS[kind].text_encoders)
    for token, rows in tokens.items():
        ours.add(token, {tower: rows[tower] for tower in ours.widths})
    for prompt in PROMPTS:
        [chunk] = read_plain(prompt, ours.placeholders("clip_g"))
        words = peer.maybe_convert_prompt(prompt, peer.tokenizer_2)
        assert [token.id for token in chunk] == peer.tokenizer_2(words).input_ids[1:-1]
    theirs, _, their_pooled, _ = peer.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    networks = pairs.networks(kind)
    towers = networks.get("text_encoder"), networks["text_encoder_2"]
    context, pooled = encode_prompts(*towers, PROMPTS, PROMPTS, "cpu", inversions=ours)
    assert peers.distance(context, theirs) < PARITY
    assert peers.distance(pooled, their_pooled) < PARITY


def test_a_file_of_one_tower_is_words_to_the_other_as_in_diffusers(tmp_path: Path) -> None:
    """Of diffusers' own form, which both read from the file."""
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-toy>": vectors(2, "clip_g")["clip_g"]}, file)
    peer = diffusers_with(tmp_path, {}, "base")
    encoder, tokenizer = peer.text_encoder_2, peer.tokenizer_2
    peer.load_textual_inversion(str(tmp_path), weight_name=file.name, text_encoder=encoder, tokenizer=tokenizer)
    ours = Inversions(pairs.BASE.text_encoders)
    assert load_inversion(ours, file) == "<cat-toy>"
    networks = pairs.networks("base")
    theirs, _, _, _ = peer.encode_prompt("a <cat-toy>", do_classifier_free_guidance=False)
    towers = networks["text_encoder"], networks["text_encoder_2"]
    context, _ = encode_prompts(*towers, ["a <cat-toy>"], ["a <cat-toy>"], "cpu", inversions=ours)
    assert peers.distance(context, theirs) < PARITY


# --- where they stand ---------------------------------------------------------------------------------------------


def ids(prompt: str, known: Placeholders, syntax: Any = read_plain) -> list[int]:
    return [token.id for chunk in syntax(prompt, known) for token in chunk]


def test_capitals_are_the_token_with_all_its_vectors() -> None:
    """diffusers takes only the first of several vectors then."""
    assert ids("a ZQX", placeholders(zqx=2)) == [*encode("a"), FIRST, FIRST + 1]
    assert ids("\u017fzq \u212azq", placeholders(szq=1, kzq=1)) == [FIRST, FIRST + 1]  # long s, the sign for kelvin


def test_the_longest_token_comes_first() -> None:
    known = placeholders(zqx=1, zqxy=2)
    assert ids("zqx zqxy zqxyy", known) == [FIRST, FIRST + 1, FIRST + 2, FIRST + 1, FIRST + 2, *encode("y")]


def test_the_web_ui_finds_whole_words_and_diffusers_parts_of_them() -> None:
    known = placeholders(zqx=1)
    prompt = "zqx, ZQX2 zqxen"
    assert ids(prompt, known) == [FIRST, *encode(","), FIRST, *encode("2"), FIRST, *encode("en")]
    assert ids(prompt, known, a1111.read) == [FIRST, *encode(","), FIRST, *encode("2"), *encode("zqxen")]


def test_a_weighted_token_has_the_weight_at_all_its_vectors() -> None:
    [chunk] = a1111.read("a (zqx:1.3) dog", placeholders(zqx=3))
    assert [token.weight for token in chunk] == [1, 1.3, 1.3, 1.3, 1]


def test_vectors_of_a_token_stay_in_one_chunk_in_the_web_ui() -> None:
    assert [len(chunk) for chunk in a1111.read("cat " * 73 + "zqx", placeholders(zqx=3))] == [73, 3]


def test_vectors_beyond_the_end_are_cut_by_name() -> None:
    with pytest.warns(UserWarning, match="longer than 77 tokens; cut: 'dog zqx cat'"):
        [chunk] = read_plain("cat " * 75 + "dog zqx cat", placeholders(zqx=3))
    assert len(chunk) == 75


# --- what the towers make of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfy"])
def test_the_embedding_of_a_word_as_a_vector_is_the_word(syntax: str) -> None:
    """In all syntaxes, with the pooled vector still at the end of the text."""
    networks = pairs.networks("base")
    towers = networks["text_encoder"], networks["text_encoder_2"]
    [cat] = encode("cat")
    loaded = Inversions(pairs.BASE.text_encoders)
    tables = towers[0].text_model.embeddings.token_embedding.weight, towers[1].token_embedding.weight
    loaded.add("<word>", {"clip_l": tables[0][[cat]], "clip_g": tables[1][[cat]]})
    name = "embedding:<word>" if syntax == "comfy" else "<word>"
    prompt = f"a {name} on a mat"
    ours = encode_prompts(*towers, [prompt], [prompt], "cpu", syntax=syntax, inversions=loaded)
    usual = encode_prompts(*towers, ["a cat on a mat"], ["a cat on a mat"], "cpu")
    assert all(map(torch.equal, ours, usual))


def test_the_weights_of_a_tower_stay_as_they_are() -> None:
    networks = pairs.own_networks("base")
    towers = networks["text_encoder"], networks["text_encoder_2"]
    before = [parameter.clone() for tower in towers for parameter in tower.parameters()]
    encode_prompts(*towers, ["a <x>"], ["a <x>"], "cpu", inversions=inversions(x=2))
    after = [parameter for tower in towers for parameter in tower.parameters()]
    assert all(map(torch.equal, before, after))
    assert not any(module._forward_hooks for tower in towers for module in tower.modules())


def test_packed_towers_in_bfloat16() -> None:
    networks = {part: network.bfloat16() for part, network in pairs.own_networks("base").items()}
    towers = networks["text_encoder"], networks["text_encoder_2"]
    if why := why_not(towers[1]):
        pytest.skip(why)
    plain = encode_prompts(*towers, ["a <x>"], ["a <x>"], "cpu", inversions=inversions(x=2))
    packed = encode_prompts(*map(pack, towers), ["a <x>"], ["a <x>"], "cpu", inversions=inversions(x=2))
    assert packed[0].dtype == torch.bfloat16
    assert peers.distance(packed[0], plain[0]) < 1e-2  # bfloat16


# --- what is loaded -----------------------------------------------------------------------------------------------


def test_tokens_are_unloaded_one_by_one_or_all() -> None:
    loaded = inversions(x=1, y=2, z=1)
    assert loaded.tokens == ["<x>", "<y>", "<z>"]
    loaded.unload("<y>")
    assert loaded.tokens == ["<x>", "<z>"]
    with pytest.raises(InputError, match="no token '<zz>' is loaded: did you mean '<z>'"):
        loaded.unload("<zz>")
    loaded.unload()
    assert loaded.tokens == []
    assert ids("<x>", loaded.placeholders("clip_g")) == encode("<x>")


@pytest.mark.parametrize(
    ("token", "rows", "message"),
    [
        ("<x>", vectors(1), "the token '<x>' stands for vectors already: unload it first"),
        ("<X>", vectors(1), "stands for vectors already"),
        ("cat", vectors(1), "'cat' is a token of the vocabulary: choose another token, such as '<cat>'"),
        ("", vectors(1), "expected a token without spaces around it, found ''"),
        (" zqx", vectors(1), "expected a token without spaces around it, found ' zqx'"),
        ("zqx", {"clip_l": torch.zeros(2, 64)}, "1 to 75 vectors of 32 numbers for clip_l, found a tensor of (2, 64)"),
        ("zqx", {"clip_g": torch.zeros(76, 64)}, "found a tensor of (76, 64)"),
        ("zqx", {"clip_g": torch.zeros(0, 64)}, "found a tensor of (0, 64)"),
        ("zqx", {"clip_g": torch.full((1, 64), torch.nan)}, "expected vectors of finite numbers for clip_g"),
        ("zqx", {"clip_g": torch.zeros(1, 64, dtype=torch.int64)}, "expected vectors of finite numbers for clip_g"),
        ("zqx", {"t5": torch.zeros(1, 64)}, "expected vectors for clip_l and clip_g, found some for t5"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(token: str, rows: Any, message: str) -> None:
    loaded = inversions(x=1)
    with pytest.raises(InputError) as caught:
        loaded.add(token, rows)
    assert message in str(caught.value)
    assert loaded.tokens == ["<x>"]


def test_the_second_tower_may_follow_later() -> None:
    loaded = Inversions(pairs.BASE.text_encoders)
    loaded.add("<x>", vectors(1, "clip_l"))
    loaded.add("<x>", vectors(2, "clip_g"))
    assert loaded.tokens == ["<x>"]
    assert [len(loaded.placeholders(tower).ids["<x>"]) for tower in WIDTHS] == [1, 2]
