"""The service over HTTP, against a real router with scripted engines."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import orjson
from support.ocr_service import run_service
from support.papers import write_image, write_pdf


def read_events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else orjson.loads(line) for line in lines]


async def test_a_form_is_read_page_by_page(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 3).read_bytes()
    async with run_service(tmp_path) as service:
        answer = await service.upload(pdf, format="text", mode="tiny")
        found = answer.json()
        assert answer.status_code == 200, answer.text
        assert found["document"] == {"format": "pdf", "num_pages": 3, "size_bytes": len(pdf)}
        assert [page["text"] for page in found["pages"]] == ["Hello page"] * 3
        assert [page["number"] for page in found["pages"]] == [1, 2, 3]
        assert found["pages"][0]["dimensions"] == {"width": 1190, "height": 1684, "dpi": 144}
        page = found["pages"][1]
        assert (page["status"], page["mode"], page["finish_reason"], page["retries"]) == (
            "completed",
            "tiny",
            "stop",
            0,
        )
        each = page["usage"]["estimated_cost"]
        assert each == (80 * 30 + 10 * 100) / 10**9
        assert found["usage"]["estimated_cost"] == 3 * (80 * 30 + 10 * 100) / 10**9
        assert found["usage"]["prompt_tokens_details"] == {"image_tokens": 219}
        assert (found["usage"]["pages_processed"], found["usage"]["pages_failed"]) == (3, 0)


async def test_json_brings_the_document_as_a_data_url(tmp_path: Path) -> None:
    png = write_image(tmp_path / "x.png", "PNG").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    async with run_service(tmp_path) as service:
        for document in (
            {"type": "image_url", "image_url": url},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "document_url", "document_url": url},
            {"type": "file", "file": base64.b64encode(png).decode(), "file_name": "x.png"},
        ):
            answer = await service.client.post("/v1/openai/ocr", json={"model": "nano", "document": document})
            assert answer.status_code == 200, answer.text
            assert answer.json()["pages"][0]["markdown"] == "Hello page"
            assert answer.json()["pages"][0]["dimensions"]["dpi"] is None


async def test_a_stream_tells_each_page_as_it_comes(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 2).read_bytes()
    async with run_service(tmp_path) as service:
        answer = await service.upload(pdf, stream="true")
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = read_events(answer.text)
    assert events[0]["type"] == "document"
    assert events[0]["pages"] == [0, 1]
    assert events[-1] == "[DONE]"
    assert events[-2]["type"] == "result"
    assert events[-2]["usage"]["pages_processed"] == 2
    for index in (0, 1):
        mine = [event for event in events[1:-2] if event["index"] == index]
        assert [event["type"] for event in mine] == ["page.started", "page.delta", "page.delta", "page.completed"]
        assert "".join(event["text"] for event in mine[1:3]) == mine[3]["page"]["markdown"] == "Hello page"


async def test_a_job_is_read_while_nobody_waits(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 5).read_bytes()
    async with run_service(tmp_path) as service:
        answer = await service.upload(pdf, "/v1/ocr/jobs", pages="2-4")
        assert answer.status_code == 202, answer.text
        job = await service.wait_for(answer.json()["id"], "completed", "failed")
        assert (job["status"], job["pages_total"], job["pages_done"], job["pages_failed"]) == ("completed", 3, 3, 0)
        assert job["usage"]["estimated_cost"] == 3 * (80 * 30 + 10 * 100) / 10**9
        found = (await service.client.get(f"/v1/ocr/jobs/{job['id']}/pages?limit=2")).json()
        assert [page["seq"] for page in found["data"]] == [1, 2]
        assert found["has_more"]
        rest = (await service.client.get(f"/v1/ocr/jobs/{job['id']}/pages?after=2")).json()
        assert sorted(page["number"] for page in [*found["data"], *rest["data"]]) == [2, 3, 4]
        assert not rest["has_more"]


async def test_a_stream_shows_the_pages_as_they_were_drawn(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 22).read_bytes()
    async with run_service(tmp_path) as service:
        answer = await service.upload(pdf, stream="true", include_page_images="true", dpi="18")
        whole = await service.upload(pdf, include_page_images="true", dpi="18", pages="1")
    assert whole.status_code == 200  # nothing to show in an answer that comes at the end
    events = read_events(answer.text)
    drawn = [event for event in events[:-1] if event["type"] == "page.image"]
    assert sorted(event["index"] for event in drawn) == list(range(20))
    assert all((event["width"], event["height"]) == (149, 211) for event in drawn)
    assert base64.b64decode(drawn[0]["image_url"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    mine = [event["type"] for event in events[1:-2] if event["index"] == 0]
    assert mine[:3] == ["page.started", "page.image", "page.delta"]


async def test_models_are_the_routers(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        answer = await service.client.get("/v1/models")
        assert answer.status_code == 200
        assert "nano" in {model["id"] for model in answer.json()["data"]}
        refused = await service.client.get("/v1/models", headers={"authorization": "Basic x"})
        assert refused.status_code == 401
