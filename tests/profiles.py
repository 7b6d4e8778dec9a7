"""ICC profiles for tests, built by the format's definition (ICC.1:2001-04, sections 6.1, 6.2, 6.4 and 6.5)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from PIL import ImageCms

P3 = {"r": (0.51512, 0.24120, -0.00105), "g": (0.29198, 0.69225, 0.04189), "b": (0.15710, 0.06657, 0.78407)}  # for D50
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values: float) -> bytes:
    """s15Fixed16 numbers."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, pcs: bytes, kind: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A profile of version 2: the header, the table of tags, and the tags."""
    tags = {b"desc": text_description(b"test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(*D50), **tags}
    table = struct.pack(">I", len(tags))
    data = b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value
    header = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(data), b"test", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(*D50)
    return header.ljust(128, b"\0") + table + data


def text_description(text: bytes) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + b"\0" * 78


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb(primaries: Mapping[str, tuple[float, float, float]], exponent: float) -> bytes:
    tags = {f"{name}XYZ".encode(): xyz(*values) for name, values in primaries.items()}
    tags |= {f"{name}TRC".encode(): gamma(exponent) for name in primaries}
    return profile(b"RGB ", b"XYZ ", b"mntr", tags)


def grey(exponent: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": gamma(exponent)})


def cmyk() -> bytes:
    """A printer whose inks are duller than the plain formula's: a table of Lab at the 16 corners, and between them."""
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        lightness = (95 - 30 * c - 40 * m - 8 * y) * (0.15 if k else 1)
        corners.append((max(lightness, 5), (-30 * c + 60 * m) * (1 - k), (-40 * c + 75 * y) * (1 - k)))
    table = bytes(round(v) for L, a, b in corners for v in (L * 2.55, a + 128, b + 128))
    ramp = bytes(range(256))
    matrix = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": lut})


def display_p3() -> bytes:
    """As a phone's photo carries it: sRGB's curve, Display P3's primaries."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * i
        name = bytes(data[entry : entry + 4]).decode()
        start = int.from_bytes(data[entry + 4 : entry + 8], "big")
        if name[1:] == "XYZ" and name[0] in P3:
            data[start + 8 : start + 20] = fixed(*P3[name[0]])
    return bytes(data)


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
