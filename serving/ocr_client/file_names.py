"""Handles file names that are not valid UTF-8.

To the system, file names are bytes. Python represents invalid UTF-8 as lone surrogates, which databases, JSON and
terminals do not accept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_KEPT_CHARS = 120
"""Maximum length of a rewritten name; with digest and suffixes it fits the file system's limit."""
_DIGEST_CHARS = 8


def show_name(path: Path | str) -> str:
    """A name for display, with invalid bytes as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_key(name: str) -> str:
    """A name for databases: the path, or its bytes in a form that no absolute path has."""
    return name if _is_utf8(name) else f"bytes:{os.fsencode(name).hex()}"


def wire_name(name: str) -> str:
    """A name for HTTP headers: in ASCII, with other characters as `\\xe9` or `\\u20ac`."""
    return show_name(name).encode("ascii", "backslashreplace").decode()


def safe_part(part: str) -> str:
    """A part of a path for a file that we create: invalid bytes are written as `%e9`.

    A digest of the original bytes keeps different names different.
    """
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
