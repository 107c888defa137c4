from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.layout import Block, Box
from serving.ocr.markdown import format_tables, read_table, render_markdown, render_text

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
        Block("title", (), "# One"),
        Block("title", (), "Two"),
        Block("sub_title", (), "Three"),
        Block("text", (), "x"),
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
    blocks = [Block("text", (), "x"), Block("image", (Box(1, 2, 3, 4),), "")]
    assert render_markdown(blocks) == "x"
    assert render_markdown(blocks, lambda index, box: f"{index}-{box and box.right}.png") == "x\n\n![](0-3.png)"


def test_text_has_no_markup() -> None:
    assert render_text([Block("text", (), f"x\n{TABLE}")]) == "x\nName\tSum\na|b\t1 < 2"


@given(MARKUP)
def test_any_markup_is_taken(markup: str) -> None:
    for text in (markup, f"<table>{markup}"):
        blocks = [Block("table", (), text)]
        render_text(blocks)
        rendered = format_tables(text)
        assert render_markdown(blocks) is not None
        if text.startswith("<table>") and not read_table(text):
            assert "| --- |" not in rendered


@given(st.lists(st.lists(st.text(alphabet="ab|&<\\ "), min_size=1, max_size=4), min_size=1, max_size=4))
def test_cells_come_back_as_they_were(rows: list[list[str]]) -> None:
    import html

    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    read = read_table(f"<table>{body}</table>")
    assert [[cell.text for cell in row] for row in read] == [[" ".join(c.split()) for c in row] for row in rows]
