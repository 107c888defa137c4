"""Images as requests carry them, and headers of images that nobody could afford to draw."""

from __future__ import annotations

import base64
import functools
import io
import struct
import zlib
from typing import Any

from PIL import Image


@functools.cache
def encode_image(image_format: str, width: int = 30, height: int = 20, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, image_format)
    return file.getvalue()


def animate_image(image_format: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (width, height), color) for color in ("red", "green", "blue")]
    frames[0].save(file, image_format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", size) + struct.pack(">I", 100) + b"IDAT"


def to_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
