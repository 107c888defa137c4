"""Images for requests."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image, ImageDraw


def build_page(width: int = 512, height: int = 512, text: str = "The quick brown fox") -> Image.Image:
    page = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(page).text((20, 20), text, fill="black")
    return page


def encode(page: Image.Image, image_format: str = "PNG") -> str:
    """A data URL, as a client sends it."""
    buffer = io.BytesIO()
    page.save(buffer, image_format)
    return data_url(buffer.getvalue(), f"image/{image_format.lower()}")


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge: a true header, and no pixels worth the name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def page_message(url: str, prompt: str = "Free OCR.") -> list[Any]:
    """One user message with an image and a prompt."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]
