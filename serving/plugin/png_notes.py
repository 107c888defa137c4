"""PNGs whose notes Pillow does not take: texts and colour profiles of more than a megabyte, or damaged ones.

Pillow refuses the whole picture then, lest a small file fill the memory. Nobody here wants such notes, so the picture
is read once more without them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NOTES = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_FRAME_BYTES = 12
"""Of a chunk: its length, its name, its checksum."""

Result = TypeVar("Result")


def read_tolerantly(read: Callable[[bytes], Result], data: bytes) -> Result:
    """What `read` makes of a file, and when it fails, of the same PNG without notes.

    Raises:
        Exception: what `read` has raised, when there is nothing to leave out.
    """
    try:
        return read(data)
    except Exception:  # whatever Pillow's readers happen to raise
        bare = drop_notes(data)
        if bare is None:
            raise
        return read(bare)


def drop_notes(data: bytes) -> bytes | None:
    """A PNG without texts and profiles; None when it has none, or is no PNG."""
    if not data.startswith(_SIGNATURE):
        return None
    kept, start, end = [_SIGNATURE], len(_SIGNATURE), len(_SIGNATURE)
    is_bare = True
    while end + _FRAME_BYTES <= len(data):
        length, name = struct.unpack_from(">I4s", data, end)
        after = end + _FRAME_BYTES + length
        if name in _NOTES:
            is_bare = False
            kept.append(data[start:end])
            start = after
        end = after
    kept.append(data[start:])
    return None if is_bare else b"".join(kept)
