"""What the API says of documents that are not as they should be: warnings, passwords, text layers, strips."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
import pikepdf
import pybase64
from PIL import Image
from support.ocr_service import RunningService, reads, run_service
from support.papers import write_pdf
from support.router_stack import Exchange

from serving.billing.schema import JOBS
from serving.ocr.text.comparison import compare_texts
from serving.ocr_api.shapes import ErrorDetail, OcrPage
from serving.ocr_client.bulk_results import OutputFormat, ResultFacts, render
from unit.ocr.jobs.test_jobs import rows_of
from unit.ocr.rendering.test_real_files import DAMAGED, PDF, TEXT, build_pdf


def counted(service: RunningService, kind: str) -> float:
    lines = service.host.service.metrics.render().decode().splitlines()
    name = f'serving_ocr_page_warnings_total{{kind="{kind}"}}'
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), 0.0)


def locked() -> bytes:
    out = io.BytesIO()
    with pikepdf.open(io.BytesIO(PDF)) as document:
        document.save(out, encryption=pikepdf.Encryption(user="geheim", owner="boss"))
    return out.getvalue()


async def read_page(service: RunningService, data: bytes, **fields: Any) -> dict[str, Any]:
    answer = await service.upload(data, **fields)
    assert answer.status_code == 200, answer.text
    (page,) = answer.json()["pages"]
    return page


async def test_a_warning_is_on_its_page_and_counted(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        page = await read_page(service, DAMAGED["without its trailer"])
        assert page["status"] == "completed"
        assert [warning["code"] for warning in page["warnings"]] == ["damaged"]
        assert counted(service, "damaged") == 1
        assert "warnings" not in await read_page(service, PDF)


async def test_a_password_opens_a_document_and_is_kept_sealed_while_its_job_is_open(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        for given, code in ({}, "encrypted_document"), ({"password": "x"}, "wrong_password"):
            refused = (await service.upload(locked(), **given)).json()["error"]
            assert refused["code"] == code
        assert refused["param"] == "password"
        assert (await read_page(service, locked(), password="geheim"))["status"] == "completed"
        job = (await service.upload(locked(), "/v1/ocr/jobs", password="geheim")).json()
        assert "password" not in job["options"]
        (row,) = await rows_of(service.settings.billing, JOBS)
        assert "geheim" not in str(row)
        done = await service.wait_for(job["id"], "completed", "failed")
        assert (done["status"], done["pages_failed"]) == ("completed", 0)
        (row,) = await rows_of(service.settings.billing, JOBS)
        assert row.sealed_key == ""


async def test_a_text_layer_costs_nothing_where_it_is_the_page(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        page = await read_page(service, PDF, text_layer="prefer", format="layout")
        assert (page["markdown"], page["source"], page["usage"]["completion_tokens"]) == (
            "Total 12.50", "text_layer", 0,
        )  # fmt: skip
        (block,) = page["blocks"]
        left, top, right, bottom = block["boxes"][0]
        assert 30 < left < right < 400
        assert 50 < top < bottom < 140
        assert service.engine.asked == []
        quote = (await service.upload(PDF, "/v1/ocr/quote", text_layer="prefer")).json()
        assert quote["cost_dollars"]["most"] in ("0", "0.000000000")
        beside = build_pdf(f"{TEXT} 100 5 90 90 re f")
        page = await read_page(service, beside, text_layer="prefer")
        assert (page["markdown"], [warning["code"] for warning in page["warnings"]]) == (
            "Hello page", ["text_layer_unused"],
        )  # fmt: skip
        assert len(service.engine.asked) == 1


async def test_a_text_layer_is_compared_with_the_reading(tmp_path: Path) -> None:
    async with run_service(tmp_path, reads("Total 17.50")) as service:
        page = await read_page(service, PDF, text_layer="verify")
        assert page["markdown"] == "Total 17.50"
        assert page["text_layer"] == {"agreement": 0.5, "differences": [{"layer": "12.50", "read": "17.50"}]}
        assert [warning["code"] for warning in page["warnings"]] == ["text_layer_differs"]


def test_texts_are_compared_by_their_words() -> None:
    same = compare_texts("The  total,\nis 12.50", "the total is 12.50.")
    assert (same.agreement, same.differences) == (1.0, ())
    assert compare_texts("", "").agreement == 1.0
    assert compare_texts("a", "").agreement == 0.0
    many = compare_texts(" ".join(f"same w{n}" for n in range(100)), " ".join(f"same v{n}" for n in range(100)))
    assert len(many.differences) == 20


async def test_a_strip_is_read_part_by_part_and_its_boxes_are_those_of_the_page(tmp_path: Path) -> None:
    heights: list[int] = []

    async def script(exchange: Exchange) -> None:
        url = orjson.loads(exchange.asked.body)["messages"][0]["content"][0]["image_url"]["url"]
        heights.append(Image.open(io.BytesIO(pybase64.b64decode(url.split(",")[1]))).height)
        text = f"<|ref|>text<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>\nPart {len(heights)}"
        await reads(text)(exchange)

    strip = write_pdf(tmp_path / "x.pdf", 1, (100, 900)).read_bytes()
    async with run_service(tmp_path, script) as service:
        page = await read_page(service, strip, format="layout")
        assert page["markdown"] == "\n\n".join(f"Part {number}" for number in range(1, 6))
        assert (page["retries"], page["usage"]["completion_tokens"]) == (0, 50)
        assert [warning["code"] for warning in page["warnings"]] == ["cut_into_parts"]
        edges = [block["boxes"][0] for block in page["blocks"]]
        assert [edge[3] - edge[1] for edge in edges] == heights
        assert (edges[0][1], edges[-1][3], sum(heights)) == (0, 1800, 1800)
        quote = (await service.upload(strip, "/v1/ocr/quote")).json()
        one = (await service.upload(PDF, "/v1/ocr/quote")).json()
        assert quote["completion_tokens"]["most"] == 5 * one["completion_tokens"]["most"] > 0


async def test_a_page_comes_as_a_document_of_its_own_with_its_words_in_place(tmp_path: Path) -> None:
    async with run_service(tmp_path, reads("Total 12.50")) as service:
        page = await read_page(service, PDF, format="hocr")
        assert "markdown" not in page
        boxes = re.findall(r'ocrx_word" title="bbox (\d+) (\d+) (\d+) (\d+)">([^<]*)<', page["hocr"])
        assert [word for *_, word in boxes] == ["Total", "12.50"]
        assert 38 < int(boxes[0][0]) < 50 < int(boxes[1][0]) < int(boxes[1][2]) < 300
        assert 'CONTENT="12.50" HPOS=' in (await read_page(service, PDF, format="alto"))["alto"]
        assert "<p>Total 12.50</p>" in (await read_page(service, PDF, format="html"))["html"]
        found = await read_page(service, PDF, format="pdf")
        with pikepdf.open(io.BytesIO(pybase64.b64decode(found["pdf_base64"]))) as document:
            assert [float(edge) for edge in document.pages[0].MediaBox] == [0, 0, 200, 100]
        blank = write_pdf(tmp_path / "x.pdf", 1).read_bytes()
        assert 'class="ocr_par unplaced"' in (await read_page(service, blank, format="hocr"))["hocr"]


async def test_pages_of_all_formats_are_joined_by_the_client(tmp_path: Path) -> None:
    facts = ResultFacts("x.pdf", 3, "nano", None, "")
    failed = OcrPage(index=2, number=3, status="failed", error=ErrorDetail(message="no -- no"))
    async with run_service(tmp_path, reads("Total 12.50")) as service:
        for kind, mark in (
            (OutputFormat.HTML, "<section"),
            (OutputFormat.HOCR, '"ocr_page"'),
            (OutputFormat.ALTO, "<Page "),
        ):
            (page,) = (OcrPage.model_validate(await read_page(service, PDF, format=kind.page_format)),)
            joined = render(kind, facts, [page, page, failed]).decode()
            assert joined.count(mark) == 2
            assert "<!-- page 3 could not be read: no - - no -->" in joined
            assert joined.startswith(page.content[:60])
            if kind is not OutputFormat.HTML:
                ElementTree.fromstring(joined.split("\n", 1)[1])
        page = OcrPage.model_validate(await read_page(service, PDF, format="pdf"))
    with pikepdf.open(io.BytesIO(render(OutputFormat.PDF, facts, [page, page, failed]))) as document:
        assert len(document.pages) == 2


async def test_a_document_is_joined_across_its_pages(tmp_path: Path) -> None:
    two = write_pdf(tmp_path / "x.pdf", 2).read_bytes()
    async with run_service(tmp_path, reads("and so on")) as service:
        answer = (await service.upload(two, join="true")).json()
        assert answer["joined"] == [{"text": "and so on and so on", "pages": [1, 2]}]
        stream = (await service.upload(two, join="true", stream="true")).text
        assert '"joined":[{"text":"and so on and so on","pages":[1,2]}]' in stream
        assert (await service.upload(two, "/v1/ocr/jobs", join="true")).json()["error"]["param"] == "join"
        assert (await service.upload(two, join="true", format="pdf")).json()["error"]["param"] == "join"
