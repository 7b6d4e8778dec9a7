"""Whether the tokenizers of a folder in diffusers' layout are CLIP's: prompts are always cut by the one built in.

Source: `CLIPTokenizer` in transformers, the files that it reads.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdxl_ref.config import InputError
from sdxl_ref.text import tokenizer
from sdxl_ref.weights.json_files import Json, read_json_if_there
from sdxl_ref.weights.regular import read_text

CLASSES = (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"])
START = "<|startoftext|>"
END = "<|endoftext|>"
PADDING = {"tokenizer": END, "tokenizer_2": "!"}  # what a short prompt is filled up with
KNOWN_TOKENS = {START, END, "!"}
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
FILES = (*SETTINGS, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.json")


def check_tokenizers(folder: Path, index: Json) -> None:
    """InputError for a tokenizer that cuts or fills prompts in another way."""
    for name, padding in PADDING.items():
        if index.get(name) in (None, [None, None]):
            continue
        if index[name] not in CLASSES:
            raise InputError(f"{folder}: expected {name} of CLIP's in the index, found {index[name]}")
        for file in SETTINGS:
            check_settings(folder / name / file, padding)
        path = folder / name / "added_tokens.json"
        check_added(path, read_json_if_there(path) or ())
        path = folder / name / "vocab.json"
        check_vocabulary(path, read_json_if_there(path))
        path = folder / name / "merges.txt"
        if os.path.lexists(path):
            _, *lines = read_text(path).split("\n")  # the first is a title
            check_merges(path, [tuple(line.split()) for line in lines if line.strip()])
        check_fast(folder / name / "tokenizer.json")


def check_settings(path: Path, padding: str) -> None:
    """InputError where the settings of a tokenizer, in either file, name other tokens, or another way to fill up."""
    expected: Json = {"pad_token": padding, "bos_token": START, "eos_token": END, "unk_token": END}
    expected |= {"model_max_length": 77, "padding_side": "right", "truncation_side": "right"}
    fields = read_json_if_there(path) or {}
    for key, value in expected.items():
        found = fields.get(key, value)
        found = found.get("content") if isinstance(found, dict) else found
        if found != value:
            raise InputError(f"{path}: expected the {key} {value!r}, found {found!r:.60}")
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        check_added(path, contents(fields.get(key)))


def contents(tokens: Any) -> list[str]:
    """The tokens in a list or an object of them, each a text or an object with its `content`."""
    each = list(tokens.values()) if isinstance(tokens, dict) else list(tokens or [])
    return [str(token.get("content")) if isinstance(token, dict) else str(token) for token in each]


def check_added(path: Path, tokens: Iterable[str]) -> None:
    """InputError for tokens that CLIP does not have."""
    if more := sorted(set(tokens) - KNOWN_TOKENS):
        raise InputError(f"{path}: expected no tokens beyond CLIP's, found {', '.join(more[:4]):.80}: remove them")


def check_fast(path: Path) -> None:
    """The same of the one file that transformers' fast tokenizers have."""
    fields = read_json_if_there(path)
    if fields is None:
        return
    try:
        check_added(path, contents(fields.get("added_tokens")))
        if (fields.get("truncation") or {}).get("direction", "Right") != "Right":
            raise InputError(
                f"{path}: expected prompts to be cut at their right end, found {fields['truncation']!r:.80}"
            )
        check_vocabulary(path, fields["model"]["vocab"])
        pairs = fields["model"]["merges"]
        check_merges(path, [tuple(pair.split() if isinstance(pair, str) else pair) for pair in pairs])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a tokenizer as transformers writes it, found none ({error!r})") from error


def check_vocabulary(path: Path, found: Json | None) -> None:
    """InputError where a token has another id than CLIP's, or there are others."""
    if found is None:
        return
    ours = {token: i for i, token in tokenizer.tokens().items() if i < tokenizer.START}
    ours |= {START: tokenizer.START, END: tokenizer.END}
    if unlike := sorted(token for token in ours.keys() | found.keys() if ours.get(token) != found.get(token)):
        words = ", ".join(f"{token!r:.40} {found.get(token)!r:.20}" for token in unlike[:3])
        raise InputError(f"{path}: expected CLIP's vocabulary, found {len(unlike)} tokens with other ids, as {words}")


def check_merges(path: Path, found: list[tuple[str, ...]]) -> None:
    """InputError where other pairs are joined than CLIP's, or in another order."""
    ours = list(tokenizer.merges())
    if found != ours:
        i = next((i for i, pair in enumerate(ours) if found[i : i + 1] != [pair]), len(ours))
        pair = " ".join(map(str, found[i])) if i < len(found) else "none"
        raise InputError(f"{path}: expected CLIP's {len(ours)} pairs, found {pair!r:.60} as number {i + 1}")
