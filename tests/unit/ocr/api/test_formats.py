"""Every kind of document over HTTP: what reaches the engine are its pages, pixel for pixel."""

from __future__ import annotations

import base64
import io
import zipfile
from pathlib import Path
from typing import Any

import orjson
from PIL import Image, TiffImagePlugin
from support.ocr_service import RunningService, run_service
from support.papers import office_file, write_pdf

SIZE = (60, 40)
COLOURS = [(10 * number, 200 - 10 * number, 50) for number in range(6)]


def save(name: str, frames: list[Image.Image], **options: Any) -> bytes:
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(buffer, name, **more, **options)
    return buffer.getvalue()


def frames(number: int = 6) -> list[Image.Image]:
    return [Image.new("RGB", SIZE, colour) for colour in COLOURS[:number]]


def sent(service: RunningService) -> list[Image.Image]:
    """Pictures that the engine was asked to read, in the order of their pages."""
    found = {}
    for asked in service.engine.asked:
        content = orjson.loads(asked.body)["messages"][0]["content"]
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert url.startswith(f"data:{image.get_format_mimetype()};base64,")
        number = int(asked.headers["x-request-id"].rpartition("-t")[0].rpartition("-p")[2])
        found[number] = image.convert("RGB")
    service.engine.asked.clear()
    return [found[number] for number in sorted(found)]


def colours(images: list[Image.Image]) -> list[Any]:
    return [image.getpixel((30, 20)) for image in images]


async def test_a_tiff_has_as_many_pages_as_frames(tmp_path: Path) -> None:
    tiff = save("TIFF", frames(), compression="tiff_lzw")
    async with run_service(tmp_path) as service:
        whole = (await service.upload(tiff)).json()
        assert whole["document"] == {"format": "tiff", "num_pages": 6, "size_bytes": len(tiff)}
        assert [page["number"] for page in whole["pages"]] == [1, 2, 3, 4, 5, 6]
        assert [page["dimensions"] for page in whole["pages"]] == [{"width": 60, "height": 40, "dpi": None}] * 6
        assert colours(sent(service)) == COLOURS
        some = (await service.upload(tiff, pages="5,2-3")).json()
        assert [page["number"] for page in some["pages"]] == [2, 3, 5]
        assert colours(sent(service)) == [COLOURS[1], COLOURS[2], COLOURS[4]]
        beyond = await service.upload(tiff, pages="7")
        assert (beyond.status_code, beyond.json()["error"]["code"]) == (400, "invalid_pages")
        job = (await service.upload(tiff, "/v1/ocr/jobs", pages="6")).json()
        await service.wait_for(job["id"], "completed")
        assert colours(sent(service)) == [COLOURS[5]]


async def test_a_page_of_a_tiff_that_is_damaged_fails_alone(tmp_path: Path) -> None:
    tiff = bytearray(save("TIFF", frames(3), compression="tiff_lzw"))
    with Image.open(io.BytesIO(bytes(tiff))) as opened:
        assert isinstance(opened, TiffImagePlugin.TiffImageFile)
        opened.seek(1)
        (offset, *_), (length, *_) = opened.tag_v2[273], opened.tag_v2[279]
    tiff[offset : offset + length] = b"\xff" * length
    async with run_service(tmp_path) as service:
        pages = (await service.upload(bytes(tiff))).json()["pages"]
    assert [page["status"] for page in pages] == ["completed", "failed", "completed"]
    assert pages[1]["error"]["code"] == "damaged_document"


async def test_a_tiff_of_any_kind_of_pixel_is_one_that_an_engine_can_read(tmp_path: Path) -> None:
    black, white = (0, 0, 0), (255, 255, 255)  # what is transparent is white, and CMYK without ink
    async with run_service(tmp_path) as service:
        for mode, colour in {"1": black, "L": black, "I;16": black, "CMYK": white, "RGBA": white}.items():
            answer = await service.upload(save("TIFF", [Image.new(mode, SIZE, 0), Image.new(mode, SIZE, 0)]))
            assert [page["status"] for page in answer.json()["pages"]] == ["completed"] * 2
            assert colours(sent(service)) == [colour] * 2, mode


async def test_pictures_are_one_page(tmp_path: Path) -> None:
    files = {
        "gif": save("GIF", frames(3)),
        "bmp": save("BMP", frames(1)),
        "webp": save("WEBP", frames(1), lossless=True),
        "png": save("PNG", frames(1)),
        "jpeg": save("JPEG", frames(1), quality=100),
    }
    files["animated webp"] = save("WEBP", frames(3), lossless=True)
    files["animated png"] = save("PNG", frames(3))
    async with run_service(tmp_path) as service:
        for name, data in files.items():
            found = (await service.upload(data)).json()
            assert (found["document"]["format"], found["document"]["num_pages"]) == (name.split()[-1], 1)
            assert [page["status"] for page in found["pages"]] == ["completed"], name
            (image,) = sent(service)
            assert image.size == SIZE
            pixel = image.getpixel((30, 20))
            assert isinstance(pixel, tuple)
            assert all(abs(one - other) <= 4 for one, other in zip(pixel, COLOURS[0], strict=True)), (name, pixel)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"application/vnd.oasis.opendocument.text" if name == "mimetype" else b"x")
    return buffer.getvalue()


async def test_office_files_are_refused_with_advice(tmp_path: Path) -> None:
    files = {
        "a.docx": office_file(),
        "a.xlsx": zipped("[Content_Types].xml", "xl/workbook.xml"),
        "a.pptx": zipped("ppt/presentation.xml"),
        "a.odt": zipped("mimetype", "content.xml"),
        "a.doc": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(5000),
        "a.rtf": b"{\\rtf1 hello}",
        "a.pdf": office_file(),
    }
    async with run_service(tmp_path) as service:
        for path in ("/v1/ocr", "/v1/ocr/jobs", "/v1/ocr/quote"):
            for name, data in files.items():
                answer = await service.client.post(path, data={"model": "nano"}, files={"file": (name, data)})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (400, "unsupported_document"), name
                assert "soffice --convert-to pdf" in error["message"]
        plain = await service.upload(zipped("notes.txt"))
        assert (plain.status_code, plain.json()["error"]["code"]) == (400, "unsupported_document")
        assert "PDF, JPEG, PNG, WebP, TIFF, GIF, BMP" in plain.json()["error"]["message"]
        assert service.engine.asked == []


async def test_what_a_file_is_called_does_not_matter(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1).read_bytes()
    png = save("PNG", frames(1))
    async with run_service(tmp_path) as service:
        for name, kind, data, found in (
            ("scan.png", "image/png", pdf, "pdf"),
            ("paper.pdf", "application/pdf", png, "png"),
            ("letter.docx", "application/msword", png, "png"),
            ("", "", pdf, "pdf"),
            ("../../etc/passwd\x00.pdf", "text/html", png, "png"),
        ):
            files = {"file": (name or None, data, kind or None)}
            answer = await service.client.post("/v1/ocr", data={"model": "nano"}, files=files)
            assert answer.status_code == 200, (name, answer.text)
            assert answer.json()["document"]["format"] == found
        url = "data:application/pdf;base64," + base64.b64encode(png).decode()
        body = {"model": "nano", "document": {"type": "document_url", "document_url": url}}
        assert (await service.client.post("/v1/ocr", json=body)).json()["document"]["format"] == "png"


async def test_a_file_that_is_two_things_at_once_is_one_everywhere(tmp_path: Path) -> None:
    """What is told of it is what is read: a picture's pixels, or a page's."""
    pdf = write_pdf(tmp_path / "x.pdf", 2).read_bytes()
    gif = save("GIF", frames(1))
    async with run_service(tmp_path) as service:
        both = (await service.upload(gif + pdf)).json()
        assert (both["document"]["format"], both["document"]["num_pages"]) == ("gif", 1)
        assert [image.size for image in sent(service)] == [SIZE]
        other = (await service.upload(b"GIF is no magic\n" + pdf)).json()
        assert (other["document"]["format"], other["document"]["num_pages"]) == ("pdf", 2)
        assert {image.size for image in sent(service)} == {(1190, 1684)}
