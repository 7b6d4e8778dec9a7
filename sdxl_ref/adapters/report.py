"""What any file is, adapters too: the one report of `sdxl-ref info` and `weights-convert inspect`.

An adapter is told from its header and its alphas alone: whose names it has, which parts it changes, kind and rank.
Kinds by the tensors that LyCORIS, PEFT and kohya's tools name.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdxl_ref.config import InputError
from sdxl_ref.weights.folder import Source
from sdxl_ref.weights.names import find_file
from sdxl_ref.weights.report import Description, alone, checks, describe, dtypes_in, scan_files, summary
from sdxl_ref.weights.tensor_files import FOLDER_INDEX, open_tensors, read_metadata

FACTORS = {  # the end of a tensor's name behind its layer's -> the kind of adapter that has it
    r"lora[_.](linear_layer\.)?(down|up|mid)(\.weight)?|lora_[AB](\.default)?(\.weight)?|lora_embedding_[AB]": "LoRA",
    r"hada_[wt][12](_[ab])?": "LoHa",
    r"lokr_([wt][12])(_[ab])?": "LoKr",
    r"dora_scale|lora_magnitude_vector(\.default)?(\.weight)?": "DoRA",
    r"diff(_b)?|w_norm|b_norm": "whole differences",
    r"oft_blocks|oft_diag|oft_R(\.default)?(\.weight)?": "OFT",
    r"boft_[RS](\.default)?": "BOFT",
    r"[ab][12]\.weight": "GLoRA",
    r"ia3_l|on_input": "IA3",
}
ALPHA = "alpha"
KEY = re.compile(rf"(?P<layer>.+?)[._](?P<end>{'|'.join(FACTORS)}|{ALPHA}|rescale|scalar|bias_(indices|values|size))")
IA3 = re.compile(r"(?P<layer>(lora|lycoris)_\w+)\.(?P<end>weight)")  # the factors of LyCORIS' IA3 have no name
RANKED = re.compile(  # the factor whose shape is (rank, in)
    r"lora[_.](linear_layer\.)?down(\.weight)?|lora_A(\.default)?(\.weight)?|hada_w1_b|lokr_w2_b"
)
PEFT = r"(base_model\.model\.)?"
NETWORK = r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b"
NAMES = (  # the beginning of a layer's name -> whose it is, and the part that it belongs to
    (r"lora_unet_|lycoris_(unet_)?", "kohya's names", "unet"),
    (r"lora_te1_", "kohya's names", "text_encoder"),
    (r"lora_te2_|lora_te_", "kohya's names", "text_encoder_2"),
    (rf"{PEFT}unet\.", "diffusers' names", "unet"),
    (rf"{PEFT}text_encoder_2\.", "diffusers' names", "text_encoder_2"),
    (rf"{PEFT}text_encoder\.", "diffusers' names", "text_encoder"),
    (r"(model\.)?diffusion_model\.", "official names", "unet"),
    (r"conditioner\.embedders\.0\.transformer\.", "official names", "text_encoder"),
    (r"conditioner\.embedders\.[01]\.model\.", "official names", "text_encoder_2"),
    (rf"{PEFT}{NETWORK}", "PEFT's names", "unet"),
    (rf"{PEFT}(text_model\.)?encoder\.layers\.", "PEFT's names", "text encoder"),
)
CONTEXT = re.compile(r".*attn2[._](processor\.)?to_[kv]")  # a layer that reads the text: its width tells the model
MODELS = {2048: "an SDXL base", 1280: "an SDXL refiner", 768: "SD 1.x", 1024: "SD 2.x"}  # by that width


def describe_any(name: str | Path, variant: str | None = None, check: bool = False) -> Description:
    """What a file, folder or repository is: an adapter, or as `describe` tells it. InputError as it raises it."""
    path = Path(name)
    if os.path.exists(path) and not (path / FOLDER_INDEX).is_file():
        file = adapter_file(path)
        if file is not None:
            return describe_adapter(file, check)
    return describe(name, variant, check)


def adapter_file(path: Path) -> Path | None:
    """The file of an adapter, or the one of a folder; None for any other file."""
    try:
        file = find_file(path)
    except InputError:  # several files: a part in shards, or nothing
        return None
    return file if is_adapter(alone(file)) else None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether there are factors of layers, and more of them than of anything else."""
    found = Counter(parsed(name) is not None for name in names)
    return found[True] > found[False]


def parsed(name: str) -> re.Match[str] | None:
    """The layer of a factor, and the end of its name, which says what it is; None for another tensor."""
    return KEY.fullmatch(name) or IA3.fullmatch(name)


def describe_adapter(file: Path, check: bool = False) -> Description:
    """What an adapter is. See `describe`."""
    sources = alone(file)
    shapes = {name: source.shape for name, source in sources.items()}
    dtypes = dtypes_in(sources)
    metadata = read_metadata(file)
    by_part: dict[str, list[str]] = {}
    others = []
    for name in sources:
        match = parsed(name)
        if match is None:
            others.append(name)
        else:
            by_part.setdefault(part_of(match["layer"]), []).append(name)
    digest = scan_files(file) if check else ""
    return Description(
        file,
        f"an adapter: {', '.join(kinds_in(sources))}, in {', '.join(forms_in(sources))}",
        {part: summary(names, shapes, dtypes) for part, names in sorted(by_part.items())},
        "",
        extras=tuple(others),
        metadata=dict(sorted(metadata.items())),
        checks=checks(digest) if check else (),
        details=details(file, sources),
    )


def part_of(layer: str) -> str:
    """The part that a layer belongs to, by its name; "other" where that does not tell."""
    return next((part for pattern, _, part in NAMES if re.match(pattern, layer)), "other")


def kinds_in(sources: Mapping[str, Source]) -> list[str]:
    """The kinds of adapter that a file mixes: a DoRA is a LoRA, a LoHa or a LoKr with a magnitude."""
    ends = {match["end"]: len(source.shape) for name, source in sources.items() if (match := parsed(name))}
    kinds = [kind for pattern, kind in FACTORS.items() if any(re.fullmatch(pattern, end) for end in ends)]
    if ends.get("oft_blocks") == 4:  # LyCORIS' BOFT: one axis more, for the factors of the rotation
        return ["BOFT" if kind == "OFT" else kind for kind in kinds]
    return kinds


def forms_in(names: Iterable[str]) -> list[str]:
    """Whose names a file has."""
    layers = {match["layer"] for name in names if (match := parsed(name))}
    found = {form for pattern, form, _ in NAMES if any(re.match(pattern, layer) for layer in layers)}
    return sorted(found) or ["unknown names"]


def details(file: Path, sources: Mapping[str, Source]) -> dict[str, str]:
    """Layers by part, ranks, alphas, and the model by the width of the text that its layers read."""
    layers: dict[str, str] = {}
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    widths: set[int] = set()
    with open_tensors(file) as tensors:
        for name, source in sources.items():
            match = parsed(name)
            if match is None:
                continue
            layer = match["layer"]
            layers[layer] = part_of(layer)
            if RANKED.fullmatch(match["end"]) and source.shape:
                ranks[source.shape[0]] += 1
                if CONTEXT.fullmatch(layer) and "lokr" not in match["end"]:
                    widths.add(source.shape[1])
            if match["end"] == ALPHA and source.shape in ((), (1,)):
                alphas[float(tensors.get_tensor(name))] += 1
    counts = Counter(layers.values())
    told = {"layers": ", ".join(f"{count} in {part}" for part, count in sorted(counts.items()))}
    if ranks:
        told["rank"] = in_order(ranks)
    told["alpha"] = in_order(alphas) if alphas else "none among the tensors"
    for_models = [MODELS.get(width, f"a model whose text is {width} wide") for width in sorted(widths)]
    if for_models:
        told["made for"] = f"{', '.join(for_models)} (by the width of the text)"
    return told


def in_order(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    """The numbers of layers in words: the most frequent first."""
    numbers = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{number:g}" if len(numbers) == 1 else f"{number:g} ({count} layers)" for number, count in numbers[:4]]
    return ", ".join(shown) + (f" and {len(numbers) - 4} others" if len(numbers) > 4 else "")
