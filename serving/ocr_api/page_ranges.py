"""Parses page selections such as `1-3,7-`, for the service and its clients. Pure."""

from __future__ import annotations

import re

from serving.errors import InvalidRequestError

_MAX_SELECTION_CHARS = 65_536
_RANGE = re.compile(r"\s*(?:(\d{1,9})|(\d{1,9})?\s*-\s*(\d{1,9})?)\s*")


def select_pages(selection: str | None, num_pages: int, max_pages: int, page_base: int | None = None) -> list[int]:
    """Indices of the selected pages, counted from 0, in document order and without duplicates.

    Args:
        selection: `1-3,7`; `5-` is from page 5 to the end and `-5` the pages up to 5. A range may extend beyond the end
            of the document. None for all pages.
        num_pages: number of pages of the document.
        max_pages: how many pages of one document may be read.
        page_base: the number of the first page, 0 or 1; None is 1.

    Raises:
        InvalidRequestError: the selection is malformed, or names missing or too many pages.
    """
    if selection is None:
        ranges = [(0, num_pages - 1)]
    elif len(selection) > _MAX_SELECTION_CHARS:
        raise _refuse(f"pages is too long; at most {_MAX_SELECTION_CHARS} characters are allowed.")
    else:
        base = 1 if page_base is None else page_base
        ranges = [_read_range(part, num_pages, base) for part in selection.split(",")]
    # Merged ranges are no longer than the document, even when ranges overlap.
    if num_pages > max_pages and sum(last - first + 1 for first, last in _merge(ranges)) > max_pages:
        raise _refuse(
            f"The document has {num_pages} pages and {max_pages} may be read at once; select some with pages."
        )
    return [page for first, last in _merge(ranges) for page in range(first, last + 1)]


def check_selection(selection: str, page_base: int | None = None) -> None:
    """Check what can be checked without a document.

    Raises:
        InvalidRequestError: the selection is malformed.
    """
    for part in selection.split(","):
        _parse_range(part, 1 if page_base is None else page_base)


def _parse_range(part: str, base: int) -> tuple[int, int | None]:
    """Indices of the first and the last page; None for the document's last page."""
    found = _RANGE.fullmatch(part)
    if found is None or part.strip() == "-":
        raise _refuse("pages must be numbers and ranges separated by commas, such as 1-3,7 or 5-.")
    single, first, last = found.groups()
    if single is not None:
        first = last = single
    begin, end = base if first is None else int(first), int(last) if last is not None else None
    if begin < base or (end is not None and end < begin):
        raise _refuse(f"pages are counted from {base}, and ranges must be ascending.")
    return begin - base, None if end is None else end - base


def _read_range(part: str, num_pages: int, base: int) -> tuple[int, int]:
    first, last = _parse_range(part, base)
    if first >= num_pages:
        raise _refuse(
            f"pages selects page {first + base}, counted from {base}, but the document has {num_pages} pages."
        )
    return first, num_pages - 1 if last is None else min(last, num_pages - 1)


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
