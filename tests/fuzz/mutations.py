"""What can be wrong with a file: strategies that start from a whole one and change bytes, JSON values or headers."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Json = Any
EXTREMES = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\r\n", b'"', b"{", b"[" * 500, b"\xff" * 4, b"\x7f\xff\xff\xff"]
EXTREMES += [struct.pack("<Q", n) for n in (0, 1, 99, 2**31, 2**63 - 1, 2**64 - 1)]
WORDS = ["", "a", "é\u2028\x1b[31m\x00", "\udcff", "..", "../../x", "/dev/zero", "x" * 5_000, "null", "NaN", "1e999"]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    64,
    77,
    10**4,
    2**31,
    2**63,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
]
NESTED: Json = []
for _ in range(300):
    NESTED = [NESTED]
VALUES: list[Json] = [*WORDS, *NUMBERS, None, True, False, [], {}, [[]], [None], [0] * 1_000, {"": {}}, NESTED]
values = (
    st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers(), max_size=4)
)


class Edit(NamedTuple):
    """A change of a stretch of bytes, placed by shares of the whole."""

    kind: str
    begin: float
    length: int
    content: bytes

    def apply(self, data: bytes) -> bytes:
        begin = int(self.begin * len(data))
        end = min(len(data), begin + self.length)
        if self.kind == "cut off":
            return data[:begin]
        if self.kind == "delete":
            return data[:begin] + data[end:]
        if self.kind == "repeat":
            return data[:end] + data[begin:end] * 3 + data[end:]
        if self.kind == "flip":
            return (
                data[:begin]
                + bytes(byte ^ 1 << self.length % 8 for byte in data[begin : begin + 1])
                + data[begin + 1 :]
            )
        return data[:begin] + self.content + data[begin + len(self.content) * (self.kind == "overwrite") :]


edits = st.builds(
    Edit,
    st.sampled_from(["overwrite", "flip", "insert", "delete", "repeat", "cut off"]),
    st.floats(0, 1),
    st.integers(1, 40),
    st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=8),
)


def edited(data: bytes, changes: Sequence[Edit]) -> bytes:
    for change in changes:
        data = change.apply(data)
    return data


@st.composite
def mutated_bytes(draw: Draw, originals: Sequence[bytes], most: int = 4) -> bytes:
    """One of some files with some edits; now and then anything at all."""
    if draw(st.integers(0, 30)) == 0:
        return draw(st.binary(max_size=300))
    return edited(draw(st.sampled_from(originals)), draw(st.lists(edits, max_size=most)))


def places(value: Json) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    inside = [value]
    while inside:
        holder = inside.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        inside += [holder[key] for key in keys]
    return found


def change_value(draw: Draw, value: Json) -> Json:
    """One place of a JSON value changed, in place where it can be."""
    known = places(value)
    if not known or draw(st.integers(0, 25)) == 0:
        return copy.deepcopy(draw(values))
    holder, key = draw(st.sampled_from(known))
    kind = draw(st.sampled_from(["value", "value", "value", "delete", "rename", "wrap", "exchange"]))
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(WORDS) | st.text(max_size=10))] = holder.pop(key)
    elif kind == "wrap":
        holder[key] = draw(st.sampled_from([lambda x: [x], lambda x: {"a": x}, lambda x: str(x), lambda x: [x, x]]))(
            holder[key]
        )
    elif kind == "exchange":
        other, at = draw(st.sampled_from(known))
        holder[key] = copy.deepcopy(other[at])
    else:
        holder[key] = copy.deepcopy(draw(values))
    return value


@st.composite
def mutated_json(draw: Draw, originals: Sequence[Json], most: int = 3) -> bytes:
    """One of some JSON values with some of its places changed, as text; now and then bytes of that too."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, most))):
        value = change_value(draw, value)
    text = as_text(value)
    return edited(text, draw(st.lists(edits, min_size=1, max_size=2))) if draw(st.integers(0, 8)) == 0 else text


def as_text(value: Json) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):  # a place that was exchanged with one around it
        return b"[" * 100_000


def safetensors(header: Json, data: bytes) -> bytes:
    text = as_text(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def unpacked(file: bytes) -> tuple[Json, bytes]:
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length]), file[8 + length :]


@st.composite
def mutated_safetensors(draw: Draw, originals: Sequence[bytes], most: int = 3) -> bytes:
    """A safetensors file whose header, tensors' names and shapes, metadata or data are changed."""
    kind = draw(st.sampled_from(["bytes", "header", "header", "names", "names", "numbers", "metadata", "metadata"]))
    if kind == "bytes":
        return draw(mutated_bytes(originals, most))
    header, data = unpacked(draw(st.sampled_from(originals)))
    if kind == "header":
        for _ in range(draw(st.integers(1, most))):
            header = change_value(draw, header)
    elif kind == "names":
        rename(draw, header)
    elif kind == "metadata":
        texts = header.setdefault("__metadata__", {})
        for name in draw(
            st.lists(st.sampled_from([*texts, "format", "lora_adapter_metadata", "ss_network_module"]), max_size=2)
        ):
            texts[name] = draw(metadata_text(texts.get(name, "")))
    else:
        data = edited(
            data, [*draw(st.lists(edits.filter(lambda edit: edit.kind in ("overwrite", "flip")), max_size=4))]
        )
    return safetensors(header, data)


@st.composite
def metadata_text(draw: Draw, original: str) -> str:
    """The text of a header's field: JSON that is changed where it is JSON."""
    try:
        return draw(mutated_json([json.loads(original)])).decode("utf-8", "replace")
    except ValueError:
        return draw(st.text(max_size=40) | st.sampled_from([word for word in WORDS if word.isascii()] or [""]))


def rename(draw: Draw, header: Json) -> None:
    """Tensors with other names, shapes and dtypes whose sizes still fit."""
    names = [name for name in header if name != "__metadata__"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)) if names else []:
        if name not in header:
            continue
        fields = header.pop(name)
        change = draw(st.sampled_from(["name", "piece", "shape", "dtype", "delete"]))
        if change == "delete":
            continue
        if change == "name":
            name = draw(st.sampled_from(names + WORDS[:-4]) | st.text(max_size=20))
        elif change == "piece":
            parts = name.split(".")
            parts[draw(st.integers(0, len(parts) - 1))] = draw(
                st.sampled_from(["0", "99999", "weight", "alpha", "", "a"])
            )
            name = ".".join(parts)
        elif change == "shape" and fields["shape"]:
            fields["shape"] = draw(
                st.sampled_from([fields["shape"][::-1], [*fields["shape"], 1], [1, *fields["shape"]], [-1]])
            )
        elif change == "dtype":
            fields["dtype"] = draw(st.sampled_from(["F16", "BF16", "I16", "U16", "F8_E4M3", "BOOL", "F64", "C64", "X"]))
        header[name] = fields


@st.composite
def mutated_png(draw: Draw, originals: Sequence[bytes]) -> bytes:
    """A PNG whose chunks are changed, left out, repeated or moved, with right checksums."""
    file = draw(st.sampled_from(originals))
    chunks = []
    at = 8
    while at < len(file):
        length = struct.unpack(">I", file[at : at + 4])[0]
        chunks.append((file[at + 4 : at + 8], file[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(chunks) - 1))
        kind, content = chunks[i]
        change = draw(st.sampled_from(["content", "content", "delete", "repeat", "move", "new", "inflated"]))
        if change == "delete" and len(chunks) > 1:
            del chunks[i]
        elif change == "repeat":
            chunks.insert(i, chunks[i])
        elif change == "move":
            chunks.insert(draw(st.integers(0, len(chunks) - 1)), chunks.pop(i))
        elif change == "new":
            name = draw(
                st.sampled_from(
                    [b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"gAMA"]
                )
            )
            chunks.insert(i, (name, draw(st.binary(max_size=40))))
        elif change == "inflated":
            chunks[i] = (kind, content[:2] + zlib.compress(bytes(draw(st.sampled_from([10, 10**6])))))
        else:
            chunks[i] = (kind, edited(content, draw(st.lists(edits, min_size=1, max_size=2))))
    packed = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return file[:8] + b"".join(packed)
