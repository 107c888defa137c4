"""A document is one text across its pages, and nothing of it is lost or made up."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr_api.joining import join_pages


def texts(*pages: str) -> list[str]:
    return [part.text for part in join_pages(list(enumerate(pages, 1)))]


def test_a_paragraph_that_a_page_break_cuts_is_whole() -> None:
    first, second = join_pages([(1, "Whole.\n\nThe sum is"), (2, "due in March.\n\nNext.")])[1:]
    assert (first.text, first.pages) == ("The sum is due in March.", (1, 2))
    assert (second.text, second.pages) == ("Next.", (2,))
    assert texts("It is impor-", "tant.") == ["It is important."]
    assert texts("pages 10-", "20 are") == ["pages 10- 20 are"]
    assert texts("on three", "whole", "pages.") == ["on three whole pages."]


def test_what_is_whole_stays_apart() -> None:
    assert texts("The end.", "and so on") == ["The end.", "and so on"]
    assert texts("A name", "Another name") == ["A name", "Another name"]
    assert texts("# Title", "text") == ["# Title", "text"]
    assert texts("a list", "- item") == ["a list", "- item"]
    assert len(join_pages([(1, "cut in"), (3, "two")])) == 2, "the page between is missing"


def test_a_table_that_a_page_break_cuts_is_whole() -> None:
    head = "| a | b |\n| --- | --- |"
    assert texts(f"{head}\n| 1 | 2 |", f"{head}\n| 3 | 4 |") == [f"{head}\n| 1 | 2 |\n| 3 | 4 |"]
    assert texts(f"{head}\n| 1 | 2 |", "| 3 | 4 |\n| --- | --- |\n| 5 | 6 |") == [
        f"{head}\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |"
    ]
    assert len(texts(head, "| a | b | c |\n| --- | --- | --- |")) == 2
    html = '<table>\n<tr><td colspan="2">{}</td></tr>\n</table>'
    (whole,) = texts(html.format(1), html.format(2))
    assert whole.count("<table>") == whole.count("</table>") == 1
    assert whole.count("<tr>") == 2


def test_running_heads_and_page_numbers_are_dropped() -> None:
    pages = [f"ACME report 2026\n\nBody {number * 7} of it.\n\nPage {number} of 4" for number in range(1, 5)]
    assert texts(*pages) == ["Body 7 of it.", "Body 14 of it.", "Body 21 of it.", "Body 28 of it."]
    pages = [f"The sum {'ab'[number % 2]}\n\nflow{'xyz'[number % 3]}\n\n{number + 12}" for number in range(1, 7)]
    assert texts(*pages) == ["flowy flowz flowx flowy flowz flowx"]


def test_what_only_looks_like_a_head_is_kept() -> None:
    assert texts("Total\n\nx.", "Total\n\ny.") == ["Total", "x.", "Total", "y."], "twice is not often"
    amounts = ["Due.\n\n17", "Due!\n\n902", "Due?\n\n3", "Due;\n\n44"]
    assert [text for text in texts(*amounts) if text.isdigit()] == ["17", "902", "3", "44"], "they do not count pages"
    assert texts("same", "same", "same") == ["same same same"], "a page is not its own head"


@given(st.lists(st.lists(st.text(alphabet="ab12 |-.#\n", max_size=12), max_size=4).map("\n\n".join), max_size=6))
def test_no_word_is_lost_unless_it_repeats(pages: list[str]) -> None:
    joined = join_pages(list(enumerate(pages, 1)))
    found = re.findall(r"\w", "".join(part.text for part in joined))
    given = re.findall(r"\w", "".join(pages))
    if len(pages) < 3:
        heads = [page for page in pages if "|" in page]
        assert found == given or heads
    assert len(found) <= len(given)
    assert [part.pages[0] for part in joined] == sorted(part.pages[0] for part in joined)
