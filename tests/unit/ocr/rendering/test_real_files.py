"""Files as they come: cut, repaired, too large, extremely long, in fonts that nobody has."""

from __future__ import annotations

import functools
import io
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pikepdf
import pillow_heif
import pytest
from PIL import Image, ImageDraw

from serving.ocr.rendering.drawing import PageError, fit_scale
from serving.ocr.rendering.pdf import is_intact
from serving.ocr.rendering.strips import find_parts
from serving.ocr.rendering.text_layer import read_text_layer
from serving.ocr.rendering.worker import count_pages, draw

TEXT = "BT /F1 24 Tf 20 40 Td (Total 12.50) Tj ET"
HELVETICA = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"


def build_pdf(
    content: str = TEXT, box: str = "0 0 200 100", page: str = "", font: str = HELVETICA, root: str = "", more: str = ""
) -> bytes:
    """One page, uncompressed; `page` and `root` are further entries, `more` further objects from number 6 on."""
    objects = [
        f"<</Type/Catalog/Pages 2 0 R{root}>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>{page}>>",
        f"<</Length {len(content)}>>stream\n{content}\nendstream",
        font,
        *filter(None, [more]),
    ]
    body, places = "%PDF-1.7\n", []
    for number, written in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{written}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    head = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    return f"{body}{head}trailer<</Size {len(places) + 1}/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF\n".encode()


def read(
    folder: Path, data: bytes, name: str = "pdf", max_pixels: int = 10**6, **more: Any
) -> tuple[Image.Image, dict[str, Any]]:
    file = folder / "document"
    file.write_bytes(data)
    request = {"file": str(file), "format": name, "page": 0, "dpi": 144, "max_pixels": max_pixels, **more}
    drawn, told = draw(request)
    image = Image.open(io.BytesIO(drawn))
    assert image.size == (told["width"], told["height"])
    return image.convert("RGB"), told


def kinds(told: dict[str, Any]) -> list[str]:
    return [kind for kind, _ in told["warnings"]]


def test_a_whole_file_has_no_warning(tmp_path: Path) -> None:
    image, told = read(tmp_path, build_pdf())
    assert (image.size, told["dpi"], told["warnings"]) == ((400, 200), 144, [])
    assert image.getextrema()[0] == (0, 255)


PDF = build_pdf()
DAMAGED = {
    "without its trailer": PDF[: PDF.index(b"trailer")],
    "without its table": PDF[: PDF.index(b"xref")],
    "without its last bytes": PDF[:-30],
    "without its header": PDF[9:],
    "with junk before": b"HTTP/1.1 200 OK\r\n" * 200 + PDF,
    "with junk after": PDF + b"<html>" * 1000,
    "with a wrong table": PDF.replace(b"startxref\n", b"startxref\n9"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pdf_is_read_and_flagged(name: str, tmp_path: Path) -> None:
    whole, _ = read(tmp_path, PDF)
    image, told = read(tmp_path, DAMAGED[name])
    assert count_pages(tmp_path / "document", "pdf") == 1
    assert image.tobytes() == whole.tobytes()
    assert kinds(told) == ["damaged"]


def test_a_pdf_of_any_writer_is_intact(tmp_path: Path) -> None:
    for mode in pikepdf.ObjectStreamMode.disable, pikepdf.ObjectStreamMode.generate:
        with pikepdf.open(io.BytesIO(PDF)) as document:
            document.save(tmp_path / "x", object_stream_mode=mode)
        assert is_intact(tmp_path / "x")


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "in object streams"])
def test_the_unit_of_a_page_counts(is_packed: bool, tmp_path: Path) -> None:
    data = build_pdf(page="/UserUnit 2.5")
    if is_packed:
        packed = io.BytesIO()
        with pikepdf.open(io.BytesIO(data)) as document:
            document.save(packed, object_stream_mode=pikepdf.ObjectStreamMode.generate)
        data = packed.getvalue()
    image, told = read(tmp_path, data)
    assert (image.size, told["dpi"]) == ((1000, 500), 144)


def test_a_page_that_is_too_large_is_drawn_at_the_resolution_that_fits(tmp_path: Path) -> None:
    image, told = read(tmp_path, build_pdf(box="0 0 4960 7016"), max_pixels=10**6)
    assert 0.97e6 < image.width * image.height <= 10**6
    assert (told["dpi"], kinds(told)) == (12, ["resolution_reduced"])
    with pytest.raises(PageError, match="crop it, or cut it") as refused:
        read(tmp_path, build_pdf(box="0 0 14400 14400"), max_pixels=10**5)
    assert refused.value.code == "page_too_large"


@pytest.mark.parametrize(("width", "height"), [(1e5, 1e5), (3, 1e7), (1, 1), (1000.2, 999.9)])
def test_a_scale_fits(width: float, height: float) -> None:
    scale = fit_scale(width, height, 10**6)
    assert scale <= 1
    assert int(width * scale) * int(height * scale) <= 10**6


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_that_is_too_large_is_shrunk_in_every_mode(mode: str, tmp_path: Path) -> None:
    page = Image.new("L", (1200, 800), 255)
    page.paste(0, (0, 0, 600, 800))
    page = Image.fromarray(np.asarray(page).astype("u2") * 257) if mode == "I;16" else page.convert(mode)
    buffer = io.BytesIO()
    page.save(buffer, "TIFF")
    image, told = read(tmp_path, buffer.getvalue(), "tiff", 60_000)
    assert (image.size, kinds(told)) == ((300, 200), ["resolution_reduced"])
    assert max(image.getpixel((20, 100))) < 40  # type: ignore[arg-type]
    assert min(image.getpixel((280, 100))) > 215  # type: ignore[arg-type]


def test_a_large_jpeg_is_decoded_small_and_one_beyond_the_memory_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1600, 1200), (200, 0, 0)).save(buffer, "JPEG")
    image, told = read(tmp_path, buffer.getvalue(), "jpeg", 30_000)
    assert (image.size, kinds(told)) == ((200, 150), ["resolution_reduced"])
    buffer = io.BytesIO()
    Image.new("RGB", (1600, 1200)).save(buffer, "PNG")
    (tmp_path / "document").write_bytes(buffer.getvalue())
    request = {"file": str(tmp_path / "document"), "format": "png", "page": 0, "dpi": 144, "max_pixels": 1000}
    with pytest.raises(PageError, match="scale it down to at most 1000 pixels"):
        draw(request, memory_bytes=2 * 10**7)


@functools.cache
def lettered() -> Image.Image:
    page = Image.effect_noise((300, 400), 60).convert("RGB")
    ImageDraw.Draw(page).text((20, 380), "last line", fill=0)
    return page


CUTS = [("PNG", 0.95), ("PNG", 0.5), ("JPEG", 0.5), ("BMP", 0.7)]


@pytest.mark.parametrize(("name", "part"), CUTS)
def test_an_image_that_lost_its_end_is_read_as_far_as_it_goes(name: str, part: float, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    lettered().save(buffer, name)
    data = buffer.getvalue()
    cut = data[: int(len(data) * part)]
    image, told = read(tmp_path, cut, name.lower())
    assert kinds(told) == ["damaged"]
    whole = np.asarray(lettered()).astype(int)
    if name == "BMP":
        return  # it begins with the last row
    assert np.abs(np.asarray(image).astype(int)[:100] - whole[:100]).mean() < 15
    if part < 0.9:
        assert image.getpixel((150, 399)) in ((255, 255, 255), (128, 128, 128))
        assert "of its height is missing" in told["warnings"][0][1] or name == "JPEG"


def test_an_image_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    lettered().save(buffer, "PNG")
    with pytest.raises(Exception, match=r"truncated|broken|incomplete|identify"):
        read(tmp_path, buffer.getvalue()[:60], "png")


@pytest.mark.parametrize(("name", "form"), [("JPEG2000", "jp2"), ("AVIF", "avif"), ("HEIF", "heic")])
def test_newer_formats_are_read(name: str, form: str, tmp_path: Path) -> None:
    page = Image.new("RGB", (64, 48), (250, 250, 250))
    page.paste((0, 0, 200), (0, 0, 32, 48))
    buffer = io.BytesIO()
    if name == "HEIF":
        pillow_heif.from_pillow(page).save(buffer)
    else:
        page.save(buffer, name)
    image, told = read(tmp_path, buffer.getvalue(), form)
    assert (image.size, told["media_type"], told["warnings"]) == ((64, 48), "image/png", [])
    left, right = image.getpixel((8, 24)), image.getpixel((56, 24))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    assert left[2] - left[0] > 150
    assert min(right) > 230


def test_a_strip_is_cut_between_its_lines(tmp_path: Path) -> None:
    lines = " ".join(f"BT /F1 20 Tf 10 {14_400 - 40 * number} Td (Item {number}) Tj ET" for number in range(1, 359))
    image, told = read(tmp_path, build_pdf(lines, "0 0 200 14400"), max_pixels=20 * 10**6)
    parts = told["parts"]
    assert kinds(told) == ["cut_into_parts"]
    assert len(parts) == 36
    assert parts[0][1] == 0
    assert parts[-1][3] == image.height
    assert all(before[3] == after[1] for before, after in itertools.pairwise(parts))
    rows = np.asarray(image.convert("L")).min(axis=1)
    assert all(rows[top] > 200 for _, top, _, _ in parts[1:]), "no cut goes through a letter"
    (left, top, right, bottom) = parts[5]
    part, about = read(tmp_path, (tmp_path / "document").read_bytes(), max_pixels=20 * 10**6, part=parts[5])
    assert part.size == (right - left, bottom - top)
    assert "parts" not in about


def test_only_strips_are_cut() -> None:
    assert find_parts(Image.new("RGB", (100, 800))) == [(0, 0, 100, 800)]
    wide = find_parts(Image.new("RGB", (900, 100), (255, 255, 255)))
    assert [edges[0] for edges in wide] == [0, 180, 360, 540, 720]
    assert len(find_parts(Image.new("L", (1, 30_000)))) == 64


CJK = (
    "<</Type/Font/Subtype/Type0/BaseFont/MS-Mincho/Encoding/90ms-RKSJ-H/DescendantFonts[<</Type/Font"
    "/Subtype/CIDFontType2/BaseFont/MS-Mincho/CIDSystemInfo<</Registry(Adobe)/Ordering(Japan1)/Supplement 2>>"
    "/DW 1000/FontDescriptor<</Type/FontDescriptor/FontName/MS-Mincho/Flags 6/FontBBox[0 -200 1000 900]/ItalicAngle 0"
    "/Ascent 800/Descent -200/StemV 80/CapHeight 700>>>>]>>"
)


def test_text_in_a_font_that_the_file_lacks_is_flagged(tmp_path: Path) -> None:
    shown = f"BT /F1 24 Tf 20 40 Td <{'日本'.encode('cp932').hex()}> Tj ET"
    image, told = read(tmp_path, build_pdf(shown, font=CJK))
    is_blank = image.getextrema() == ((255, 255),) * 3
    assert kinds(told) == ["font_missing" if is_blank else "font_substituted"]  # what this machine has decides
    assert "MS-Mincho" in told["warnings"][0][1]
    _, told = read(tmp_path, build_pdf(font="<</Type/Font/Subtype/TrueType/BaseFont/Frutiger-Light>>"))
    assert kinds(told) == ["font_substituted"]
    for name in ("Arial,Bold", "TimesNewRomanPS-BoldItalicMT", "ABCDEF+Helvetica-Oblique"):
        assert not kinds(read(tmp_path, build_pdf(font=f"<</Type/Font/Subtype/TrueType/BaseFont/{name}>>"))[1])
    hidden = shown.replace("Td", "Td 3 Tr")
    assert not kinds(read(tmp_path, build_pdf(hidden, font=CJK))[1]), "invisible text need not be drawn"


def test_a_dynamic_form_is_refused_before_a_page_is_drawn(tmp_path: Path) -> None:
    root = "/NeedsRendering true/AcroForm<</Fields[]/XFA 6 0 R>>"
    form = "<</Length 8>>stream\n<xdp/>  \nendstream"
    (tmp_path / "x").write_bytes(build_pdf(root=root, more=form))
    with pytest.raises(PageError, match="print it to a PDF") as refused:
        count_pages(tmp_path / "x", "pdf")
    assert refused.value.code == "dynamic_form"
    (tmp_path / "x").write_bytes(build_pdf(root=root.replace("true", "false"), more=form))
    assert count_pages(tmp_path / "x", "pdf") == 1


@pytest.mark.parametrize("revision", [2, 3, 4, 6])
def test_an_encrypted_pdf_needs_its_password_if_it_has_one(revision: Any, tmp_path: Path) -> None:
    file = tmp_path / "x"
    for user in ("", "geheim"):
        with pikepdf.open(io.BytesIO(PDF)) as document:
            document.save(
                file,
                encryption=pikepdf.Encryption(
                    owner="boss", user=user, R=revision, aes=revision > 3, metadata=revision > 3
                ),
            )
        for password in (None, "geheim", "boss"):
            if user and password is None:
                with pytest.raises(PageError, match="send its password") as refused:
                    count_pages(file, "pdf", password)
                assert refused.value.code == "encrypted_document"
            else:
                assert count_pages(file, "pdf", password) == 1
        assert read(tmp_path, file.read_bytes(), password="geheim")[1]["warnings"] == []
    with pikepdf.open(io.BytesIO(PDF)) as document:
        document.save(tmp_path / "open", encryption=pikepdf.Encryption(owner="", user="geheim", R=6))
    assert read(tmp_path, (tmp_path / "open").read_bytes())[1]["warnings"] == [], "its owner's password is empty"
    with pytest.raises(PageError, match="does not open") as refused:
        count_pages(file, "pdf", "wrong")
    assert refused.value.code == "wrong_password"


LAYERS: dict[str, tuple[dict[str, str], str | None]] = {
    "whole": ({}, None),
    "none": ({"content": "0 0 m 90 90 l S"}, "no text layer"),
    "beside a figure": ({"content": f"{TEXT} 100 5 90 90 re f"}, "covers only"),
    "invisible": ({"content": TEXT.replace("Td", "Td 3 Tr")}, "invisible"),
    "turned": ({"page": "/Rotate 90"}, None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_text_layer_is_taken_where_it_is_the_whole_page(name: str, tmp_path: Path) -> None:
    given, flaw = LAYERS[name]
    (tmp_path / "x").write_bytes(build_pdf(**given))
    layer = read_text_layer(tmp_path / "x", 0, None)
    if flaw is None:
        assert layer.flaw is None
        (line,) = layer.lines
        assert line.text == "Total 12.50"
        assert all(0 <= edge <= 1 for edge in line.box)
    else:
        assert layer.flaw is not None
        assert flaw in layer.flaw


def test_nothing_of_a_file_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        read(tmp_path, DAMAGED["without its trailer"], password="geheim")
    assert "geheim" not in caplog.text
