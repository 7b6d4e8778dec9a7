"""What is fuzzed: each target makes inputs from whole small ones, and runs one in an empty folder.

A target is made once a process, in a folder of its own. What it runs ends, or raises InputError; see `run.py`.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_files
import numpy as np
import peers
import profiles
import torch
from fuzz.mutations import mutated_bytes, mutated_json, mutated_png, mutated_safetensors, safetensors, unpacked
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file

from sdxl_ref.adapters import lora
from sdxl_ref.adapters.peft_settings import CONFIG_FILE, HEADER_KEY
from sdxl_ref.adapters.report import describe_any
from sdxl_ref.commands.job_options import Options, arguments_of, digest_of, name_of
from sdxl_ref.config import InputError
from sdxl_ref.parity.sketch import sketch
from sdxl_ref.parity.trace import Key, Trace
from sdxl_ref.pictures.images import fit, load_image, to_tensor
from sdxl_ref.pictures.settings import png_chunks, texts
from sdxl_ref.running.job_list import read
from sdxl_ref.text import a1111, comfy, markup, tokenizer
from sdxl_ref.text.chunks import frame, read_plain
from sdxl_ref.text.inversion import Inversions
from sdxl_ref.weights.checkpoint_saving import save_checkpoint
from sdxl_ref.weights.inversion_files import load_inversion
from sdxl_ref.weights.opening import open_checkpoint
from weights_convert.convert import convert

CONFIG = peers.TINY_REFINER
SMALL = 4096  # bytes: the data of a checkpoint's file are a hole beyond


def tiny_file(path: Path) -> Path:
    save_checkpoint(path, CONFIG, peers.networks(CONFIG), torch.float16)
    return path


class Checkpoints:
    """Headers, and what a file of them is taken for. The data are a hole as long as the whole file's."""

    def __init__(self, folder: Path) -> None:
        whole = tiny_file(folder / "whole.safetensors").read_bytes()
        header, data = unpacked(whole)
        vae = {key: value for key, value in header.items() if key.startswith("first_stage_model.")}
        vae = {key: value | {"data_offsets": [0, 0]} for key, value in vae.items()}
        few = {"a": torch.ones(2, 3), "b.weight": torch.ones(4).half(), "c": torch.zeros((), dtype=torch.int64)}
        self.length = len(data)
        self.inputs = mutated_safetensors(
            [safetensors(header, b""), safetensors(vae, b""), save(few), save(few, {"format": "pt"})]
        )

    def run(self, file: bytes, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(file)
        if len(file) > SMALL:
            with path.open("r+b") as stream:
                stream.truncate(len(file) + self.length)
        refused = []
        for what in (lambda: describe_any(path).lines(), lambda: open_checkpoint(path)):
            try:
                what()
            except InputError as error:
                refused.append(error)
        if refused:
            raise refused[0]


class Bodies:
    """The numbers of a whole small file: read, looked at one by one, and loaded."""

    def __init__(self, folder: Path) -> None:
        state = load_file(tiny_file(folder / "whole.safetensors"))
        self.state = {key: tensor for key, tensor in state.items() if "embedders" in key and "token" not in key}
        self.inputs = mutated_safetensors([save(self.state), save({"vectors": torch.randn(3, 8)})])

    def run(self, file: bytes, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(file)
        describe_any(path, check=True).lines()


class FolderFiles:
    """A whole folder in diffusers' layout in which one small file is changed. Weights are links."""

    names: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.whole = folder / "whole"
        convert(tiny_file(folder / "model.safetensors"), self.whole, "diffusers")
        unet = self.whole / "unet"
        [weights] = unet.glob("*.safetensors")
        state = load_file(weights)
        weights.unlink()
        names = sorted(state)
        shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2]}
        shards |= {"diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}
        for shard, own in shards.items():
            save_file({name: state[name] for name in own}, unet / shard)
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {name: shard for shard, own in shards.items() for name in own},
        }
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        settings = {"pad_token": "!", "bos_token": {"content": "<|startoftext|>"}, "model_max_length": 77}
        fast = {"added_tokens": [{"content": "<|endoftext|>"}], "truncation": {"direction": "Right"}, "model": {}}
        fast["model"] = {"vocab": {"!": 0}, "merges": ["i n", ["t", "h"]]}
        (self.whole / "tokenizer_2").mkdir(exist_ok=True)
        originals = {
            "tokenizer_2/tokenizer_config.json": settings | {"added_tokens_decoder": {"1": {"content": "!"}}},
            "tokenizer_2/special_tokens_map.json": settings | {"additional_special_tokens": ["!"]},
            "tokenizer_2/added_tokens.json": {"!": 0},
            "tokenizer_2/vocab.json": {"!": 0},
            "tokenizer_2/tokenizer.json": fast,
        }
        for name, value in originals.items():
            if not (self.whole / name).exists() and name.endswith(("config.json", "map.json")):
                (self.whole / name).write_text(json.dumps(value))
        self.originals = {name: self.original(name, originals) for name in self.names}
        self.inputs = st.sampled_from(self.names).flatmap(
            lambda name: st.tuples(st.just(name), mutated_json([self.originals[name]]))
        )
        open_checkpoint(self.whole)

    def original(self, name: str, others: dict[str, Any]) -> Any:
        path = self.whole / name
        return json.loads(path.read_text()) if path.exists() else others[name]

    def run(self, value: tuple[str, bytes], folder: Path) -> None:
        name, text = value
        copied = folder / "model"
        shutil.copytree(self.whole, copied, copy_function=lambda source, target: Path(target).symlink_to(source))
        (copied / name).unlink(missing_ok=True)
        (copied / name).write_bytes(text)
        describe_any(copied).lines()
        open_checkpoint(copied)


class Indices(FolderFiles):
    names = ("unet/diffusion_pytorch_model.safetensors.index.json",)


class FolderConfigs(FolderFiles):
    names = (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/special_tokens_map.json",
        "tokenizer_2/added_tokens.json",
        "tokenizer_2/vocab.json",
        "tokenizer_2/tokenizer.json",
    )


PEFT = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "use_rslora": False,
    "use_dora": False,
    "alpha_pattern": {"to_q": 4.0, "^unet.*fc1": 2},
    "rank_pattern": {"to_k": 3},
    "target_modules": ["to_q", "to_k"],
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
}


class Adapters:
    """Adapters of every kind of name and factor, with a header that says more, or PEFT's configuration beside."""

    def __init__(self, folder: Path) -> None:
        official = load_file(
            adapter_files.random_file(CONFIG, folder / "official.safetensors", layers=("attn1.to_q", "fc1", "c_fc"))
        )
        names = [key.removesuffix(".lora_A.weight") for key in official if key.endswith(".lora_A.weight")][:6]
        factors = {key: official[f"{key}.lora_{side}.weight"].clone() for key in names for side in "A"}
        official = {key: value for key, value in official.items() if key.rsplit(".lora", 1)[0] in names}
        kohya: dict[str, torch.Tensor] = {}
        for i, (name, down) in enumerate(factors.items()):
            up = official[f"{name}.lora_B.weight"].clone()
            stem = "lora_unet_" + name.removeprefix("model.diffusion_model.").replace(".", "_")
            if i == 0:
                kohya |= {
                    f"{stem}.hada_w1_a": up,
                    f"{stem}.hada_w1_b": down,
                    f"{stem}.hada_w2_a": up + 1,
                    f"{stem}.hada_w2_b": down + 1,
                }
            elif i == 1:
                kohya |= {
                    f"{stem}.lokr_w1": torch.ones(2, 2),
                    f"{stem}.lokr_w2": torch.ones(len(up) // 2, down.shape[1] // 2),
                }
            elif i == 2:
                kohya |= {f"{stem}.diff": torch.ones(len(up), down.shape[1]), f"{stem}.diff_b": torch.ones(len(up))}
            else:
                kohya |= {
                    f"{stem}.lora_down.weight": down,
                    f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(2.0),
                }
            if i == 4:
                kohya[f"{stem}.dora_scale"] = torch.ones(len(up), 1)
        kohya["bundle_emb.toy.clip_g"] = torch.ones(2, CONFIG.text_encoders[-1].width)
        header = {
            "ss_network_module": "networks.lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "x",
        }
        originals = [
            save(official),
            save(kohya, header),
            save(official, {HEADER_KEY: json.dumps({"unet.r": 3, **PEFT})}),
        ]
        originals.append(save(official, {"lora_alpha": "4", "r": "3", "alpha_pattern": "{}"}))
        whole = st.sampled_from(originals[:1])
        files = st.tuples(mutated_safetensors(originals), st.none() | st.just(json.dumps(PEFT).encode()))
        configs = st.tuples(whole, mutated_json([PEFT, {"unet.r": 4, "unet.lora_alpha": 2}]))
        self.inputs = files | configs

    def run(self, value: tuple[bytes, bytes | None], folder: Path) -> None:
        file, config = value
        (folder / "adapter_model.safetensors").write_bytes(file)
        if config is not None:
            (folder / CONFIG_FILE).write_bytes(config)
        describe_any(folder / "adapter_model.safetensors").lines()
        str(lora.load(folder, CONFIG))


class Embeddings:
    """Files of textual inversion, and a prompt with what they are called."""

    def __init__(self, folder: Path) -> None:
        towers = peers.TINY_BASE.text_encoders
        clip_l, clip_g = (torch.randn(2, tower.width) for tower in towers)
        originals = [
            {"clip_l": clip_l, "clip_g": clip_g},
            {"<toy>": clip_g},
            {"emb_params": clip_l},
            {"<a>": clip_l[0]},
        ]
        self.inputs = mutated_safetensors([save(tensors) for tensors in originals])

    def run(self, file: bytes, folder: Path) -> None:
        path = folder / "my-style.safetensors"
        path.write_bytes(file)
        inversions = Inversions(peers.TINY_BASE.text_encoders)
        token = load_inversion(inversions, path)
        for tower in inversions.widths:
            placeholders = inversions.placeholders(tower)
            for rule in (a1111.read, comfy.read, read_plain):
                rule(f"a photo of {token.replace('(', '').replace('[', '')} in the sun", placeholders)


def pictures() -> list[bytes]:
    """Small files of many formats and modes, with orientation, profiles and transparency."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)  # (h,w,4)
    rgba = Image.fromarray(noise)
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    files = []

    def add(image: Image.Image, kind: str, **options: Any) -> None:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())

    grey_16 = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    for image in (rgb, rgba, grey_16, palette, rgb.convert("L"), rgba.convert("LA"), rgb.convert("1")):
        add(image, "PNG", exif=exif)
        add(image, "PNG", icc_profile=profiles.display_p3())
    add(palette, "PNG", transparency=3)
    add(palette, "PNG", transparency=bytes(range(16)))
    add(rgb, "PNG", transparency=(1, 2, 3))
    add(grey_16, "PNG", transparency=257)
    add(rgba, "PNG", save_all=True, append_images=[rgba.rotate(90)])
    for image, profile in (
        (rgb, profiles.display_p3()),
        (rgb.convert("L"), profiles.grey(2.2)),
        (rgb.convert("CMYK"), profiles.cmyk()),
    ):
        add(image, "JPEG", icc_profile=profile, exif=exif)
        add(image, "TIFF", icc_profile=profile)
    add(rgb, "JPEG", progressive=True)
    add(rgba, "WEBP", lossless=True, exif=exif)
    add(rgb, "WEBP", icc_profile=profiles.display_p3())
    add(palette, "GIF", transparency=2)
    add(palette, "GIF", save_all=True, append_images=[palette.rotate(180)], duration=50)
    for kind in ("BMP", "TIFF", "PPM", "TGA", "ICO"):
        add(rgb, kind)
    return files


class Pictures:
    """Files of pictures, their metadata and profiles."""

    def __init__(self, folder: Path) -> None:
        originals = pictures()
        pngs = [file for file in originals if file.startswith(b"\x89PNG")]
        self.inputs = mutated_bytes(originals) | mutated_png(pngs)

    def run(self, file: bytes, folder: Path) -> None:
        path = folder / "picture"
        path.write_bytes(file)
        image = load_image(path)
        tensor = to_tensor(fit(image, 1024 * 1024))
        assert tensor.shape[:2] == (1, 3)
        assert -1 <= tensor.min() <= tensor.max() <= 1


JOB: dict[str, Any] = {
    "prompt": "a red barn, (old:1.2)",
    "negative_prompt": "blur",
    "seed": 3,
    "steps": 4,
    "strength": 0.5,
    "karras": True,
    "sigmas": [3.0, 1.0, 0.2],
    "guidance_interval": "0.1,2",
    "lora": ["a.safetensors:0.5"],
    "clip_skip": 1,
    "height": 64,
    "checkpoint": "a.safetensors",
}


class JobLists:
    """Job lists as JSON lines and tables, and each line's options."""

    def __init__(self, folder: Path) -> None:
        refined = JOB | {"image": "photo.jpg", "mask": "m.png", "checkpoint": "a.safetensors"}
        drawn = {name: value for name, value in JOB.items() if name not in ("strength", "checkpoint")} | {"base": "b"}
        names = ",".join(JOB)
        cells = ",".join(f'"{value}"' for value in JOB.values())
        table = f'\ufeff{names}\r\n{cells}\r\n\r\n"two\nlines",,,\r\na,b\r\n'.encode()
        objects = st.lists(mutated_json([refined, drawn]), min_size=1, max_size=3).map(b"\n".join)
        tables = mutated_bytes([table, table.replace(b",", b"\t"), b"prompt,seed\na,1\n"])
        self.inputs = st.tuples(st.just("jobs.jsonl"), objects) | st.tuples(
            st.sampled_from(["jobs.csv", "jobs.tsv"]), tables
        )
        self.commands = {name: Options(name, {}) for name in ("refine", "generate")}

    def run(self, value: tuple[str, bytes], folder: Path) -> None:
        name, content = value
        path = folder / name
        path.write_bytes(content)
        refused = []
        for line in read(path):
            if line.error:
                assert line.error == str(InputError(line.error))
                refused.append(InputError(line.error))
                continue
            try:
                arguments = arguments_of(self.commands, [line.options])
                assert len(name_of(digest_of(arguments), arguments)) == 16
            except InputError as error:
                refused.append(error)
        if refused:
            raise max(refused, key=lambda error: len(str(error)))


PIECES = [
    "a cat",
    "(",
    ")",
    "[",
    "]",
    ":1.2)",
    ":",
    "\\",
    "\\(",
    "BREAK",
    " AND ",
    "{a|b}",
    "|",
    "<lora:a:1>",
    "embedding:mytoy",
]
PIECES += [
    ",",
    "#",
    "\n",
    "//",
    "<toy>",
    "&amp;",
    "&",
    "'s",
    "é",
    "\u0301",
    "ÃÂ©",
    "日本",
    "🙂",
    "\udcff",
    "\x00",
    "<end_of_text>",
]
PIECES += [
    " ",
    "0",
    "1.1",
    "-",
    "_",
    ".",
    "İ",
    "ß",
    "\u200d",
    "\u2028",
    "\ufeff",
    "zz",
    "aaa",
    "((",
    "))",
    "[a:b:0.5]",
    "/*",
]
MOST = 20_000  # characters of a prompt


@st.composite
def prompts(draw: Any) -> str:
    """Markup and words mixed, and pieces repeated many times."""
    pieces = draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12))
    repeated = draw(st.integers(0, 5)) == 0
    if repeated and pieces:
        i = draw(st.integers(0, len(pieces) - 1))
        pieces[i] = (pieces[i] * MOST)[: draw(st.sampled_from([100, 2_000, MOST]))]
    return ("".join(pieces) * (draw(st.sampled_from([1, 1, 1, 50]))))[:MOST]


class Prompts:
    """The tokenizer and each syntax. `decode` gives a text of the same ids back, where it is UTF-8."""

    def __init__(self, folder: Path) -> None:
        self.inputs = prompts()
        inversions = Inversions(CONFIG.text_encoders)
        inversions.add("<toy>", {"clip_g": torch.randn(3, CONFIG.text_encoders[0].width)})
        inversions.add("mytoy", {"clip_g": torch.randn(1, CONFIG.text_encoders[0].width)})
        self.placeholders = inversions.placeholders("clip_g")

    def run(self, text: str, folder: Path) -> None:
        markup.note_markup(text)
        assert tokenizer.tokenize(text).shape == (1, 77)
        read_plain(text, self.placeholders)
        refused = []
        for read_as in (a1111.read, comfy.read):
            try:
                ids, weights = frame(read_as(text, self.placeholders), 0)
                assert ids.shape == weights.shape
                assert torch.isfinite(weights).all()
            except InputError as error:
                refused.append(error)
        if refused:
            raise refused[0]


class Settings:
    """Settings that a picture carries: written as a PNG, read back the same."""

    def __init__(self, folder: Path) -> None:
        words = prompts() | st.text(max_size=30)
        numbers = st.none() | st.integers(-5, 2**70) | st.floats(allow_nan=False)
        self.inputs = st.fixed_dictionaries(
            {"prompt": st.none() | words, "versions": st.just({"sdxl_ref": "1"})},
            optional={
                "negative_prompt": words,
                "num_inference_steps": numbers,
                "sampler": st.sampled_from(["euler", "dpmpp_2m_sde", None, "_"]),
                "spacing": words,
                "karras": st.booleans(),
                "guidance_scale": numbers | st.lists(numbers, max_size=3) | st.just(torch.ones(2)),
                "seed": numbers,
                "size": words,
                "checkpoint": st.fixed_dictionaries({"file": words, "sha256": words}),
                "strength": numbers,
                "lora_hashes": words,
                "refiner": words,
            },
        )

    def run(self, settings: dict[str, Any], folder: Path) -> None:
        carried = texts(settings)
        path = folder / "a.png"
        Image.new("RGB", (8, 8)).save(path, pnginfo=png_chunks(carried))
        with Image.open(path) as image:
            image.load()
            assert image.text == carried  # type: ignore[attr-defined]
        again = json.loads(carried["sdxl_ref"])
        assert again["prompt"] == settings["prompt"]
        assert again.keys() == settings.keys()


class Traces:
    """Traces in one file, with a header or without, and in a folder of arrays."""

    def __init__(self, folder: Path) -> None:
        x = torch.randn(2, 3, 4, 5)
        values: dict[Key, Any] = {Key("unet/a"): x, Key("unet/a", 1): x.half(), Key("unet"): sketch(x)}
        Trace(values, {Key("unet/a", 0, "in.0"): Key("unet/a")}, {"dtype": "float32"}).save(folder / "t.safetensors")
        whole = (folder / "t.safetensors").read_bytes()
        stream = io.BytesIO()
        np.save(stream, x.numpy())
        array = stream.getvalue()
        names = st.sampled_from(["unet__a.npy", "unet__a#1:in.0.npy", "vae.npy", "a#b.npy", "#.npy"])
        headers = [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
            "{'descr': '<f4'}",
            "{'descr': '|O'}",
            "(",
        ]
        headers += [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}",
            "9" * 5000,
            "{'descr': 'V9999999999'}",
        ]
        built = st.sampled_from(headers).map(
            lambda text: b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(8)
        )
        arrays = st.lists(st.tuples(names, mutated_bytes([array]) | built), max_size=3)
        self.inputs = mutated_safetensors([whole, save({"unet/a": x, "vae": x + 1})]) | arrays

    def run(self, value: Any, folder: Path) -> None:
        path = folder / "t.safetensors"
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path = folder
            for name, content in value:
                (folder / name).write_bytes(content)
        trace = Trace.load(path)
        list(trace.outputs())
        trace.points()
        trace.channels_first().in_batches_of(trace)
        trace.renamed({"unet/a": "unet/b"}).save(folder / "again.safetensors")
        Trace.load(folder / "again.safetensors")


TARGETS: dict[str, Callable[[Path], Any]] = {
    "checkpoints": Checkpoints,
    "bodies": Bodies,
    "indices": Indices,
    "folder-configs": FolderConfigs,
    "adapters": Adapters,
    "embeddings": Embeddings,
    "pictures": Pictures,
    "job-lists": JobLists,
    "prompts": Prompts,
    "settings": Settings,
    "traces": Traces,
}
