"""Whether the tokenizers of a folder in diffusers' layout are CLIP's: prompts are always cut by the one built in.

Source: `CLIPTokenizer` in transformers, the files that it reads.
"""

from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.text import tokenizer
from sdxl_ref.weights.json_files import Json, read_json
from sdxl_ref.weights.regular import check_regular

CLASSES = (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"])
PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # what a short prompt is filled up with
KNOWN_TOKENS = {"<|startoftext|>", "<|endoftext|>", "!"}
FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def check_tokenizers(folder: Path, index: Json) -> None:
    """InputError for a tokenizer that cuts or fills prompts in another way."""
    for name, token in PADDING.items():
        if index.get(name) in (None, [None, None]):
            continue
        if index[name] not in CLASSES:
            raise InputError(f"{folder}: expected {name} of CLIP's in the index, found {index[name]}")
        config, special, added, vocabulary, merges = (folder / name / file for file in FILES)
        fields = read_if_there(special) | read_if_there(config)
        found = fields.get("pad_token", token)
        found = found.get("content") if isinstance(found, dict) else found
        if found != token:
            raise InputError(f"{config}: expected the pad_token {token!r}, found {found!r}")
        if fields.get("model_max_length", 77) != 77:
            raise InputError(f"{config}: expected model_max_length 77, found {fields['model_max_length']!r}")
        if more := sorted(set(read_if_there(added)) - KNOWN_TOKENS):
            raise InputError(f"{added}: expected no tokens beyond CLIP's, found {', '.join(more[:4])}: remove the file")
        check_vocabulary(vocabulary)
        check_merges(merges)


def read_if_there(path: Path) -> Json:
    return read_json(path) if path.exists() else {}


def check_vocabulary(path: Path) -> None:
    """InputError where a file gives a token another id than CLIP's, or has others."""
    if not path.exists():
        return
    found = read_json(path)
    ours = {token: i for i, token in tokenizer.tokens().items() if i < tokenizer.START}
    ours |= {"<|startoftext|>": tokenizer.START, "<|endoftext|>": tokenizer.END}
    if unlike := sorted(token for token in ours.keys() | found.keys() if ours.get(token) != found.get(token)):
        words = ", ".join(f"{token!r:.40} {found.get(token)!r:.20}" for token in unlike[:3])
        raise InputError(f"{path}: expected CLIP's vocabulary, found {len(unlike)} tokens with other ids, as {words}")


def check_merges(path: Path) -> None:
    """InputError where a file joins other pairs than CLIP's, or in another order."""
    if not path.exists():
        return
    check_regular(path)
    _, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the first is a title
    found = [tuple(line.split()) for line in lines if line.strip()]
    ours = list(tokenizer.merges())
    if found != ours:
        i = next((i for i, pair in enumerate(ours) if found[i : i + 1] != [pair]), len(ours))
        pair = " ".join(found[i]) if i < len(found) else "none"
        raise InputError(f"{path}: expected CLIP's {len(ours)} pairs, found {pair!r:.60} as number {i + 1}")
