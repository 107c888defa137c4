"""Image files as odd as they come, for the tests of the image pipeline."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

GREY = (127, 127, 127)
Array = npt.NDArray[np.uint8]


def scene(width: int, height: int) -> Image.Image:
    """Smooth shades with sharp black strokes on them, as on a page."""
    generator = np.random.default_rng(width * 7 + height)
    y, x = np.mgrid[:height, :width]
    shades = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)
    shades[generator.random((height, width)) < 0.1] = 0
    return Image.fromarray(shades)


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int, image_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, image_format, exif=exif)


def turned(orientation: int) -> bytes:
    return with_orientation(scene(*SIZE), orientation)


def sixteen_bit(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 65536, (height, width), dtype=np.uint16)
    return Image.fromarray(values)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def animated(size: tuple[int, int]) -> bytes:
    frames = [scene(*size).quantize(64), Image.new("P", size, 3)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)


SIZE = (301, 203)
FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(scene(*SIZE), "JPEG"),
    "jpeg 4:4:4": lambda: encode(scene(*SIZE), "JPEG", subsampling=0, quality=95),
    "jpeg 4:2:2": lambda: encode(scene(*SIZE), "JPEG", subsampling=1),
    "progressive jpeg": lambda: encode(scene(*SIZE), "JPEG", progressive=True),
    "grey jpeg": lambda: encode(scene(*SIZE).convert("L"), "JPEG"),
    "cmyk jpeg": lambda: encode(scene(*SIZE).convert("CMYK"), "JPEG"),
    "jpeg with trailing bytes": lambda: encode(scene(*SIZE), "JPEG") + b"trailing",
    "cmyk tiff": lambda: encode(scene(*SIZE).convert("CMYK"), "TIFF"),
    "tiff": lambda: encode(scene(*SIZE), "TIFF", compression="tiff_deflate"),
    "turned tiff": lambda: with_orientation(scene(*SIZE), 6, "TIFF"),
    "bilevel tiff": lambda: encode(scene(*SIZE).convert("1", dither=Image.Dither.NONE), "TIFF", compression="group4"),
    "palette png": lambda: encode(scene(*SIZE).quantize(17), "PNG"),
    "transparent palette png": lambda: encode(scene(*SIZE).quantize(17), "PNG", transparency=3),
    "transparent rgb png": lambda: encode(scene(*SIZE), "PNG", transparency=(0, 0, 0)),
    "rgba png": lambda: encode(with_alpha(scene(*SIZE)), "PNG"),
    "grey alpha png": lambda: encode(with_alpha(scene(*SIZE)).convert("LA"), "PNG"),
    "grey png": lambda: encode(scene(*SIZE).convert("L"), "PNG"),
    "16-bit png": lambda: encode(sixteen_bit(*SIZE), "PNG"),
    "turned png": lambda: with_orientation(scene(*SIZE), 6, "PNG"),
    "webp": lambda: encode(scene(*SIZE), "WEBP"),
    "turned webp": lambda: with_orientation(scene(*SIZE), 8, "WEBP"),
    "rgba webp": lambda: encode(with_alpha(scene(*SIZE)), "WEBP"),
    "bmp": lambda: encode(scene(*SIZE), "BMP"),
    "ppm": lambda: encode(scene(*SIZE), "PPM"),
    "ico": lambda: encode(scene(64, 64), "ICO"),
    "animated gif": lambda: animated(SIZE),
}
SHOWN_OTHERWISE = {"16-bit png", "transparent rgb png"}
"""vLLM cuts the one at 255 and shows what is transparent in the other; no page can be read so (test_picture.py)."""
FILES |= {f"jpeg turned {turn}": partial(turned, turn) for turn in range(10)}


def tiff(values: npt.NDArray[np.generic], order: Literal["<", ">"] = "<", *, photometric: int = 1) -> bytes:
    """One strip without compression, of numbers of any kind, as the tags say.

    order: `<` for Intel's byte order, `>` for Motorola's.
    photometric: 0 when the smallest numbers are white, 1 when they are black.
    """
    height, width = values.shape
    bits = values.dtype.itemsize * 8
    formats = {"u": 1, "i": 2, "f": 3}
    entries: dict[int, tuple[int, int]] = {
        256: (3, width),
        257: (3, height),
        258: (3, bits),
        259: (3, 1),
        262: (3, photometric),
        273: (4, 8),
        277: (3, 1),
        278: (3, height),
        279: (4, values.nbytes),
        339: (3, formats[values.dtype.kind]),
    }
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    pack = {3: "HH", 4: "I"}
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        packed = struct.pack(f"{order}{pack[kind]}", *([value, 0] if kind == 3 else [value]))
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + directory + bytes(4)
