from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from support.papers import encrypted_pdf, huge_png, slow_pdf, write_image, write_pdf

from serving.errors import RenderError
from serving.ocr.rendering.pool import DrawnPage, OpenedDocument, Renderer
from serving.settings.ocr import RenderSettings


@contextlib.asynccontextmanager
async def rendering(**settings: object) -> AsyncIterator[Renderer]:
    renderer = Renderer(RenderSettings.model_validate({"workers": 1, **settings}))
    try:
        yield renderer
    finally:
        await renderer.close()


def worker_pids() -> list[int]:
    found = psutil.Process().children()
    return [child.pid for child in found if "serving.ocr.rendering.worker" in child.cmdline()]


def pixels(page: DrawnPage) -> Image.Image:
    image = Image.open(io.BytesIO(page.data))
    assert image.size == (page.width, page.height)
    assert image.get_format_mimetype() == page.media_type
    return image


async def test_pdf_pages_are_drawn_at_the_dpi_that_was_asked_for(tmp_path: Path) -> None:
    async with rendering() as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 3), "acme")
        assert document.num_pages == 3
        for dpi, size in ((72, (595, 842)), (None, (1190, 1684))):
            page = pixels(await renderer.draw(document, 2, dpi))
            assert page.size == size
            assert page.getcolors() == [(size[0] * size[1], (255, 255, 255))]


async def test_a_deep_scan_is_drawn_within_the_least_memory_that_a_worker_may_have(tmp_path: Path) -> None:
    scan = np.full((1100, 850), 60_000, "u2")
    scan[500:600] = 2000
    Image.fromarray(scan).save(tmp_path / "x", "TIFF")
    async with rendering(worker_memory_bytes=256 * 2**20) as renderer:
        page = pixels(await renderer.draw(await renderer.open(tmp_path / "x", "acme"), 0))
    assert page.getpixel((10, 10)) == (233, 233, 233)
    assert page.getpixel((10, 550)) == (8, 8, 8)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
async def test_images_are_one_page(name: str, tmp_path: Path) -> None:
    async with rendering() as renderer:
        document = await renderer.open(write_image(tmp_path / "x", name), "acme")
        assert document.num_pages == 1
        assert pixels(await renderer.draw(document, 0)).size == (60, 40)


async def test_frames_are_pages_of_a_tiff_only(tmp_path: Path) -> None:
    async with rendering() as renderer:
        tiff = await renderer.open(write_image(tmp_path / "tiff", "TIFF", num_frames=3), "acme")
        gif = await renderer.open(write_image(tmp_path / "gif", "GIF", num_frames=3), "acme")
        assert (tiff.num_pages, gif.num_pages) == (3, 1)
        assert pixels(await renderer.draw(tiff, 2)).getcolors() == [(2400, (2, 0, 0))]


async def test_a_photo_is_turned_upright_and_transparency_becomes_white(tmp_path: Path) -> None:
    turned, clear = Image.new("RGB", (60, 40)), Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned", "JPEG", exif=exif)
    clear.save(tmp_path / "clear", "GIF")
    async with rendering() as renderer:
        assert pixels(await renderer.draw(await renderer.open(tmp_path / "turned", "acme"), 0)).size == (40, 60)
        page = pixels(await renderer.draw(await renderer.open(tmp_path / "clear", "acme"), 0))
        assert page.getcolors() == [(25, (255, 255, 255))]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encrypted_pdf(), "encrypted_document"),
        (b"%PDF-1.7\n" + random.Random(1).randbytes(5000), "damaged_document"),
        (b"%PDF-1.7\n", "damaged_document"),
        (b"\x89PNG\r\n\x1a\n", "damaged_document"),
        (b"II*\0" + b"\x08\0\0\0" + b"\xff" * 50, "damaged_document"),
    ],
)
async def test_documents_that_cannot_be_opened_are_refused(data: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    async with rendering() as renderer:
        with pytest.raises(RenderError) as refused:
            await renderer.open(tmp_path / "x", "acme")
        assert refused.value.code == code


async def test_a_page_that_is_too_large_is_drawn_smaller_and_one_beyond_the_memory_fails(tmp_path: Path) -> None:
    (tmp_path / "png").write_bytes(huge_png(30_000))
    async with rendering(max_page_pixels=10**6) as renderer:
        document = await renderer.open(write_pdf(tmp_path / "pdf", 1, (14_400, 14_400)), "acme")
        page = await renderer.draw(document, 0, 600)
        assert (page.width, page.dpi, [warning.code for warning in page.warnings]) == (
            1000,
            4,
            ["resolution_reduced"],
        )
        document = await renderer.open(tmp_path / "png", "acme")
        with pytest.raises(RenderError) as refused:
            await renderer.draw(document, 0, 600)
        assert refused.value.code == "page_too_large"


async def test_a_cut_image_is_mended_here_and_does_not_fail_in_the_engine(tmp_path: Path) -> None:
    Image.effect_noise((500, 500), 60).save(tmp_path / "x", "PNG")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-3000])
    async with rendering() as renderer:
        page = await renderer.draw(await renderer.open(tmp_path / "x", "acme"), 0)
        pixels(page).load()
        assert [warning.code for warning in page.warnings] == ["damaged"]


async def test_a_killed_worker_fails_its_page_only(tmp_path: Path) -> None:
    async with rendering() as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 2, (3000, 3000)), "acme")
        (pid,) = worker_pids()
        page = asyncio.create_task(renderer.draw(document, 0))
        await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RenderError) as failed:
            await page
        assert failed.value.code == "render_failed"
        assert (await renderer.draw(document, 1)).width == 6000


async def test_a_hanging_worker_is_killed(tmp_path: Path) -> None:
    async with rendering(page_timeout_s=5) as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 1), "acme")
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGSTOP)
        renderer.settings = renderer.settings.model_copy(update={"page_timeout_s": 0.1})
        with pytest.raises(RenderError) as failed:
            await renderer.draw(document, 0)
        assert failed.value.code == "render_timeout"
        assert worker_pids() == []


async def test_who_leaves_takes_the_page_with_them(tmp_path: Path) -> None:
    async with rendering() as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 1, (3000, 3000)), "acme")
        page = asyncio.create_task(renderer.draw(document, 0))
        await asyncio.sleep(0.02)
        page.cancel()
        with pytest.raises(asyncio.CancelledError):
            await page
        assert (await renderer.draw(document, 0, 72)).width == 3000


async def test_workers_are_bounded_and_replaced(tmp_path: Path) -> None:
    async with rendering(workers=2, pages_per_worker=3) as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 8, (100, 100)), "acme")
        seen: set[int] = set()
        for _ in range(4):
            await asyncio.gather(*(renderer.draw(document, page) for page in range(4)))
            assert len(worker_pids()) <= 2
            seen.update(worker_pids())
        assert len(seen) > 2
    assert worker_pids() == []


async def test_a_worker_has_none_of_the_services_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    async with rendering() as renderer:
        await renderer.open(write_pdf(tmp_path / "x", 1), "acme")
        (pid,) = worker_pids()
        assert "SECRET_KEY" not in psutil.Process(pid).environ()


async def draw_codes(renderer: Renderer, document: OpenedDocument) -> list[str]:
    """Of each page, one after the other, what it fails with."""
    found = []
    for page in range(document.num_pages):
        try:
            await renderer.draw(document, page)
            found.append("")
        except RenderError as error:
            found.append(error.code or "")
    return found


async def test_a_page_has_only_so_much_cpu_time_however_long_it_may_take(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(slow_pdf(1, 10**7))  # about ten seconds
    async with rendering(page_cpu_s=1, page_timeout_s=600) as renderer:
        document = await renderer.open(tmp_path / "x", "acme")
        with pytest.raises(RenderError) as failed:
            await renderer.draw(document, 0)
        assert (failed.value.code, "CPU time" in failed.value.message) == ("render_timeout", True)
        assert 1 <= document.effort.cpu_s <= 5
        assert renderer.queue.find_allowance("acme") <= 59
        fine = await renderer.open(write_pdf(tmp_path / "fine", 1), "acme")
        assert (await draw_codes(renderer, fine)) == [""]


async def test_what_waits_for_a_worker_has_no_time_running(tmp_path: Path) -> None:
    """A page's time begins with its turn: others' slow pages do not use it up."""
    async with rendering(page_timeout_s=2) as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 1, (50, 50)), "acme")
        async with renderer.queue.place("other"):
            page = asyncio.create_task(renderer.draw(document, 0))
            await asyncio.sleep(2.2)
            assert not page.done()
        assert (await page).width == 100


async def test_a_document_that_loses_its_workers_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(slow_pdf(9, 10**7))
    async with rendering(max_lost_pages=2) as renderer:
        document = await renderer.open(tmp_path / "x", "acme")
        renderer.settings = renderer.settings.model_copy(update={"page_timeout_s": 0.4})
        codes = await draw_codes(renderer, document)
    assert codes == ["render_timeout"] * 2 + ["document_too_costly"] * 7


async def test_a_document_that_was_given_up_waits_for_no_turn(tmp_path: Path) -> None:
    async with rendering(max_lost_pages=2) as renderer:
        document = await renderer.open(write_pdf(tmp_path / "x", 1), "acme")
        document.effort.num_lost = 2
        async with renderer.queue.place("other"):
            with pytest.raises(RenderError) as failed:
                await renderer.draw(document, 0)
    assert failed.value.code == "document_too_costly"


async def test_a_document_has_only_so_much_cpu_time(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(slow_pdf(50, 10**5))
    async with rendering(document_cpu_s=1) as renderer:
        codes = await draw_codes(renderer, await renderer.open(tmp_path / "x", "acme"))
        fine = await draw_codes(renderer, await renderer.open(write_pdf(tmp_path / "fine", 1), "acme"))
    assert 1 <= codes.count("") <= 49
    assert codes == [""] * codes.count("") + ["document_too_costly"] * (50 - codes.count(""))
    assert fine == [""]
