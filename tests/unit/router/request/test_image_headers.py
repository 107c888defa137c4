from __future__ import annotations

import contextlib
import io
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from support.request_pictures import animate_image, encode_image, png_header, to_url

from serving.errors import ImageTooLargeError, InvalidImageError, InvalidRequestError, RequestError
from serving.router.request.image_headers import FORMATS, check_image_url, read_size
from serving.settings.router import LimitSettings, RemoteImageSettings, RouterSettings

ROUTER = RouterSettings()
REMOTE = RouterSettings(remote_images=RemoteImageSettings(enabled=True, hosts=("*",)))
PARAM = "messages[0].content[1].image_url"


def router_with(max_image_pixels: int) -> RouterSettings:
    return RouterSettings(limits=LimitSettings(max_image_pixels=max_image_pixels))


def jpeg_with_long_metadata(width: int, height: int) -> bytes:
    """The size stands behind 128 KiB of application segments."""
    picture = encode_image("JPEG", width, height)
    segment = b"\xff\xe2" + struct.pack(">H", 0x8000) + bytes(0x8000 - 2)
    return picture[:2] + segment * 4 + picture[2:]


def tiff_with_directory_at_its_end(width: int, height: int) -> bytes:
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, height), (279, 4, 1, width * height)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    pixels = bytes(max(width * height, 100_000))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4)


PICTURES = {
    **{f"{name} {mode}": encode_image(name, 30, 20, mode) for name in FORMATS for mode in ("RGB", "L")},
    "PNG RGBA": encode_image("PNG", 30, 20, "RGBA"),
    "TIFF 1": encode_image("TIFF", 30, 20, "1"),
    "GIF animated": animate_image("GIF", 30, 20),
    "WEBP animated": animate_image("WEBP", 30, 20),
    "JPEG long metadata": jpeg_with_long_metadata(30, 20),
    "TIFF directory at its end": tiff_with_directory_at_its_end(30, 20),
    "PNG without pixels": png_header(30, 20),
}


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_an_image_is_taken_up_to_the_pixel_limit_and_not_over_it(data: bytes) -> None:
    check_image_url(to_url(data), PARAM, router_with(600))
    with pytest.raises(ImageTooLargeError, match=r"30 x 20 pixels; 599 pixels are allowed") as caught:
        check_image_url(to_url(data), PARAM, router_with(599))
    assert caught.value.param == PARAM


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_the_size_is_width_and_height(data: bytes) -> None:
    assert read_size(data, PARAM) == (30, 20)


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "application/pdf", "", "image/png;charset=x"])
def test_what_the_url_claims_to_be_does_not_matter(media_type: str) -> None:
    check_image_url(to_url(encode_image("WEBP"), media_type), PARAM, ROUTER)


@pytest.mark.parametrize(
    ("width", "height"), [(7072, 7072), (10_000, 10_000), (2**31 - 1, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_giant_is_refused_by_its_header_alone(width: int, height: int) -> None:
    started_s = time.perf_counter()
    with pytest.raises(ImageTooLargeError) as caught:
        check_image_url(to_url(png_header(width, height)), PARAM, ROUTER)
    assert time.perf_counter() - started_s < 1
    assert caught.value.body()["error"]["code"] == "image_too_large"
    assert caught.value.http_status == 400


def test_a_giant_is_refused_though_the_rest_is_long() -> None:
    with pytest.raises(ImageTooLargeError):
        check_image_url(to_url(png_header(60_000, 60_000) + bytes(100_000)), PARAM, ROUTER)


def test_the_configured_limit_is_the_one_that_counts() -> None:
    check_image_url(to_url(png_header(17_800, 10_000)), PARAM, router_with(178_000_000))


def test_a_limit_over_pillows_own_cannot_be_configured() -> None:
    with pytest.raises(ValidationError):
        router_with(179_000_000)


def bmp() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).save(file, "BMP")
    return file.getvalue()


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(to_url(b""), id="empty"),
        pytest.param(to_url(b"hello"), id="text"),
        pytest.param(to_url(b"%PDF-1.7\n"), id="a PDF"),
        pytest.param(to_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), id="an SVG"),
        pytest.param(to_url(bmp()), id="a format that is not read"),
        pytest.param(to_url(encode_image("PNG")[:20]), id="cut in its header"),
        pytest.param(to_url(bytes(200_000)), id="long"),
        pytest.param("data:image/png;base64", id="no comma"),
        pytest.param("data:image/png,abc", id="not base64 by its head"),
        pytest.param("data:image/png;base64;charset=x,abcd", id="base64 is not last"),
        pytest.param("data:image/png;base64,@@@@", id="not base64 by its letters"),
        pytest.param(to_url(encode_image("PNG")).replace(",", ",\n"), id="a good image with a line break"),
        pytest.param("data:image/png;base64,ÄÄÄÄ", id="not ASCII"),
        pytest.param("data:image/png;base64,abc", id="no padding"),
        pytest.param("data:image/png;base64," + "ab\n" * 40_000, id="long with line breaks"),
        pytest.param("data:", id="only a scheme"),
        pytest.param("http://127.0.0.1/a.png", id="remote"),
        pytest.param("https://example.com/a.png", id="remote, encrypted"),
        pytest.param("file:///etc/passwd", id="a file"),
        pytest.param("iVBORw0KGgo=", id="bare base64"),
    ],
)
def test_what_is_no_image_is_refused(url: str) -> None:
    with pytest.raises(InvalidImageError) as caught:
        check_image_url(url, PARAM, ROUTER)
    shown = caught.value.body()["error"]
    assert (shown["code"], shown["param"]) == ("invalid_image", PARAM)
    assert len(shown["message"]) < 200


@pytest.mark.parametrize("url", [None, "", 3, True, [], {}, ["data:"]])
def test_what_is_no_url_is_refused(url: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must hold a URL") as caught:
        check_image_url(url, PARAM, ROUTER)
    assert caught.value.param == PARAM


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("http://example.com/a.png", True),
        ("https://example.com/a.png", True),
        ("file:///etc/passwd", False),
        ("ftp://example.com/a.png", False),
        ("httpx://example.com", False),
        ("/etc/passwd", False),
    ],
)
def test_remote_images_are_web_addresses_and_nothing_else(url: str, is_allowed: bool) -> None:
    with contextlib.nullcontext() if is_allowed else pytest.raises(InvalidImageError):
        check_image_url(url, PARAM, REMOTE)


def test_data_urls_are_checked_where_remote_images_are_allowed() -> None:
    with pytest.raises(InvalidImageError):
        check_image_url(to_url(b"hello"), PARAM, REMOTE)


def check_politely(url: Any) -> None:
    """Whatever comes, a RequestError is all that may come out."""
    with contextlib.suppress(RequestError):
        check_image_url(url, PARAM, ROUTER)


MAGIC = [
    b"",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"RIFF\x64\0\0\0WEBPVP8X",
    b"II*\0",
    b"MM\0*",
]


@given(st.sampled_from(MAGIC), st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_request_errors(magic: bytes, rest: bytes) -> None:
    check_politely(to_url(magic + rest))


@given(st.text() | st.text().map(lambda rest: "data:image/png;base64," + rest))
def test_arbitrary_text_raises_nothing_but_request_errors(url: str) -> None:
    check_politely(url)


@given(st.data(), st.sampled_from(sorted(PICTURES)))
@settings(max_examples=300)
def test_damaged_images_raise_nothing_but_request_errors(data: st.DataObject, name: str) -> None:
    damaged = bytearray(PICTURES[name])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), max_size=8)):
        damaged[at % len(damaged)] = value
    check_politely(to_url(bytes(damaged[: data.draw(st.integers(0, len(damaged)))])))
    check_politely(to_url(bytes(damaged)))
