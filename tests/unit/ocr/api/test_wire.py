"""Every kind of answer, character for character as clients of earlier versions know it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import httpx
import pypdfium2
from support.ocr_service import RunningService, build_service_settings, reads, run_host
from support.papers import A4
from support.router_stack import Engine, build_settings, run_router

ANSWERS = Path(__file__).with_name("wire_answers.json")
"""What `collect` found in the version that built its answers from dictionaries, and fields that were added since."""
TEXT = (
    "<|ref|>title<|/ref|><|det|>[[0,0,999,90]]<|/det|>\n# Two\n\n"
    "<|ref|>image<|/ref|><|det|>[[100,100,110,105]]<|/det|>\n\nfree “text”"
)
CONFIG = (("base_size", 1024), ("image_size", 640), ("crop_mode", True))
_VARIES = (
    (re.compile(r'"id":"ocr-[0-9a-f]+"'), '"id":"ocr-1"'),
    (re.compile(r'"id":"job-[0-9a-f]+"'), '"id":"job-1"'),
    (re.compile(r'"(created|created_at|started_at|finished_at|expires_at)":[0-9]{9,}'), r'"\1":1'),
    (re.compile(r'"(message|price_version)":"[^"]*"'), r'"\1":"x"'),
    (re.compile(r'"(doc_)?size_bytes":[0-9]+'), r'"\1size_bytes":1'),
    (re.compile(r'"image_base64":"[A-Za-z0-9+/=]+"'), '"image_base64":"iVBO"'),
    (re.compile(r'"image_url":"data:image/png;base64,[A-Za-z0-9+/=]+"'), '"image_url":"data:image/png;base64,iVBO"'),
)


def write_uneven_pdf(file: Path) -> bytes:
    """Two pages, the second one too large to be drawn."""
    document = pypdfium2.PdfDocument.new()
    for size in (A4, (200_000, 200_000)):
        document.new_page(*size).close()
    document.save(file)
    document.close()
    return file.read_bytes()


async def collect(folder: Path) -> dict[str, str]:
    """Bodies of all kinds of answers, without what differs from run to run."""
    settings = build_service_settings(folder, pages_in_parallel=1)
    async with (
        Engine(reads(TEXT), max_num_seqs=4) as engine,
        run_router(dataclasses.replace(engine.record, image_config=CONFIG), settings=build_settings()) as router,
        run_host(settings, router.port) as (host, client),
    ):
        service = RunningService(host, client, router, engine, settings)
        pdf, found = write_uneven_pdf(folder / "x.pdf"), dict[str, httpx.Response]()

        async def upload(path: str, **fields: str) -> httpx.Response:
            return await service.upload(pdf, path, **{"mode": "tiny", **fields})

        found["layout"] = await upload("/v1/ocr", format="layout", include_images="true")
        found["text"] = await upload("/v1/ocr", format="text", pages="1")
        found["stream"] = await upload("/v1/ocr", stream="true", include_page_images="true")
        found["quote"] = await upload("/v1/ocr/quote")
        found["refused option"] = await upload("/v1/ocr", dpi="7")
        found["submitted"] = await upload("/v1/ocr/jobs", format="layout", include_images="true", dpi="100")
        job_id = found["submitted"].json()["id"]
        await service.wait_for(job_id, "completed", "failed")
        path = f"/v1/ocr/jobs/{job_id}"
        found["job"], found["pages"] = await client.get(path), await client.get(f"{path}/pages")
        found["jobs"] = await client.get("/v1/ocr/jobs")
        job_id = (await upload("/v1/ocr/jobs", model="none")).json()["id"]
        await service.wait_for(job_id, "failed")
        found["failed job"] = await client.get(f"/v1/ocr/jobs/{job_id}")
        return {name: normalise(answer.text) for name, answer in found.items()}


def normalise(text: str) -> str:
    for pattern, constant in _VARIES:
        text = pattern.sub(constant, text)
    return text


async def test_answers_are_what_they_were_before_the_shapes_were_models(tmp_path: Path) -> None:
    expected: dict[str, str] = json.loads(ANSWERS.read_text())
    answers = await collect(tmp_path)
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        assert answer == expected[name], name
