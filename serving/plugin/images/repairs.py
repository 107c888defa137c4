"""Reads images that Pillow refuses because of a part that is not needed.

PNGs with texts or colour profiles of more than a megabyte, or with damaged ones: Pillow refuses them to protect memory.
These chunks are not needed, so the image is read again without them.

JPEGs whose last bytes are missing, for example after an interrupted transfer: they are read if only a margin is lost,
or the last refinement of a progressive JPEG. Others are refused: half a page must not be accepted as a page.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import TypeVar

from PIL import Image, ImageFile

_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
_NOTES = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_FRAME_BYTES = 12
"""Bytes of a PNG chunk in addition to its data: length, name, checksum."""
_MAX_LOST_ROWS, _MAX_LOST_PART = 32, 0.05
"""How much of a JPEG's height may be missing, whichever is more: the decoder withholds up to two rows of blocks."""
_SCAN, _FRAMES, _PROGRESSIVE = 0xDA, (0xC0, 0xC1, 0xC2), 0xC2
"""JPEG markers; the frame markers are those that libjpeg supports."""
_WHOLE_SPECTRUM = 63

Result = TypeVar("Result")


def read_tolerantly(read: Callable[[bytes], Result], data: bytes) -> Result:
    """Call `read` on the file and, if that fails, on the repaired file.

    Raises:
        Exception: the exception from `read`, if nothing can be repaired.
    """
    try:
        return read(data)
    except Exception:  # Pillow's readers may raise anything
        repaired = repair(data)
        if repaired is None:
            raise
        return read(repaired)


def repair(data: bytes) -> bytes | None:
    """Return a readable form of a refused file, or None if nothing can be removed."""
    if data.startswith(_PNG):
        return _drop_notes(data)
    if data.startswith(_JPEG) and not data.endswith(_JPEG_END):
        ended = (data[:-1] if data.endswith(b"\xff") else data) + _JPEG_END
        return ended if _is_nearly_whole(data) else None
    return None


def _drop_notes(data: bytes) -> bytes | None:
    """Return a PNG without texts and profiles, or None if it has none."""
    kept, start, end = [_PNG], len(_PNG), len(_PNG)
    while end + _FRAME_BYTES <= len(data):
        length, name = struct.unpack_from(">I4s", data, end)
        after = end + _FRAME_BYTES + length
        if name in _NOTES:
            kept.append(data[start:end])
            start = after
        end = after
    return b"".join([*kept, data[start:]]) if len(kept) > 1 else None


def _is_nearly_whole(data: bytes) -> bool:
    segments = list(_find_segments(data))
    if any(marker == _PROGRESSIVE for marker, _ in segments):
        return any(_is_last_of_brightness(body) for marker, body in segments if marker == _SCAN)
    if not any(marker in _FRAMES for marker, _ in segments):
        return False
    height, num_rows = _count_rows(data)
    return height - num_rows <= max(_MAX_LOST_ROWS, _MAX_LOST_PART * height) and num_rows >= height / 2


def _find_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the markers of a JPEG that have a body, with their bodies."""
    at = len(_JPEG) - 1
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if (
            marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9
        ):  # entropy-coded data, padding, and markers without a body
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


def _is_last_of_brightness(scan: bytes) -> bool:
    """Whether this scan contains the last bits of the first component, which all other scans precede."""
    if len(scan) < 6 or scan[0] != 1 or scan[1] != 1:
        return False
    _, last, bits = scan[3:6]
    return last == _WHOLE_SPECTRUM and bits & 0x0F == 0


def _count_rows(data: bytes) -> tuple[int, int]:
    """Return the image's height and the number of rows that can be decoded, excluding black rows at the end."""
    parser = ImageFile.Parser()
    with contextlib.suppress(OSError):  # the file is known to be incomplete
        parser.feed(data)
        parser.close()
    image: Image.Image | None = parser.image
    if image is None:
        return 0, -1
    box = image.im.getbbox()
    return image.height, box[3] if box is not None else 0
