"""Names of files as the system has them: bytes, mostly UTF-8. Others are shown, kept and written in a form that is.

Python has such a name as text with lone surrogates, which neither a database, nor JSON, nor a terminal takes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_KEPT_CHARS = 120
"""Of a name that has to be written otherwise; with its digest and suffixes it stays within what a file system takes."""
_DIGEST_CHARS = 8


def show_name(path: Path | str) -> str:
    """For people: what is no UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_key(path: Path) -> str:
    """For a database: the path, or its bytes, which no absolute path looks like."""
    name = str(path)
    return name if _is_utf8(name) else f"bytes:{os.fsencode(name).hex()}"


def safe_place(place: Path) -> Path:
    """For a file of ours: every part that is no UTF-8 has those bytes as `%e9`, and a digest of all of its bytes, so
    that no two become one."""
    return Path(*map(_safe_part, place.parts))


def _safe_part(part: str) -> str:
    if _is_utf8(part):
        return part
    digest = hashlib.sha256(os.fsencode(part)).hexdigest()[:_DIGEST_CHARS]
    shown = show_name(part).replace("\\x", "%")
    return f"{shown[:_KEPT_CHARS]}-{digest}"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
