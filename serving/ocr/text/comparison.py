"""Compares the text that a PDF contains with what was read from its picture. Pure."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from serving.ocr_api.shapes import TextDifference, TextLayerCheck

_WORD = re.compile(r"\w+(?:[.,:'’/-]\w+)*")
_MAX_WORDS = 5000
"""Words of each text that are compared: the comparison may take time that grows with their square."""
_MAX_DIFFERENCES = 20
_MAX_CHARS = 200
"""Longest difference that is reported whole."""


def compare_texts(layer: str, read: str) -> TextLayerCheck:
    """Compare two texts word by word; case and punctuation between words do not count."""
    ours, theirs = _split(layer), _split(read)
    if not ours and not theirs:
        return TextLayerCheck(agreement=1.0)
    matcher = SequenceMatcher(None, [word.casefold() for word in ours], [word.casefold() for word in theirs], False)
    differences = tuple(
        TextDifference(layer=" ".join(ours[a:b])[:_MAX_CHARS], read=" ".join(theirs[c:d])[:_MAX_CHARS])
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal"
    )
    return TextLayerCheck(agreement=round(matcher.ratio(), 4), differences=differences[:_MAX_DIFFERENCES])


def _split(text: str) -> list[str]:
    return _WORD.findall(text)[:_MAX_WORDS]
