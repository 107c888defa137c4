"""Fonts of this machine, for PDFs that do not bring theirs along.

PDFium has substitutes for Latin text of its own. Other scripts it draws with a font of the system's whose header claims
the script; without one the page stays blank where the text is, and nobody is told.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

FOLDERS = ("/usr/share/fonts", "/usr/share/X11/fonts/Type1", "/usr/share/X11/fonts/TTF", "/usr/local/share/fonts")
"""Where PDFium looks on Linux."""
_SUFFIXES = frozenset({".ttf", ".ttc", ".otf"})
_SCRIPTS = {17: "Japanese", 18: "simplified Chinese", 19: "Korean", 20: "traditional Chinese"}
"""Bits of ulCodePageRange1 in the table OS/2 (OpenType)."""
_CODE_PAGES_AT = 78
"""Where that number is in its table."""
_ADVICE = "on Debian: apt-get install fonts-noto-cjk fonts-dejavu-core fonts-liberation"


def warn_of_missing_fonts(folders: Sequence[str] = FOLDERS) -> None:
    """Log what text this machine cannot draw. Reads the header of every font there is."""
    drawn = find_scripts(folders)
    missing = [script for script in _SCRIPTS.values() if drawn is not None and script not in drawn]
    if drawn is None:
        logger.warning(
            "there are no fonts: of PDFs that do not bring their own, all but Latin text is blank; %s", _ADVICE
        )
    elif missing:
        names = ", ".join(missing)
        logger.warning(
            "there are no fonts for %s: such text of PDFs without fonts of their own is blank; %s", names, _ADVICE
        )


def find_scripts(folders: Sequence[str]) -> set[str] | None:
    """East Asian scripts that some font claims to have; None when there are no fonts at all."""
    found: set[str] | None = None
    for folder in folders:
        for where, _, names in os.walk(folder, followlinks=True):
            for file in (Path(where, name) for name in names):
                if file.suffix.lower() in _SUFFIXES:
                    found = (found or set()) | read_scripts(file)
    return found


def read_scripts(file: Path) -> set[str]:
    """What a font, or a collection of them, claims; nothing when it is damaged."""
    scripts = set[str]()
    try:
        with file.open("rb") as font:
            for start in _find_fonts(font):
                pages = _read_code_pages(font, start)
                scripts |= {name for bit, name in _SCRIPTS.items() if pages >> bit & 1}
    except (OSError, struct.error):
        return set()
    return scripts


def _find_fonts(font: BinaryIO) -> Iterator[int]:
    """Where in the file each font begins."""
    kind, _, num_fonts = struct.unpack(">4sII", font.read(12))
    if kind != b"ttcf":
        yield 0
        return
    yield from [struct.unpack(">I", font.read(4))[0] for _ in range(min(num_fonts, 256))]


def _read_code_pages(font: BinaryIO, start: int) -> int:
    font.seek(start + 4)
    (num_tables,) = struct.unpack(">H6x", font.read(8))
    for _ in range(num_tables):
        name, offset, size = struct.unpack(">4s4xII", font.read(16))
        if name == b"OS/2" and size >= _CODE_PAGES_AT + 4:
            font.seek(offset + _CODE_PAGES_AT)
            return int(struct.unpack(">I", font.read(4))[0])
    return 0
