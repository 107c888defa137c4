"""Requests that clients of Mistral's API write."""

from __future__ import annotations

from typing import Any

import pytest

from serving.errors import InvalidRequestError
from serving.ocr.reading.mistral import infer_type
from serving.ocr.reading.options import options_to_json, read_options
from serving.ocr.reading.results import find_figures
from serving.ocr.text.layout import Box, LayoutBlock
from serving.ocr.text.markdown import render_markdown
from serving.ocr_api.page_ranges import select_pages
from serving.ocr_api.shapes import PageFigure

REQUEST = {
    "model": "nano",
    "document": {"type": "document_url", "document_url": "data:..."},
    "id": "mine",
    "pages": [0, 2],
    "include_image_base64": True,
    "image_limit": 3,
    "image_min_size": 10,
    "table_format": "html",
    "bbox_annotation_format": None,
    "extract_header": False,
}


def test_its_options_have_the_same_meaning_here() -> None:
    options = read_options(REQUEST)
    assert (options.pages, options.page_base, options.include_images) == ("0,2", 0, True)
    assert (options.image_limit, options.image_min_size, options.table_format) == (3, 10, "html")
    stored = options_to_json(options)
    assert read_options({"model": "nano", **stored}).pages == "0,2", "options are read again from a job's row"


@pytest.mark.parametrize(
    ("pages", "page_base", "selected"),
    [
        ([0, 2], None, [0, 2]),
        ([1, 3], 1, [0, 2]),
        ("1,3", None, [0, 2]),
        ("0,2", 0, [0, 2]),
        ("0-2", 0, [0, 1, 2]),
    ],
)
def test_pages_are_counted_as_their_shape_or_the_request_says(
    pages: Any, page_base: int | None, selected: list[int]
) -> None:
    options = read_options({"model": "nano", "pages": pages, "page_base": page_base})
    assert select_pages(options.pages, 3, 3, options.page_base) == selected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"pages": []}, "pages"),
        ({"pages": [-1]}, "pages"),
        ({"pages": ["1"]}, "pages"),
        ({"pages": [True]}, "pages"),
        ({"page_base": 2}, "page_base"),
        ({"bbox_annotation_format": {"type": "json_schema"}}, "bbox_annotation_format"),
        ({"table_format": "csv"}, "table_format"),
        ({"include_image_base64": "yes"}, "include_images"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_is_not_done_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_options({"model": "nano", **fields})
    assert caught.value.param == param


def test_a_page_that_is_not_there_is_named_as_it_was_counted() -> None:
    with pytest.raises(InvalidRequestError, match="page 3, counted from 0"):
        select_pages("3", 3, 3, 0)
    with pytest.raises(InvalidRequestError, match="counted from 1"):
        select_pages("0", 3, 3)


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"type": "file", "file": "eA=="}, "file"),
        ({"document_url": "data:x", "document_name": "a.pdf"}, "document_url"),
        ({"image_url": {"url": "data:x"}}, "image_url"),
        ({}, None),
        ({"document_url": "a", "image_url": "b"}, None),
    ],
)
def test_the_one_field_that_holds_the_document_tells_its_type(document: dict[str, Any], kind: str | None) -> None:
    assert infer_type(document) == kind


def test_stored_files_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        infer_type({"type": "file", "file_id": "f"})
    assert caught.value.param == "document.file_id"


def test_small_figures_are_left_out() -> None:
    boxes = (Box(0, 0, 100, 9), Box(0, 0, 10, 10), Box(5, 5, 5, 50))
    blocks = [LayoutBlock(label="image", text="", boxes=boxes)]
    assert find_figures(blocks, 9, 10) == [boxes[1]]
    assert find_figures(blocks, 9) == list(boxes[:2])


def test_tables_may_stay_html() -> None:
    blocks = [LayoutBlock(label="table", text="<table><tr><td>a</td><td>b</td></tr></table>", boxes=())]
    assert render_markdown(blocks, is_html=True) == "<table>\n<tr><td>a</td><td>b</td></tr>\n</table>"
    assert render_markdown(blocks).startswith("| a | b |")


def test_a_figure_has_its_corners() -> None:
    told = PageFigure(id="a", box=(1, 2, 3, 4), image_base64="x").to_json()
    assert b'"top_left_x":1,"top_left_y":2,"bottom_right_x":3,"bottom_right_y":4' in told
