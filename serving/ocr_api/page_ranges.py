"""Which pages of a document are meant, by the words of a person. Pure; the service and its clients read them alike."""

from __future__ import annotations

import re

from serving.errors import InvalidRequestError

_MAX_SELECTION_CHARS = 4096
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


def select_pages(selection: str | None, num_pages: int, max_pages: int) -> list[int]:
    """Pages that are meant, counted from 0, in the document's order and each once.

    Args:
        selection: `1-3,7`, counted from 1 as people do; None for all of them.
        num_pages: that the document has.
        max_pages: that may be read of one document.

    Raises:
        InvalidRequestError: it cannot be understood, names pages that there are not, or too many.
    """
    if selection is None:
        ranges = [(1, num_pages)]
    elif len(selection) > _MAX_SELECTION_CHARS:
        raise _refuse(f"pages may be {_MAX_SELECTION_CHARS} characters long at most.")
    else:
        ranges = [_read_range(part, num_pages) for part in selection.split(",")]
    # Bounded by the document's length, whatever overlaps.
    if num_pages > max_pages and sum(last - first + 1 for first, last in _merge(ranges)) > max_pages:
        raise _refuse(
            f"The document has {num_pages} pages and {max_pages} may be read at once; choose some with pages."
        )
    return [page - 1 for first, last in _merge(ranges) for page in range(first, last + 1)]


def _read_range(part: str, num_pages: int) -> tuple[int, int]:
    found = _RANGE.fullmatch(part)
    if found is None:
        raise _refuse("pages must be numbers and ranges with commas between, such as 1-3,7.")
    first = int(found.group(1))
    last = int(found.group(2) or first)
    if not 1 <= first <= last:
        raise _refuse("pages are counted from 1, and ranges go upwards.")
    if last > num_pages:
        raise _refuse(f"There is no page {last}: the document has {num_pages}.")
    return first, last


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _refuse(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="pages", code="invalid_pages")
