"""Pictures that Pillow refuses as a whole for a part that can be spared.

PNGs with texts or colour profiles of more than a megabyte, or damaged ones: Pillow fears for the memory. Nobody here
wants such notes, so the picture is read once more without them.

JPEGs whose last bytes are missing, as after a transfer that broke off: they are read when only a margin is lost, or the
last refinement of a progressive one. What has lost more is refused: half a page must not pass for one.
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
"""Of a PNG's chunk: its length, its name, its checksum."""
_MAX_LOST_ROWS, _MAX_LOST_PART = 32, 0.05
"""So much may be lost of a JPEG's height, whichever is more: the decoder withholds up to two rows of blocks."""
_SCAN, _FRAMES, _PROGRESSIVE = 0xDA, (0xC0, 0xC1, 0xC2), 0xC2
"""Markers of JPEG; those of frames are of the kinds that libjpeg reads."""
_WHOLE_SPECTRUM = 63

Result = TypeVar("Result")


def read_tolerantly(read: Callable[[bytes], Result], data: bytes) -> Result:
    """What `read` makes of a file, and when it fails, of what `repair` makes of it.

    Raises:
        Exception: what `read` has raised, when there is nothing to repair.
    """
    try:
        return read(data)
    except Exception:  # whatever Pillow's readers happen to raise
        repaired = repair(data)
        if repaired is None:
            raise
        return read(repaired)


def repair(data: bytes) -> bytes | None:
    """A file that was refused in a form that may be read; None when nothing can be spared."""
    if data.startswith(_PNG):
        return _drop_notes(data)
    if data.startswith(_JPEG) and not data.endswith(_JPEG_END):
        ended = (data[:-1] if data.endswith(b"\xff") else data) + _JPEG_END
        return ended if _is_nearly_whole(data) else None
    return None


def _drop_notes(data: bytes) -> bytes | None:
    """A PNG without texts and profiles; None when it has none."""
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
    """Markers of a JPEG that have a body, each with its body."""
    at = len(_JPEG) - 1
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # pixels, padding, and markers without a body
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


def _is_last_of_brightness(scan: bytes) -> bool:
    """Whether it is the one that brings the last bits of the first component; all others have come before."""
    if len(scan) < 6 or scan[0] != 1 or scan[1] != 1:
        return False
    _, last, bits = scan[3:6]
    return last == _WHOLE_SPECTRUM and bits & 0x0F == 0


def _count_rows(data: bytes) -> tuple[int, int]:
    """A picture's height, and how many of its rows can be decoded. Black ones at the end are not counted."""
    parser = ImageFile.Parser()
    with contextlib.suppress(OSError):  # it is incomplete, as is known
        parser.feed(data)
        parser.close()
    image: Image.Image | None = parser.image
    if image is None:
        return 0, -1
    box = image.im.getbbox()
    return image.height, box[3] if box is not None else 0
