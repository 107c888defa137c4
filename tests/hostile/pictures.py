"""Images that lie about themselves, or are none."""

from __future__ import annotations

import functools
import io
import struct
import zlib

from PIL import Image, PngImagePlugin
from support.request_pictures import animate_image, encode_image, png_header


def png_block(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def black() -> bytes:
    """100 MB in 100 kB."""
    return zlib.compress(bytes(100 * 2**20), 9)


def bomb(width: int, height: int) -> bytes:
    """About 100 kB that unpack to 100 MB of black, in a PNG that says how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    blocks = (png_block(b"IHDR", header), png_block(b"IDAT", black()), png_block(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


def small_bomb() -> bytes:
    """Says that it is small, and has 100 MB of pixels."""
    return bomb(30, 20)


def text_bomb() -> bytes:
    """A small picture with a compressed comment of 100 MB, which nobody needs to unpack."""
    picture = encode_image("PNG")
    comment = png_block(b"zTXt", b"Comment\0\0" + black())
    return picture[:33] + comment + picture[33:]


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header lies."""
    picture = bytearray(encode_image("JPEG"))
    at = picture.index(b"\xff\xc0") + 5
    picture[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(picture)


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + encode_image("GIF")[10:]


def webp_of(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas


def tiff_of(width: int, height: int) -> bytes:
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 1)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + directory + bytes(4)


def tiff_in_circles() -> bytes:
    """The directory's offset points to itself, and so does the next one's."""
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)


def saved(image_format: str, mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, image_format)
    return file.getvalue()


def animated_png() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green")]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_with_text() -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "<script>alert(1)</script>")
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


SVG = (
    b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>"
)
SVG_FETCH = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://169.254.169.254/latest/meta-data/'/></svg>"

PICTURES_REFUSED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"not an image at all",
    "zeros": bytes(100_000),
    "PDF": b"%PDF-1.7\n1 0 obj\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "EPS with a DOS header": b"\xc5\xd0\xd3\xc6" + bytes(28),
    "SVG": SVG,
    "SVG that fetches": SVG_FETCH,
    "SVG behind spaces": b" " * 1000 + SVG,
    "HTML": b"<!DOCTYPE html><html><body onload=alert(1)>",
    "ZIP": b"PK\x03\x04" + bytes(30),
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(60),
    "MP4": b"\0\0\0\x18ftypmp42" + bytes(100),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(100),
    "ImageMagick script": b"push graphic-context\nfill 'url(https://127.0.0.1/\"|id\")'\npop graphic-context\n",
    "BMP": saved("BMP"),
    "ICO": saved("ICO"),
    "TGA": saved("TGA"),
    "PPM": b"P6 30 20 255\n" + bytes(1800),
    "PPM of numbers without end": b"P6 " + b"9" * 1000,
    "PNG cut in its signature": encode_image("PNG")[:6],
    "PNG cut in its header": encode_image("PNG")[:20],
    "PNG header with a wrong sum": flipped(encode_image("PNG"), 30),
    "PNG of no width": png_header(0, 20),
    "PNG of 60,000 x 60,000": png_header(60_000, 60_000),
    "PNG of 2^31-1 a side": png_header(2**31 - 1, 2**31 - 1),
    "PNG one pixel high": png_header(2**31 - 1, 1),
    "bomb of 50,000 x 50,000": bomb(50_000, 50_000),
    "JPEG cut at its start": encode_image("JPEG")[:3],
    "JPEG cut before its frame": encode_image("JPEG")[:40],
    "JPEG of 65,500 x 65,500": jpeg_of(65_500, 65_500),
    "GIF of 65,535 x 65,535": gif_of(65_535, 65_535),
    "GIF cut": encode_image("GIF")[:8],
    "WebP cut": encode_image("WEBP")[:14],
    "TIFF of 100,000 x 100,000": tiff_of(100_000, 100_000),
    "TIFF in circles": tiff_in_circles(),
    "TIFF with a directory beyond its end": b"II*\0\xff\xff\xff\x7f",
    "TIFF cut": b"MM\0*",
    "BigTIFF cut": b"II+\0\x08\0\0\0",
    "JPEG of no height": jpeg_of(30, 0),
    "WebP without frames": webp_of(1000, 1000),
    "WebP cut in its pixels": encode_image("WEBP", 300, 200)[:-30],
    "WebP of 16,000 x 200": webp_of(16_000, 200),
}

PICTURES_FOR_ENGINE: dict[str, bytes] = {
    "PNG without pixels": png_header(30, 20),
    "PNG cut in its pixels": encode_image("PNG", 300, 200)[:-40],
    "PNG with broken pixels": flipped(encode_image("PNG", 300, 200), 60),
    "PNG with more pixels than it says": small_bomb(),
    "PNG with fewer pixels than it says": png_header(1000, 1000),
    "PNG of 1 x 4,000,000": png_header(1, 4_000_000),
    "JPEG cut in the middle": encode_image("JPEG", 300, 200)[:-500],
    "JPEG larger than its data": jpeg_of(1500, 1000),
    "GIF larger than its frame": gif_of(1500, 1000),
    "GIF of no width": gif_of(0, 20),
    "GIF cut in its pixels": encode_image("GIF", 300, 200)[:-30],
    "TIFF whose pixels are elsewhere": tiff_of(100, 100),
    "PNG followed by a ZIP": encode_image("PNG") + b"PK\x03\x04" + bytes(30),
}

PICTURES_SERVED: dict[str, bytes] = {
    "animated GIF": animate_image("GIF", 30, 20),
    "animated WebP": animate_image("WEBP", 30, 20),
    "animated PNG": animated_png(),
    "PNG with a script for a comment": png_with_text(),
    "PNG with a comment of 100 MB": text_bomb(),
    "PNG of one pixel": saved("PNG", size=(1, 1)),
    "PNG with a palette": saved("PNG", "P"),
    "PNG in one bit": saved("PNG", "1"),
    "PNG with 16 bits": saved("PNG", "I;16"),
    "PNG with transparency": saved("PNG", "RGBA"),
    "CMYK JPEG": saved("JPEG", "CMYK"),
    "grey TIFF": saved("TIFF", "L"),
}
