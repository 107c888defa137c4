from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.papers import office_file

from serving.errors import InvalidRequestError
from serving.ocr.rendering.formats import DocumentFormat, find_format
from serving.ocr_api.page_ranges import select_pages


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"%PDF-1.7\n", DocumentFormat.PDF),
        (b"\n\xef\xbb\xbfjunk %PDF-1.4", DocumentFormat.PDF),
        (b"\xff\xd8\xff\xe0", DocumentFormat.JPEG),
        (b"\x89PNG\r\n\x1a\n%PDF-1.4", DocumentFormat.PNG),
        (b"RIFF\0\0\0\0WEBPVP8 ", DocumentFormat.WEBP),
        (b"II*\0", DocumentFormat.TIFF),
        (b"MM\0*", DocumentFormat.TIFF),
        (b"GIF89a", DocumentFormat.GIF),
        (b"BM\x10\0\0\0\0\0\0\0", DocumentFormat.BMP),
        (b"x" * 5000 + b"%PDF-1.4", DocumentFormat.PDF),
        (b"%\xe2\xe3\n1 0 obj\n<<", DocumentFormat.PDF),
        (b"\0\0\0\x0cjP  \r\n\x87\n", DocumentFormat.JP2),
        (b"\xff\x4f\xff\x51", DocumentFormat.JP2),
        (b"\0\0\0\x1cftypavif\0\0\0\0", DocumentFormat.AVIF),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", DocumentFormat.AVIF),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", DocumentFormat.HEIC),
        (b"\0\0\0\x18ftypheic\0\0\0\0", DocumentFormat.HEIC),
    ],
)
def test_the_first_bytes_say_what_it_is(head: bytes, found: DocumentFormat) -> None:
    assert find_format(head) is found


@pytest.mark.parametrize("head", [office_file(), b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf1"])
def test_office_files_are_refused_with_advice(head: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="soffice --convert-to pdf") as refused:
        find_format(head)
    assert refused.value.code == "unsupported_document"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"", "unknown format"),
        (b"hello, this is a letter", "plain text"),
        (b" <html>", "a web page, which is not supported; print it to PDF"),
        (b"<svg xmlns=", "an SVG drawing"),
        (b"BMW is a car", "plain text"),
        (b"PK\x03\x04 %PDF-1.4", "a ZIP archive"),
        (b"%!PS-Adobe-3.0", "ps2pdf"),
        (b"AT&TFORM", "DjVu"),
        (b"\0\0\0\x1cftypisom\0\0\0\0", "a video"),
        (b"\x00\x01\x02\x03" * 9, "unknown format"),
        (b"RIFF\0\0\0\0WAVE", "unknown format"),
    ],
)
def test_a_refusal_names_what_it_found(head: bytes, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"which is not supported; .*PDF, JPEG") as refused:
        find_format(head)
    assert name in refused.value.message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_format_or_refused(head: bytes) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert find_format(head) in DocumentFormat


@pytest.mark.parametrize(
    ("selection", "pages"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("1-3,7", [0, 1, 2, 6]),
        (" 2 , 1 ", [0, 1]),
        ("3-5,4-6,5", [2, 3, 4, 5]),
        ("8", [7]),
        ("6-", [5, 6, 7]),
        ("-2", [0, 1]),
        ("7-999999999", [6, 7]),
        ("-2, 8-", [0, 1, 7]),
    ],
)
def test_pages_are_selected(selection: str | None, pages: list[int]) -> None:
    assert select_pages(selection, 8, 8) == pages


@pytest.mark.parametrize(
    "selection",
    [
        "",
        "0",
        "9",
        "3-2",
        "-",
        "9-",
        "-0",
        "0-3",
        "a",
        "1,,2",
        "1-2-3",
        "9" * 50,
        "1," * 3000,
        "1.5",
        "\u0661-\u0662,x",
    ],
)
def test_what_is_no_selection_is_refused(selection: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        select_pages(selection, 8, 8)
    assert refused.value.param == "pages"


def test_a_long_document_has_to_be_chosen_from() -> None:
    with pytest.raises(InvalidRequestError, match="10000 pages and 1000"):
        select_pages(None, 10_000, 1000)
    assert select_pages("9001-10000,9500", 10_000, 1000) == list(range(9000, 10_000))


@given(st.text(alphabet="0123456789-, ", max_size=20), st.integers(1, 50))
def test_a_selection_stays_within_the_document(selection: str, num_pages: int) -> None:
    try:
        pages = select_pages(selection, num_pages, 20)
    except InvalidRequestError:
        return
    assert pages == sorted(set(pages))
    assert 0 < len(pages) <= 20
    assert 0 <= pages[0] <= pages[-1] < num_pages
