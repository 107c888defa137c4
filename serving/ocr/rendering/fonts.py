"""Checks for system fonts, which PDFs that embed none are rendered with.

PDFium has built-in substitutes for Latin text. For other scripts it uses a system font whose header claims the script;
without one the text is left blank, without an error.
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
"""The folders that PDFium searches on Linux."""
_SUFFIXES = frozenset({".ttf", ".ttc", ".otf"})
_SCRIPTS = {17: "Japanese", 18: "simplified Chinese", 19: "Korean", 20: "traditional Chinese"}
"""Bits of ulCodePageRange1 in the table OS/2 (OpenType)."""
_CODE_PAGES_AT = 78
"""Offset of ulCodePageRange1 in its table."""
_ADVICE = "on Debian: apt-get install fonts-noto-cjk fonts-dejavu-core fonts-liberation"


def warn_of_missing_fonts(folders: Sequence[str] = FOLDERS) -> None:
    """Log which scripts this machine cannot render. Reads the header of every installed font."""
    drawn = find_scripts(folders)
    missing = [script for script in _SCRIPTS.values() if drawn is not None and script not in drawn]
    if drawn is None:
        logger.warning("no fonts are installed: PDFs that embed none are rendered with Latin text only; %s", _ADVICE)
    elif missing:
        names = ", ".join(missing)
        logger.warning(
            "no fonts are installed for %s: such text is left blank in PDFs that embed no fonts; %s", names, _ADVICE
        )


def find_scripts(folders: Sequence[str]) -> set[str] | None:
    """East Asian scripts that some font claims to support; None when no fonts are installed."""
    found: set[str] | None = None
    for folder in folders:
        for where, _, names in os.walk(folder, followlinks=True):
            for file in (Path(where, name) for name in names):
                if file.suffix.lower() in _SUFFIXES:
                    found = (found or set()) | read_scripts(file)
    return found


def read_scripts(file: Path) -> set[str]:
    """Scripts that a font or font collection claims to support; none when the file is damaged."""
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
    """Offsets at which the fonts of a file begin."""
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
