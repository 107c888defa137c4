"""Documents by URL, over HTTP: by the same rules as the router's remote images, from a server of our own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from support.ocr_service import RunningService, run_service
from support.papers import office_file, write_pdf

from serving.http.addresses import is_public_address
from serving.http.fetching import Fetcher
from serving.settings.router import RemoteImageSettings
from unit.router.request.test_remote_images import (
    Handler,
    answer_compressed,
    answer_error,
    answer_less_than_announced,
    answer_too_much_in_pieces,
    is_loopback,
    serve,
)


@pytest.fixture
def pdf(tmp_path: Path) -> bytes:
    return write_pdf(tmp_path / "x.pdf", 2, (100, 100)).read_bytes()


def answering(data: bytes, pause_s: float = 0.0) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/html", "set-cookie": "a=b"})
        await response.prepare(request)
        for begin in range(0, len(data), 100):
            await response.write(data[begin : begin + 100])
            await asyncio.sleep(pause_s)
        return response

    return answer


@contextlib.asynccontextmanager
async def service_that_fetches(
    folder: Path, *hosts: str, check_address: Callable[[str], bool] = is_loopback, most: int = 10**8, **remote: Any
) -> AsyncIterator[RunningService]:
    settings = RemoteImageSettings(enabled=True, hosts=hosts, **{"timeout_s": 2.0, **remote})
    async with run_service(folder, remote_documents=settings.model_dump(), max_document_bytes=most) as service:
        uploads = service.host.service.uploads
        await uploads.fetcher.close()
        uploads.fetcher = Fetcher(settings, "application/pdf", "test", check_address)
        await uploads.fetcher.start()
        yield service


async def ask(service: RunningService, url: str, path: str = "/v1/ocr", **fields: Any) -> httpx.Response:
    body = {"model": "nano", "document": {"type": "document_url", "document_url": url}, **fields}
    return await service.client.post(path, json=body)


async def assert_not_fetched(service: RunningService, url: str) -> str:
    answer = await ask(service, url)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "document_fetch_failed"), answer.text
    assert error["param"] == "document.document_url"
    assert service.engine.asked == []
    assert not list((service.settings.ocr.directory / "uploads").iterdir())
    return str(error["message"])


async def test_nothing_is_fetched_unless_the_operator_says_so(tmp_path: Path, pdf: bytes) -> None:
    async def answer(request: web.Request) -> web.Response:
        raise AssertionError("was asked")

    async with serve(answer) as port, run_service(tmp_path) as service:
        for path in ("/v1/ocr", "/v1/ocr/jobs", "/v1/ocr/quote"):
            refused = await ask(service, f"http://127.0.0.1:{port}/x.pdf", path)
            assert refused.status_code == 400
            assert "Fetching documents from URLs is disabled" in refused.json()["error"]["message"]


async def test_a_document_is_fetched_and_read(tmp_path: Path, pdf: bytes) -> None:
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        return await answering(pdf)(request)

    async with serve(answer) as port, service_that_fetches(tmp_path, f"127.0.0.1:{port}") as service:
        url = f"http://127.0.0.1:{port}/paper.pdf?x=%20y"
        read = await ask(service, url)
        assert read.json()["document"] == {"format": "pdf", "num_pages": 2, "size_bytes": len(pdf)}
        assert [page["status"] for page in read.json()["pages"]] == ["completed"] * 2
        document = {"type": "image_url", "image_url": {"url": url}}
        assert (await service.client.post("/v1/ocr", json={"model": "nano", "document": document})).status_code == 200
        job = (await ask(service, url, "/v1/ocr/jobs")).json()
        assert (await service.wait_for(job["id"], "completed"))["pages_done"] == 2
        assert not list((tmp_path / "ocr" / "uploads").iterdir())
    assert [request.raw_path for request in asked] == ["/paper.pdf?x=%20y"] * 3
    # What the service's client has is not for others.
    assert not any(name in request.headers for request in asked for name in ("authorization", "cookie"))


async def test_redirects_are_followed_within_the_list_only(tmp_path: Path, pdf: bytes) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        to = {"/1": "/x.pdf", "/2": "/1", "/3": "/2", "/out": f"http://localhost:{port}/x.pdf", "/file": "file:///etc"}
        if request.path in to:
            return web.Response(status=302, headers={"location": to[request.path]})
        return await answering(pdf)(request)

    async with serve(answer) as port, service_that_fetches(tmp_path, f"127.0.0.1:{port}", max_redirects=2) as service:
        for path in ("/3", "/out", "/file"):
            await assert_not_fetched(service, f"http://127.0.0.1:{port}{path}")
        assert (await ask(service, f"http://127.0.0.1:{port}/2")).status_code == 200


PRIVATE = (
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",
    "http://127.1:{port}/",
    "http://a@127.0.0.1:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/",
    "/etc/passwd",
)


async def test_private_addresses_are_refused_whatever_the_list_says(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        raise AssertionError("was asked")

    async with (
        serve(answer) as port,
        service_that_fetches(tmp_path, "*", f"*:{port}", check_address=is_public_address) as service,
    ):
        for url in PRIVATE:
            await assert_not_fetched(service, url.format(port=port))


async def test_a_name_is_looked_up_once_and_every_address_checked(
    tmp_path: Path, pdf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = [["127.0.0.1", "127.0.0.3"], ["127.0.0.1"], ["127.0.0.3"]]
    look_up = asyncio.get_running_loop().getaddrinfo

    async def resolve(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        if not host.endswith("example.com"):
            return await look_up(host, port, **options)
        return [(2, 1, 6, "", (address, port)) for address in lookups.pop(0)]

    async with serve(answering(pdf)) as port, service_that_fetches(tmp_path, f"papers.example.com:{port}") as service:
        monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", resolve)
        await assert_not_fetched(service, f"http://papers.example.com:{port}/x.pdf")
        assert (await ask(service, f"http://papers.example.com:{port}/x.pdf")).status_code == 200
        assert len(lookups) == 1, "a name server that answers differently the second time is not asked a second time"


async def test_what_comes_is_bounded_in_size_and_time(tmp_path: Path) -> None:
    answers = {
        "error": answer_error,
        "compressed": answer_compressed,
        "endless": answer_too_much_in_pieces,
        "short": answer_less_than_announced,
        "slow": answering(b"%PDF-1.7" + bytes(1000), pause_s=0.2),
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        return await answers[request.path[1:]](request)

    async with (
        serve(answer) as port,
        service_that_fetches(tmp_path, f"127.0.0.1:{port}", max_bytes=2048, timeout_s=0.5) as service,
        asyncio.timeout(10),
    ):
        for name in answers:
            await assert_not_fetched(service, f"http://127.0.0.1:{port}/{name}")


async def test_a_fetched_document_is_one_like_any_other(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await answering(office_file() if request.path == "/office" else bytes(4000))(request)

    async with serve(answer) as port, service_that_fetches(tmp_path, f"127.0.0.1:{port}", most=2048) as service:
        office = await ask(service, f"http://127.0.0.1:{port}/office")
        assert office.json()["error"]["code"] == "unsupported_document"
        assert (await ask(service, f"http://127.0.0.1:{port}/large")).status_code == 413


async def test_why_it_failed_is_nobodys_business(tmp_path: Path) -> None:
    async with service_that_fetches(tmp_path, "*", "*:1", check_address=is_public_address) as service:
        refused = await assert_not_fetched(service, "http://10.0.0.1/")
        assert await assert_not_fetched(service, "http://127.0.0.1:1/") == refused
    assert "10.0" not in refused
