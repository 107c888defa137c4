from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.text.layout import Box, LayoutBlock
from serving.ocr.text.markdown import format_tables, render_markdown, render_text
from serving.ocr.text.tables import Table, split_tables

TAGS = st.sampled_from(
    [
        "<table>",
        "</table>",
        "<tr>",
        "</tr>",
        "<td>",
        "</td>",
        '<td colspan="2">',
        "<th>",
        "<td",
        "|",
        "&lt;",
        "\n",
        "&#x;",
    ]
)
MARKUP = st.lists(TAGS | st.text(max_size=5), max_size=30).map("".join)
TABLE = "<table><tr><td>Name</td><td>Sum</td></tr><tr><td>a|b</td><td>1 &lt; 2</td></tr></table>"


def test_headings_get_their_sign_unless_they_have_it() -> None:
    blocks = [
        LayoutBlock("title", (), "# One"),
        LayoutBlock("title", (), "Two"),
        LayoutBlock("sub_title", (), "Three"),
        LayoutBlock("text", (), "x"),
    ]
    assert render_markdown(blocks) == "# One\n\n# Two\n\n## Three\n\nx"


def test_a_table_becomes_a_markdown_table() -> None:
    assert format_tables(TABLE) == "| Name | Sum |\n| --- | --- |\n| a\\|b | 1 < 2 |"


def test_cells_that_span_stay_html_and_are_escaped() -> None:
    markup = '<table><tr><td colspan="2" onclick="x()">a<script>b</td></tr><tr><td>c</td><td>d</td></tr></table>'
    assert format_tables(markup) == (
        '<table>\n<tr><td colspan="2">a&lt;script&gt;b</td></tr>\n<tr><td>c</td><td>d</td></tr>\n</table>'
    )


def test_a_table_that_was_cut_off_is_closed() -> None:
    assert format_tables("before<table><tr><td>a</td><td>b") == "before\n\n| a | b |\n| --- | --- |"


def test_short_rows_are_filled() -> None:
    table = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>"
    assert format_tables(table).splitlines()[2] == "| c |  |"


def test_figures_are_named_or_left_out() -> None:
    blocks = [LayoutBlock("text", (), "x"), LayoutBlock("image", (Box(1, 2, 3, 4),), "")]
    assert render_markdown(blocks) == "x"
    assert render_markdown(blocks, lambda index, box: f"{index}-{box and box.right}.png") == "x\n\n![](0-3.png)"


def test_a_block_of_several_boxes_is_as_many_figures() -> None:
    blocks = [
        LayoutBlock("image", (Box(1, 2, 3, 4), Box(5, 6, 7, 8)), ""),
        LayoutBlock("image", (Box(0, 0, 9, 9),), ""),
    ]
    shown = render_markdown(blocks, lambda index, box: f"{index}-{box and box.right}")
    assert shown.split() == ["![](0-3)", "![](1-7)", "![](2-9)"]


def test_text_has_no_markup() -> None:
    assert render_text([LayoutBlock("text", (), f"x\n{TABLE}")]) == "x\nName\tSum\na|b\t1 < 2"


@given(MARKUP)
def test_any_markup_is_taken(markup: str) -> None:
    for text in (markup, f"<table>{markup}"):
        blocks = [LayoutBlock("table", (), text)]
        render_text(blocks)
        rendered = format_tables(text)
        assert render_markdown(blocks) is not None
        if not any(isinstance(part, Table) and part.rows for part in split_tables(text)):
            assert "| --- |" not in rendered


@given(st.lists(st.lists(st.text(alphabet="ab|&<\\ "), min_size=1, max_size=4), min_size=1, max_size=4))
def test_cells_come_back_as_they_were(rows: list[list[str]]) -> None:
    import html

    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    (read,) = split_tables(f"<table>{body}</table>")
    assert isinstance(read, Table)
    assert [[cell.text for cell in row] for row in read.rows] == [[" ".join(c.split()) for c in row] for row in rows]


def text_of(markup: str) -> str:
    return render_text([LayoutBlock("table", (), markup)])


def test_tables_and_what_stands_around_them_are_apart() -> None:
    two = "<table><tr><td>Total</td><td>1</td></tr></table><table><tr><td>2</td><td>VAT</td></tr></table>"
    assert text_of(two) == "Total\t1\n2\tVAT"
    assert text_of("Total:<table><tr><td>5</td></tr></table>due") == "Total:\n5\ndue"
    assert format_tables("Total:<table><tr><td>5</td></tr></table>due") == "Total:\n\n| 5 |\n| --- |\n\ndue"


def test_a_table_that_is_not_closed_ends_where_the_next_begins() -> None:
    assert text_of("<table><tr><td>1</td></tr><table><tr><td>2</td></tr></table>3") == "1\n2\n3"


def test_a_table_inside_of_a_cell_is_its_texts() -> None:
    inner = "<table><tr><td>b</td><td>c</td></tr><tr><td>d</td></tr></table>"
    outer = f"<table><tr><td>a{inner}e</td><td>f</td></tr><tr><td>g</td><td>h</td></tr></table>i"
    assert text_of(outer) == "a b c d e\tf\ng\th\ni"
    assert format_tables(outer) == "| a b c d e | f |\n| --- | --- |\n| g | h |\n\ni"


def test_breaks_and_raised_digits_stay_in_markdown_and_leave_no_tag_in_text() -> None:
    spans = '<table><tr><td rowspan="2">Net<br>weight</td><td>m<sup>2</sup></td></tr><tr><td>x</td></tr></table>'
    assert format_tables(spans) == (
        '<table>\n<tr><td rowspan="2">Net<br>weight</td><td>m<sup>2</sup></td></tr>\n<tr><td>x</td></tr>\n</table>'
    )
    assert text_of(spans) == "Net weight\tm²\nx"
    plain = "<table><tr><td>Net<BR/>weight</td><td>H<sub>2</sub>O</td><td>10<sup>2</td></tr></table>"
    assert format_tables(plain) == ("| Net<br>weight | H<sub>2</sub>O | 10<sup>2</sup> |\n| --- | --- | --- |")
    assert text_of(plain) == "Net weight\tH₂O\t10 2"
    assert text_of("See 10<sup>3</sup> notes<sup>1</sup><br>next, <b>here</b>") == "See 10³ notes¹\nnext, <b>here</b>"


def test_what_a_page_says_is_shown_as_it_is_written() -> None:
    markup = '<table><tr><td>&lt;pause ms="5"/&gt;</td><td>&amp;lt; 1 &lt; 2 &amp; 3</td></tr></table>'
    assert text_of(markup) == '<pause ms="5"/>\t&lt; 1 < 2 & 3'
    assert format_tables(markup).splitlines()[0] == '| &lt;pause ms="5"/> | &amp;lt; 1 < 2 & 3 |'


def test_captions_stand_before_their_table_and_stray_texts_after_it() -> None:
    markup = "<table><caption>Sales &amp; more</caption><tr><td>1</td></tr>stray<tr><td>2</td></tr></table>"
    assert text_of(markup) == "Sales & more\n1\n2\nstray"
    assert format_tables(markup) == "Sales & more\n\n| 1 |\n| --- |\n| 2 |\n\nstray"


def test_cells_without_a_table_are_apart_as_well() -> None:
    assert text_of("1</td><td>2</td></tr><tr><td>3</table>4").split() == ["1", "2", "3", "4"]


WORDS = st.text(alphabet="0123456789ab", min_size=1, max_size=4)
INLINE = st.sampled_from(["", "<br>", "<b>", "</b>", "<sup>", "</sup>", "<sub>", "</sub>", " ", "<p>", "</span>"])
CELLS = st.tuples(st.sampled_from(["<td>", "<th>", '<td colspan="2">']), INLINE, WORDS, INLINE, st.booleans())
STRAY = WORDS.map(lambda word: ("", "", word, "", False))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Texts and tables as models write and cut them, and the words that are in them."""
    words: list[str] = []

    def write_table(depth: int) -> str:
        written = "<table>"
        if draw(st.booleans()):
            words.append(draw(WORDS))
            written += f"<caption>{words[-1]}</caption>"
        for row in draw(st.lists(st.lists(CELLS | STRAY, max_size=3), max_size=3)):
            written += draw(st.sampled_from(["<tr>", "</tr><tr>", "<tbody><tr>"]))
            for opening, before, word, after, is_closed in row:
                words.append(word)
                written += f"{opening or '</td>'}{before}{word}{after}"
                if opening and depth < 2 and draw(st.integers(0, 5)) == 0:
                    written += write_table(depth + 1)
                written += "</td>" if is_closed or not opening else ""
        return written + draw(st.sampled_from(["</table>", "</tr></table>", ""]))

    answer = ""
    for is_table in draw(st.lists(st.booleans(), max_size=4)):
        if is_table:
            answer += write_table(0)
        elif not answer or answer.endswith("</table>"):
            words.append(draw(WORDS))
            answer += words[-1]
    return answer, words


@given(answers())
def test_no_word_or_number_is_lost_or_joined_with_another(made: tuple[str, list[str]]) -> None:
    answer, words = made
    text = text_of(answer)
    markdown = format_tables(answer)
    # Digits above and below the line are signs of their own, also to these bounds.
    plain = text.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789"))
    found = re.findall(r"\w+", plain)
    for word in words:
        assert word in found, (answer, text)
        found.remove(word)
        assert re.search(rf"(?<![0-9a-z]){word}(?![0-9a-z])", markdown), (answer, markdown)
    assert not found
    assert "<" not in text
