"""Pages as documents of their own: well-formed whatever the model wrote, with all of its words."""

from __future__ import annotations

import html
import re
from collections import Counter
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.text.documents import PlacedText, WordBox, render_alto, render_hocr, render_html
from serving.ocr.text.layout import Box, LayoutBlock

ALTO = "{http://www.loc.gov/standards/alto/ns-v4#}"
XHTML = "{http://www.w3.org/1999/xhtml}"
BOX = Box(10, 20, 110, 40)
PLACED = [
    PlacedText(
        "Total 5 < 6", BOX, ((WordBox("Total", Box(10, 20, 50, 40)), WordBox("<6&\x00", Box(60, 22, 110, 38))),)
    ),
    PlacedText("no one\nknows", None),
]


def test_html_has_headings_tables_and_figures_and_nothing_that_runs() -> None:
    table = '<table><caption>Sums</caption><tr><td onclick="x">1</td><td>a&amp;b</td></tr></table>'
    blocks = [
        LayoutBlock("title", (), "# One <script>alert(1)</script>"),
        LayoutBlock("text", (), f"first\nsecond\n\nthird{table}"),
        LayoutBlock("image", (BOX,), ""),
    ]
    page = render_html(blocks, 3, {BOX: "iVBO"})
    assert "<h1>One &lt;script&gt;alert(1)&lt;/script&gt;</h1>" in page
    assert "<p>first<br>\nsecond</p>\n<p>third</p>\n<p>Sums</p>\n<table>\n<tr><td>1</td><td>a&amp;b</td></tr>" in page
    assert '<img alt="" src="data:image/png;base64,iVBO">' in page
    assert '<section id="page-3">' in page


def test_hocr_has_words_with_boxes_and_says_which_have_none() -> None:
    root = ElementTree.fromstring(render_hocr(PLACED, 2, (200, 100), 144).split("\n", 1)[1])
    page = root.find(f".//{XHTML}div[@class='ocr_page']")
    assert page is not None
    assert page.get("title") == "bbox 0 0 200 100; ppageno 1; scan_res 144 144"
    words = [(word.text, word.get("title")) for word in root.iter(f"{XHTML}span") if word.get("class") == "ocrx_word"]
    assert words == [("Total", "bbox 10 20 50 40"), ("<6&\ufffd", "bbox 60 22 110 38")]
    (lost,) = [each for each in root.iter(f"{XHTML}p") if "unplaced" in str(each.get("class"))]
    assert (lost.text, lost.get("title")) == ("no one\nknows", None)


def test_alto_has_words_with_boxes_and_says_which_have_none() -> None:
    root = ElementTree.fromstring(render_alto(PLACED, 2, (200, 100)).split("\n", 1)[1])
    first, second = root.iter(f"{ALTO}TextBlock")
    string = first.find(f".//{ALTO}String")
    assert string is not None
    assert string.attrib == {"CONTENT": "Total", "HPOS": "10", "VPOS": "20", "WIDTH": "40", "HEIGHT": "20"}
    assert second.get("TAGREFS") == "unplaced"
    assert [each.get("CONTENT") for each in second.iter(f"{ALTO}String")] == ["no", "one", "knows"]


@given(st.lists(st.text(alphabet="012<>&\"'/\n #td\x00\ud800", max_size=30), max_size=4))
def test_no_text_is_too_odd_and_no_digit_is_lost(texts: list[str]) -> None:
    placed = [PlacedText(text, None) for text in texts]
    for document in (render_hocr(placed, 1, (9, 9), None), render_alto(placed, 1, (9, 9))):
        ElementTree.fromstring(document.split("\n", 1)[1])
    page = render_html([LayoutBlock("text", (), text) for text in texts], 7, {}).split("</head>")[1]
    shown = html.unescape(re.sub(r"<(?:/?(?:p|h\d|br|section|body|html)\b[^<>]*)>", " ", page))
    assert Counter(re.findall(r"\d", shown)) == Counter(re.findall(r"\d", "".join(texts)))
