"""Joins the pages of a document: paragraphs and tables that a page break cuts become whole, running heads disappear.

Pure, and shared by the service and its clients. Every part of the result says which pages it came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from serving.ocr_api.shapes import JoinedPart

_MARGIN_PARTS = 2
"""How many parts at the top and at the bottom of a page may be running heads."""
_LEAST_REPEATED = 3
"""On how many pages a running head stands at least."""
_LEAST_SHARE = 0.5
"""On which part of the pages of its kind (odd or even) a running head stands at least."""
_MAX_HEAD_CHARS = 120
_NUMBER = re.compile(r"\d+")
_PAGE_NUMBER = re.compile(r"\W*(page|seite|p\.?)?\s*(\d{1,5}|[ivxlc]{1,7})(\s*(/|of|von)\s*\d{1,5})?\W*", re.IGNORECASE)
_ENDS = re.compile(r"[.!?:;…。！？]['\"”’»)\]]*$")
_STARTS_ANEW = re.compile(r"^(#{1,6} |[-*+•] |\d{1,3}[.)] |\||<|!\[|\$\$|```)")
_RULE = re.compile(r"^\|(\s*:?-{3,}:?\s*\|)+$")


def join_pages(pages: Sequence[tuple[int, str]]) -> list[JoinedPart]:
    """Join pages.

    Args:
        pages: numbers and contents, in markdown or text, in order; a gap in the numbers joins nothing.
    """
    split = {number: _split(text) for number, text in pages}
    heads = _find_heads(split)
    joined: list[JoinedPart] = []
    last_page: int | None = None
    for number, parts in split.items():
        kept = [part for index, part in enumerate(parts) if (number, index) not in heads]
        for index, text in enumerate(kept):
            follows = index == 0 and last_page is not None and number == last_page + 1
            whole = _merge(joined[-1].text, text) if follows and joined else None
            if whole is None:
                joined.append(JoinedPart(text=text, pages=(number,)))
            else:
                joined[-1] = JoinedPart(text=whole, pages=(*joined[-1].pages, number))
        # A page of which nothing is left, such as a blank one, does not part its neighbours.
        last_page = number
    return joined


def _split(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n{2,}", text) if part.strip()]


def _find_heads(pages: dict[int, list[str]]) -> set[tuple[int, int]]:
    """Pages and indices of the parts that are running heads or page numbers.

    A part counts as repeated if it stands at the same end of enough pages, numbers aside, on all pages or on the odd
    or the even ones. A page number has to count with its page.
    """
    places: dict[tuple[str, bool, bool], list[tuple[int, int]]] = {}
    for number, parts in pages.items():
        num_parts = len(parts)
        for index, part in enumerate(parts):
            is_top, is_bottom = index < _MARGIN_PARTS, index >= num_parts - _MARGIN_PARTS
            if not (is_top or is_bottom) or len(part) > _MAX_HEAD_CHARS or num_parts == 1:
                continue
            keys = [(part, False)]
            if _counts_pages(part):
                keys.append((_NUMBER.sub("0", part.casefold()), True))
            for is_at_top in {is_top, not is_bottom}:
                for text, counts in keys:
                    places.setdefault((text, counts, is_at_top), []).append((number, index))
    found: set[tuple[int, int]] = set()
    sides = Counter(number % 2 for number in pages)
    for (_, counts, _), where in places.items():
        numbers = sorted({number for number, _ in where})
        share = max(len(numbers) / len(pages), _share_of_side(numbers, sides))
        is_repeated = len(numbers) >= _LEAST_REPEATED and share >= _LEAST_SHARE
        if is_repeated and (not counts or _is_counting(where, pages)):
            found.update(where)
    return found


def _counts_pages(part: str) -> bool:
    """Whether a part may be a page number, or a head that has one."""
    return _NUMBER.search(part) is not None or _PAGE_NUMBER.fullmatch(part) is not None


def _share_of_side(numbers: Sequence[int], sides: Counter[int]) -> float:
    kinds = {number % 2 for number in numbers}
    return len(numbers) / sides[kinds.pop()] if len(kinds) == 1 else 0.0


def _is_counting(where: Sequence[tuple[int, int]], pages: dict[int, list[str]]) -> bool:
    """Whether a number in the parts grows with the pages, as page numbers do; roman ones are taken on trust."""
    offsets: Counter[int] = Counter()
    num_roman = 0
    for number, index in where:
        digits = _NUMBER.findall(pages[number][index])
        num_roman += not digits
        offsets.update({int(digit) - number for digit in digits if len(digit) < 9})
    return num_roman == len(where) or (bool(offsets) and offsets.most_common(1)[0][1] > len(where) / 2)


def _merge(before: str, after: str) -> str | None:
    """The two parts as one, if a page break has cut it; None if they are two."""
    if before.startswith("|") and after.startswith("|"):
        return _merge_tables(before, after)
    if before.endswith("</table>") and after.startswith("<table>"):
        return f"{before.removesuffix('</table>').rstrip()}\n{after.removeprefix('<table>').lstrip()}"
    if _STARTS_ANEW.match(after) or before.startswith(("#", "|", "<", "![", "```")) or _ENDS.search(before):
        return None
    if re.search(r"[^\W\d_]-$", before) and after[:1].islower():
        return before[:-1] + after
    return f"{before} {after}" if after[:1].islower() or before.endswith((",", "-")) or after[:1].isdigit() else None


def _merge_tables(before: str, after: str) -> str | None:
    """Two pipe tables with as many columns: the second one's head is a row, unless it repeats the first one's."""
    first, rest = before.splitlines(), after.splitlines()
    if _count_columns(first[0]) != _count_columns(rest[0]):
        return None
    if len(rest) > 1 and _RULE.match(rest[1]):
        rest = rest[2:] if rest[0] == first[0] else [rest[0], *rest[2:]]
    return "\n".join([*first, *rest])


def _count_columns(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1
