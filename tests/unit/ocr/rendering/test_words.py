"""Words are found where they stand, on generated pages whose words have known places."""

from __future__ import annotations

import io
import random
import statistics

import pikepdf
import pypdfium2
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont

from serving.ocr.rendering.searchable_pdf import build_pdf
from serving.ocr.rendering.words import (
    Edges,
    PlacedBlock,
    PlacedWord,
    TextBlock,
    assign_words,
    choose_gaps,
    place_words,
)

WORDS = ("the", "Invoice", "total", "of", "1,204.50", "was", "paid", "in", "March", "with", "minimum", "i.e.")


def print_page(seed: int, size: int, *, figure: bool = False) -> tuple[Image.Image, list[tuple[str, Edges]]]:
    """A page of paragraphs, and its words with their boxes."""
    dice = random.Random(seed)
    page = Image.new("RGB", (900, 1200), (250, 248, 245))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    truth: list[tuple[str, Edges]] = []
    x, y = 60, 60
    if figure:
        pen.rectangle((500, 60, 840, 300), fill=(120, 120, 160))
        y = 340
    for number in range(120):
        word = dice.choice(WORDS)
        left, top, right, bottom = pen.textbbox((x, y), word, font=font)
        if right > 840:
            x, y = 60, y + int(size * 1.5)
            left, top, right, bottom = pen.textbbox((x, y), word, font=font)
        if bottom > 1150:
            break
        pen.text((x, y), word, font=font, fill=(20, 20, 20))
        truth.append((word, (int(left), int(top), int(right), int(bottom))))
        x = int(right) + size // 3
        if number % 40 == 39:
            x, y = 60, y + size * 3
    return page, truth


def overlap(one: Edges, two: Edges) -> float:
    """Intersection over union."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, width) * max(0, height)
    return shared / ((one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - shared)


@pytest.mark.parametrize(("seed", "size", "figure"), [(1, 18, False), (2, 28, False), (3, 22, True), (4, 40, False)])
def test_words_are_found_by_the_ink_alone(seed: int, size: int, figure: bool) -> None:
    page, truth = print_page(seed, size, figure=figure)
    (block,) = place_words(page, [TextBlock(" ".join(word for word, _ in truth), None)])
    placed = [word for line in block.lines for word in line]
    assert [word.text for word in placed] == [word for word, _ in truth]
    overlaps = [overlap(word.box, box) for word, (_, box) in zip(placed, truth, strict=True)]
    assert statistics.median(overlaps) >= 0.7, overlaps


def test_blocks_with_boxes_are_found_within_them_and_others_beside() -> None:
    page, truth = print_page(5, 24)
    half = len(truth) // 2
    bottom = truth[half - 1][1][3] + 2
    while half < len(truth) and truth[half][1][1] < bottom:
        half += 1
    boxed = TextBlock(" ".join(word for word, _ in truth[:half]), (50, 50, 850, bottom))
    loose = TextBlock(" ".join(word for word, _ in truth[half:]), None)
    first, second = place_words(page, [boxed, loose])
    for block, words in (first, truth[:half]), (second, truth[half:]):
        placed = [word for line in block.lines for word in line]
        overlaps = [overlap(word.box, box) for word, (_, box) in zip(placed, words, strict=True)]
        assert statistics.median(overlaps) >= 0.7


def test_blocks_without_support_say_so() -> None:
    blank = Image.new("RGB", (300, 200), (255, 255, 255))
    assert place_words(blank, [TextBlock("ghost", None)]) == [PlacedBlock("ghost", None, ())]
    page, _ = print_page(6, 30)
    (block,) = place_words(page, [TextBlock("one", None)])
    assert block.lines == (), "a page of words is not a single one"
    assert place_words(page, [TextBlock("", None)])[0].lines == ()
    assert place_words(page, []) == []


def test_widths_decide_which_words_stand_in_a_line() -> None:
    assert assign_words([5.0, 5.0, 10.0, 4.0], [100, 100, 40]) == [2, 1, 1]
    assert assign_words([5.0, 5.0], [100, 3, 100]) == [1, 0, 1]
    assert sum(assign_words([1.0] * 200, [50])) == 200
    assert choose_gaps([50.0], [(20, 21), (46, 54), (80, 81)], 8.0) == [(46, 54)]
    assert choose_gaps([50.0, 90.0], [(46, 54)], 8.0) == [(50, 50), (90, 90)]


def test_a_searchable_pdf_has_its_words_where_they_stand() -> None:
    page, truth = print_page(7, 30)
    blocks = place_words(page, [TextBlock(" ".join(word for word, _ in truth), None)])
    odd = PlacedBlock("Ωмега 文 𝄞", (60, 1160, 400, 1190), ((PlacedWord("Ωмега", (60, 1160, 200, 1190)),),))
    data = build_pdf(page, [*blocks, odd], 144)
    with pikepdf.open(io.BytesIO(data)) as document:
        assert [float(edge) for edge in document.pages[0].MediaBox] == [0, 0, 450, 600]
    document = pypdfium2.PdfDocument(data)
    text = document[0].get_textpage()
    found = text.get_text_range().split()
    assert found == [*(word for word, _ in truth), "Ωмега"]
    search = text.search("1,204.50", match_whole_word=False)
    index, count = search.get_next()
    left, bottom, right, top = text.get_charbox(index)
    true = next(box for word, box in truth if word == "1,204.50")
    assert abs(left * 2 - true[0]) < 12
    assert abs((600 - bottom) * 2 - true[3]) < 16
    assert count == 8
    assert right > left
    assert top > bottom
    shown = document[0].render(scale=2).to_pil().convert("L")
    assert shown.size == page.size
    differences = ImageChops.difference(shown, page.convert("L")).resize((1, 1), Image.Resampling.BOX)
    assert differences.tobytes()[0] < 8, "the words are not painted over the picture"
    search.close()
    text.close()
    document.close()
