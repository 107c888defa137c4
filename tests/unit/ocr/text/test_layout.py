from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.text.layout import Box, LayoutBlock, LayoutParser, parse_layout

MARKS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>")
PIECES = st.sampled_from(
    [*MARKS, "<", "<|", "|>", "<|re", "[[1, 2, 3, 4]]", "[[5,6,7", "title", "\n", " " * 20, "a < b", "[[]]", "x" * 1100]
)
ANSWERS = st.lists(PIECES | st.text(max_size=8), max_size=30).map("".join)
PAGE = (
    "<|ref|>title<|/ref|><|det|>[[0, 0, 999, 100]]<|/det|>\n# Report\n\n"
    "<|ref|>text<|/ref|><|det|>[[10, 200, 500, 999]]<|/det|>\nBody, if a < b.\n"
)


def test_a_page_becomes_blocks_in_its_own_pixels() -> None:
    assert parse_layout(PAGE, 1998, 999) == [
        LayoutBlock("title", (Box(0, 0, 1998, 100),), "# Report"),
        LayoutBlock("text", (Box(20, 200, 1000, 999),), "Body, if a < b."),
    ]


def test_a_block_is_told_as_soon_as_the_next_one_begins() -> None:
    parser = LayoutParser(999, 999)
    told = [block.label for character in PAGE for block in parser.feed(character)]
    assert told == ["title"]
    assert [block.label for block in parser.finish()] == ["text"]


@given(ANSWERS, st.lists(st.integers(0, 200)))
def test_any_split_of_any_answer_gives_the_same_blocks(answer: str, cuts: list[int]) -> None:
    parser = LayoutParser(1000, 1400)
    blocks = []
    edges = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    for start, end in itertools.pairwise(edges):
        blocks += parser.feed(answer[start:end])
    assert [*blocks, *parser.finish()] == parse_layout(answer, 1000, 1400)


@given(ANSWERS)
def test_character_by_character_gives_the_same_blocks(answer: str) -> None:
    parser = LayoutParser(1000, 1400)
    blocks = [block for character in answer for block in parser.feed(character)]
    assert [*blocks, *parser.finish()] == parse_layout(answer, 1000, 1400)


@given(st.text(alphabet=st.characters(blacklist_characters="<")))
def test_text_without_markup_is_one_block(text: str) -> None:
    blocks = parse_layout(text, 10, 10)
    assert blocks == ([LayoutBlock("", (), text.strip())] if text.strip() else [])


@given(ANSWERS)
def test_boxes_are_on_the_page(answer: str) -> None:
    for block in parse_layout(f"<|det|>{answer}", 640, 480):
        for box in block.boxes:
            assert 0 <= box.left <= box.right <= 640
            assert 0 <= box.top <= box.bottom <= 480


@pytest.mark.parametrize(
    ("answer", "blocks"),
    [
        ("<|ref|>text<|/ref|>", [LayoutBlock("text", (), "")]),
        ("<|ref|>text<|/ref|>no box", [LayoutBlock("text", (), "no box")]),
        ("<|ref|>text<|/ref|> \n<|det|>[[1,2,3,4]]<|/det|>x", [LayoutBlock("text", (Box(1, 2, 3, 4),), "x")]),
        ("<|ref|>text<|/ref|><|det|>[[1,2,3,4],[5,6,7", [LayoutBlock("text", (Box(1, 2, 3, 4),), "")]),
        ("<|ref|>text<|/ref|><|det|>[[4,3,2,1]]<|/det|>", [LayoutBlock("text", (Box(2, 1, 4, 3),), "")]),
        ("<|ref|>text<|/ref|><|det|>[[1,2,3,4000]]<|/det|>", [LayoutBlock("text", (Box(1, 2, 3, 999),), "")]),
        ("<|ref|>text<|/ref|><|det|>[[1,2],[a,b,c,d]]<|/det|>", [LayoutBlock("text", (), "")]),
        (
            "<|ref|>a<|/ref|><|det|>[[1,2,3,4]]<|ref|>b<|/ref|>",
            [LayoutBlock("a", (Box(1, 2, 3, 4),), ""), LayoutBlock("b", (), "")],
        ),
        ("before <|ref|>tit", [LayoutBlock("", (), "before")]),
        ("the mark <|ref|> begins\na label, <|ref|> too", [LayoutBlock("", (), "the mark  begins\na label,  too")]),
        ("before <|ref|>the end", [LayoutBlock("", (), "before the end")]),
        ("<|ref|>a<|/ref|><|det|>[[550, s 331, 652, 345]]<|/det|>", [LayoutBlock("a", (Box(550, 331, 652, 345),), "")]),
        ("<|ref|>a<|/ref|><|det|>[[1, 2 3, 4, 5]]<|/det|>", [LayoutBlock("a", (), "")]),
        ("before <|re", [LayoutBlock("", (), "before")]),
        ("3 <", [LayoutBlock("", (), "3 <")]),
        ("a<|/ref|>b<|/det|>c", [LayoutBlock("", (), "a b c")]),
        ("5<|det|>[[1,2,3,4]]<|/det|>6", [LayoutBlock("", (Box(1, 2, 3, 4),), "5 6")]),
        ("<|ref|>a<|ref|>b<|/ref|>c", [LayoutBlock("", (), "a"), LayoutBlock("b", (), "c")]),
    ],
)
def test_cut_and_malformed_answers_keep_what_can_be_kept(answer: str, blocks: list[LayoutBlock]) -> None:
    assert parse_layout(answer, 999, 999) == blocks


def test_several_boxes_of_what_was_looked_for() -> None:
    (block,) = parse_layout("<|ref|>the cat<|/ref|><|det|>[[1, 2, 3, 4], [5, 6, 7, 8]]<|/det|>", 999, 999)
    assert block == LayoutBlock("the cat", (Box(1, 2, 3, 4), Box(5, 6, 7, 8)), "")


def test_a_label_without_end_is_text() -> None:
    assert parse_layout("<|ref|>" + "x" * 5000, 9, 9) == [LayoutBlock("", (), "x" * 5000)]


def test_a_table_behind_its_caption_belongs_to_the_label_before() -> None:
    first, second = Box(1, 2, 3, 4), Box(5, 6, 7, 8)
    labels = "<|ref|>table<|/ref|><|det|>[[1,2,3,4]]<|/det|>\n<|ref|>table_caption<|/ref|><|det|>[[5,6,7,8]]<|/det|>\n"
    table = "<table><tr><td>1</td></tr></table>"
    assert parse_layout(f"{labels}Table 1: sums\n{table}\n", 999, 999) == [
        LayoutBlock("table", (first,), table),
        LayoutBlock("table_caption", (second,), "Table 1: sums"),
    ]
    alone = [LayoutBlock("table", (first,), ""), LayoutBlock("table_caption", (second,), "no markup")]
    assert parse_layout(f"{labels}no markup", 999, 999) == alone
