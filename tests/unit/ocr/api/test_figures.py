"""Figures that a request asks for, over HTTP: the page's own pixels, bounded, in every kind of answer."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import fpdf
import pytest
from PIL import Image, ImageChops
from support.ocr_service import RunningService, reads, run_service

from unit.ocr.api.test_app import read_events

WIDTH, HEIGHT = 1000, 500
RED, BLUE = (100, 50, 400, 250), (500, 300, 900, 450)
"""Where the page has its figures."""


def page_image() -> Image.Image:
    """Noise, so that a crop is right only at its place, with a figure of each colour."""
    image = Image.effect_noise((WIDTH, HEIGHT), 80).convert("RGB")
    for box, colour in ((RED, "red"), (BLUE, "blue")):
        figure = image.crop(box)
        image.paste(Image.blend(figure, Image.new("RGB", figure.size, colour), 0.5), box)
    return image


def page_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def grounded(*boxes: tuple[int, int, int, int], label: str = "image") -> str:
    """As the model writes it: coordinates are from 0 to 999."""

    def scaled(box: tuple[int, int, int, int]) -> str:
        across, down = 999 / WIDTH, 999 / HEIGHT
        return f"[{box[0] * across:.3f}, {box[1] * down:.3f}, {box[2] * across:.3f}, {box[3] * down:.3f}]"

    parts = (f"<|ref|>{label}<|/ref|><|det|>[{scaled(box)}]<|/det|>\n\n" for box in boxes)
    return "<|ref|>title<|/ref|><|det|>[[0,0,999,90]]<|/det|>\n# Two\n\n" + "".join(parts)


def cut_out(figure: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(figure["image_base64"], validate=True)))
    image.load()
    return image.convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def check_page(page: dict[str, Any], image: Image.Image) -> None:
    """Both figures, pixel for pixel, where the text has their names."""
    assert [figure["id"] for figure in page["images"]] == ["page-1-figure-1", "page-1-figure-2"]
    assert [tuple(figure["box"]) for figure in page["images"]] == [RED, BLUE]
    for figure in page["images"]:
        assert same(cut_out(figure), image.crop(tuple(figure["box"])))
    assert page["markdown"] == "# Two\n\n![](page-1-figure-1)\n\n![](page-1-figure-2)"


async def ask(service: RunningService, data: bytes, **fields: Any) -> dict[str, Any]:
    answer = await service.upload(data, include_images="true", **fields)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()["pages"][0]
    return page


async def test_figures_are_the_pages_own_pixels_in_every_answer(tmp_path: Path) -> None:
    image = page_image()
    async with run_service(tmp_path, reads(grounded(RED, BLUE))) as service:
        check_page(await ask(service, page_png(image)), image)
        layout = await ask(service, page_png(image), format="layout")
        check_page(layout, image)
        assert [block["boxes"] for block in layout["blocks"][1:]] == [[list(RED)], [list(BLUE)]]
        streamed = await service.upload(page_png(image), include_images="true", stream="true")
        (finished,) = (event for event in read_events(streamed.text)[:-1] if event["type"] == "page.completed")
        check_page(finished["page"], image)
        job = (await service.upload(page_png(image), "/v1/ocr/jobs", include_images="true")).json()
        await service.wait_for(job["id"], "completed")
        (stored,) = (await service.client.get(f"/v1/ocr/jobs/{job['id']}/pages")).json()["data"]
        check_page(stored, image)
        document = {"type": "file", "file": base64.b64encode(page_png(image)).decode()}
        body = {"model": "nano", "include_images": True, "document": document}
        check_page((await service.client.post("/v1/ocr", json=body)).json()["pages"][0], image)


async def test_nobody_gets_figures_unasked(tmp_path: Path) -> None:
    async with run_service(tmp_path, reads(grounded(RED))) as service:
        answer = await service.upload(page_png(page_image()))
        page = answer.json()["pages"][0]
    assert "images" not in page
    assert page["markdown"] == "# Two"


@pytest.mark.parametrize("dpi", [72, 150])
async def test_a_figure_of_a_pdf_is_cut_from_the_page_as_it_was_drawn(dpi: int, tmp_path: Path) -> None:
    pdf = fpdf.FPDF(unit="pt", format=(WIDTH, HEIGHT))
    pdf.add_page()
    pdf.image(page_image(), 0, 0, WIDTH, HEIGHT)
    async with run_service(tmp_path, reads(grounded(RED, BLUE))) as service:
        streamed = await service.upload(
            bytes(pdf.output()), include_images="true", include_page_images="true", stream="true", dpi=dpi
        )
    events = read_events(streamed.text)[:-1]
    (drawn,) = (event for event in events if event["type"] == "page.image")
    page_as_drawn = cut_out({"image_base64": drawn["image_url"].partition(",")[2]})
    (finished,) = (event for event in events if event["type"] == "page.completed")
    assert len(finished["page"]["images"]) == 2
    for figure, where in zip(finished["page"]["images"], (RED, BLUE), strict=True):
        assert figure["box"] == [round(edge * drawn["width"] / WIDTH) for edge in where]
        assert same(cut_out(figure), page_as_drawn.crop(tuple(figure["box"])))


async def test_a_turned_photo_is_cut_as_it_is_seen(tmp_path: Path) -> None:
    upright = page_image()
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    async with run_service(tmp_path, reads(grounded(RED, BLUE))) as service:
        check_page(await ask(service, buffer.getvalue()), upright)


async def test_figures_are_bounded_in_number_and_in_bytes(tmp_path: Path) -> None:
    image = page_image()
    text = grounded(RED, RED, BLUE, (0, 0, WIDTH, HEIGHT), (7, 7, 7, 300), (0, 0, 50, 50))
    async with run_service(tmp_path, reads(text), max_figures=3, max_figure_bytes=900_000) as service:
        page = await ask(service, page_png(image))
    sizes = [len(base64.b64decode(figure["image_base64"])) for figure in page["images"]]
    # A box that comes twice is one figure, one without area is none; the whole page has no room after the others.
    assert [tuple(figure["box"]) for figure in page["images"]] == [RED, BLUE]
    assert sum(sizes) <= 900_000
    assert page["markdown"] == "# Two\n\n![](page-1-figure-1)\n\n![](page-1-figure-1)\n\n![](page-1-figure-2)"


async def test_a_document_has_so_many_bytes_of_figures_for_all_its_pages(tmp_path: Path) -> None:
    frames = [page_image() for _ in range(4)]
    frames[0].save(tmp_path / "x.tiff", save_all=True, append_images=frames[1:])
    each = len(page_png(frames[0].crop(RED)))
    async with run_service(
        tmp_path, reads(grounded(RED)), max_figure_bytes=int(2.5 * each), pages_in_parallel=1
    ) as service:
        answer = await service.upload((tmp_path / "x.tiff").read_bytes(), include_images="true")
    pages = answer.json()["pages"]
    assert [len(page["images"]) for page in pages] == [1, 1, 0, 0]
    assert [page["markdown"] for page in pages[1:3]] == ["# Two\n\n![](page-2-figure-1)", "# Two"]
    assert all(page["status"] == "completed" for page in pages)


async def test_a_client_of_mistral_finds_its_names(tmp_path: Path) -> None:
    document = fpdf.FPDF(unit="pt", format=(WIDTH, HEIGHT))
    for _ in range(2):
        document.add_page()
    data = base64.b64encode(bytes(document.output())).decode()
    async with run_service(tmp_path, reads(grounded(RED, BLUE, (0, 0, 5, 5)))) as service:
        body = {
            "model": "nano",
            "document": {"type": "document_url", "document_url": f"data:application/pdf;base64,{data}"},
            "pages": [1],
            "include_image_base64": True,
            "image_limit": 1,
            "image_min_size": 10,
        }
        answer = (await service.client.post("/v1/ocr", json=body)).json()
    (page,) = answer["pages"]
    assert (page["index"], answer["page_base"]) == (1, 0)
    assert page["markdown"].startswith("# Two")
    (figure,) = page["images"]
    assert figure["bottom_right_x"] > figure["top_left_x"]
    assert f"]({figure['id']})" in page["markdown"]
    assert {"width", "height", "dpi"} <= page["dimensions"].keys()
    assert answer["usage_info"] == {"pages_processed": 1, "doc_size_bytes": answer["document"]["size_bytes"]}
