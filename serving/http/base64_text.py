"""Base64 as programs write it: with line breaks, in the URL-safe alphabet, without padding. Pure."""

from __future__ import annotations

import pybase64

_TO_STRICT = str.maketrans("-_", "+/", " \t\r\n=")


def repair_base64(text: str) -> str:
    """The text as strict base64: without white space, in the standard alphabet, padded. Other characters stay."""
    plain = text.translate(_TO_STRICT)
    return plain + "=" * (-len(plain) % 4)


def decode_base64(text: str) -> bytes:
    """The bytes that a text stands for.

    Raises:
        ValueError: it is not base64.
    """
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        return pybase64.b64decode(repair_base64(text), validate=True)
