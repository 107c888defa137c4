"""Both clients against a service on a socket."""

from __future__ import annotations

import asyncio
import base64
import inspect
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ocr_service_double import OcrDouble, run_double
from support.papers import write_pdf

from serving.ocr_api.shapes import DocumentStarted, JobStatus, PageDelta, PageFinished, ResultFinished, read_event
from serving.ocr_client.client import AsyncOcrClient, Document, OcrClient, ReadOptions, RetryPolicy
from serving.ocr_client.errors import (
    BadAnswerError,
    BusyError,
    ConnectionLostError,
    KeyRefusedError,
    NotFoundError,
    QuotaError,
    RequestRefusedError,
    ServiceError,
    from_answer,
    from_httpx,
)

NANO = ReadOptions("nano")
QUICK = RetryPolicy(max_wait_s=10, first_pause_s=0.01, max_pause_s=0.05)
ONCE = RetryPolicy(max_wait_s=0)
BUSY = (429, {"retry-after": "1", "retry-after-ms": "300"}, {"message": "later", "code": "rate_limit_exceeded"})


class Both:
    """The calls of either client, made from a thread without an event loop."""

    def __init__(self, url: str, is_async: bool, **settings: Any) -> None:
        self.url, self.is_async, self.settings = url, is_async, {"retry": QUICK, **settings}

    def call(self, name: str, *arguments: Any, **more: Any) -> Any:
        if self.is_async:
            return asyncio.run(self._call(name, *arguments, **more))
        with OcrClient(self.url, **self.settings) as client:
            result = getattr(client, name)(*arguments, **more)
            return list(result) if isinstance(result, Iterator) else result

    async def _call(self, name: str, *arguments: Any, **more: Any) -> Any:
        async with AsyncOcrClient(self.url, **self.settings) as client:
            result = getattr(client, name)(*arguments, **more)
            if isinstance(result, AsyncIterator):
                return [item async for item in result]
            return await result


@pytest.fixture
def service() -> Iterator[OcrDouble]:
    with run_double() as double:
        yield double


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, service: OcrDouble) -> Both:
    return Both(service.url, request.param)


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    return write_pdf(tmp_path / "paper.pdf", 3)


def test_the_two_clients_have_the_same_calls() -> None:
    def requests(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    assert requests(OcrClient) == requests(AsyncOcrClient)


def test_a_document_is_read(client: Both, paper: Path) -> None:
    result = client.call("read", paper, NANO)
    assert [page.content for page in result.pages] == ["# Page 1", "# Page 2", "# Page 3"]
    assert result.content == "# Page 1\n\n# Page 2\n\n# Page 3"
    assert result.usage.prompt_tokens_details.image_tokens == 3 * 73
    assert result.usage.estimated_cost == pytest.approx(3e-5)


def test_every_kind_of_source_is_sent(client: Both, paper: Path) -> None:
    url = f"data:application/pdf;base64,{base64.b64encode(paper.read_bytes()).decode()}"
    for source in (paper, Document(paper.read_bytes(), "x.pdf"), url):
        result = client.call("read", source, ReadOptions("nano", format="text", pages="2-3"))
        assert [page.text for page in result.pages] == ["# Page 2", "# Page 3"]


def test_a_page_that_failed_says_why(client: Both, service: OcrDouble, paper: Path) -> None:
    service.bad_pages = {2}
    result = client.call("read", paper, NANO)
    assert [page.is_completed for page in result.pages] == [True, False, True]
    assert result.pages[1].error.code == "damaged_page"


def test_pages_arrive_as_events(client: Both, paper: Path) -> None:
    events = client.call("stream", paper, ReadOptions("nano", format="layout"))
    assert isinstance(events[0], DocumentStarted)
    assert isinstance(events[-1], ResultFinished)
    texts = "".join(event.text for event in events if isinstance(event, PageDelta) and event.index == 0)
    assert "# Page 1" in texts
    finished = [event.page for event in events if isinstance(event, PageFinished)]
    assert [block.label for block in finished[0].blocks or ()] == ["title", "text"]


def test_a_stream_that_breaks_off_is_told_and_not_begun_again(client: Both, service: OcrDouble, paper: Path) -> None:
    service.breaks_after = 3
    with pytest.raises(ConnectionLostError) as failed:
        client.call("stream", paper, NANO)
    assert failed.value.was_sent
    assert service.requests == [("POST", "/v1/ocr")]


def test_an_event_of_a_newer_service_is_passed_over() -> None:
    assert read_event({"type": "page.weighed", "index": 0}) is None
    assert read_event({"type": "page.delta", "index": 0, "text": "a", "more": 1}) == PageDelta(
        type="page.delta", index=0, text="a"
    )


def test_a_refusal_is_waited_out_as_long_as_the_service_asks(client: Both, service: OcrDouble, paper: Path) -> None:
    service.refusals = [BUSY, BUSY]
    began_s = time.monotonic()
    assert len(client.call("read", paper, NANO).pages) == 3
    assert time.monotonic() - began_s >= 0.6
    assert len(service.requests) == 3


def test_a_wait_longer_than_allowed_is_not_begun(client: Both, service: OcrDouble, paper: Path) -> None:
    service.refusals = [(503, {"retry-after": "100"}, {"message": "full", "code": "overloaded"})]
    with pytest.raises(BusyError) as refused:
        client.call("read", paper, NANO)
    assert (refused.value.status, refused.value.retry_after_s) == (503, 100)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "unsupported_document", RequestRefusedError),
        (401, "invalid_api_key", KeyRefusedError),
        (404, "model_not_found", NotFoundError),
        (413, "request_too_large", RequestRefusedError),
        (429, "insufficient_quota", QuotaError),
    ],
)
def test_what_waiting_does_not_mend_is_not_tried_again(
    client: Both, service: OcrDouble, paper: Path, status: int, code: str, kind: type[RequestRefusedError]
) -> None:
    service.refusals = [(status, {}, {"message": "no", "code": code, "param": "document"})] * 2
    with pytest.raises(kind) as refused:
        client.call("read", paper, NANO)
    assert (refused.value.status, refused.value.code, refused.value.param) == (status, code, "document")
    assert len(service.requests) == 1


def test_a_whole_document_is_not_paid_twice_but_a_question_is_asked_again(
    client: Both, service: OcrDouble, paper: Path
) -> None:
    broken: tuple[int, dict[str, str], dict[str, Any]] = (500, {}, {"message": "oh", "code": "internal_error"})
    service.refusals = [broken]
    with pytest.raises(ServiceError):
        client.call("read", paper, NANO)
    service.refusals = [broken]
    assert client.call("jobs").data == ()


def test_the_key_is_sent(service: OcrDouble) -> None:
    service.key = "sk-1"
    for is_async in (False, True):
        assert Both(service.url, is_async, api_key="sk-1").call("models") == ["nano"]
        with pytest.raises(KeyRefusedError):
            Both(service.url, is_async).call("models")


def test_a_job_is_followed_page_by_page(client: Both, service: OcrDouble, paper: Path) -> None:
    service.page_s, service.bad_pages = 0.1, {2}
    job = client.call("submit", paper, NANO, idempotency_key="a")
    assert not job.status.is_over
    pages = client.call("follow", job.id, poll_s=0.05)
    assert [(page.seq, page.number, page.is_completed) for page in pages] == [(1, 1, True), (2, 2, False), (3, 3, True)]
    ended = client.call("job", job.id)
    assert (ended.status, ended.pages_done, ended.pages_failed) == (JobStatus.COMPLETED, 3, 1)
    assert [page.number for page in client.call("follow", job.id, after=2)] == [3]
    assert client.call("job_pages", job.id, limit=2).has_more


def test_a_job_that_is_submitted_again_is_the_first_one(client: Both, service: OcrDouble, paper: Path) -> None:
    first, second = (client.call("submit", paper, NANO, idempotency_key="a") for _ in range(2))
    other = client.call("submit", paper, NANO)
    assert first.id == second.id != other.id
    assert [job.id for job in client.call("jobs").data] == [other.id, first.id]


def test_a_job_can_be_cancelled_and_deleted(client: Both, service: OcrDouble, paper: Path) -> None:
    service.page_s = 1
    job = client.call("submit", paper, NANO)
    assert client.call("cancel", job.id).status == JobStatus.CANCELLED
    client.call("delete", job.id)
    with pytest.raises(NotFoundError):
        client.call("job", job.id)


def test_a_service_that_restarts_is_waited_for(client: Both, service: OcrDouble, paper: Path) -> None:
    service.page_s = 0.2
    job = client.call("submit", paper, NANO)
    service.stop()
    again = threading.Timer(0.5, service.start)
    again.start()
    pages = client.call("follow", job.id, poll_s=0.05)
    again.join()
    assert [page.number for page in pages] == [1, 2, 3]
    assert set(service.reads.values()) == {1}


def test_nobody_there_is_told(tmp_path: Path, paper: Path) -> None:
    with run_double() as gone:
        url = gone.url
    for is_async in (False, True):
        with pytest.raises(ConnectionLostError) as failed:
            Both(url, is_async, retry=ONCE).call("read", paper, NANO)
        assert not failed.value.was_sent


@pytest.mark.parametrize(("status", "kind"), [(404, BadAnswerError), (200, BadAnswerError), (502, ServiceError)])
def test_something_else_at_the_address_is_told(status: int, kind: type[Exception], paper: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text="<html>"))
    with OcrClient(transport=transport, retry=ONCE) as client, pytest.raises(kind):
        client.read(paper, NANO)


def test_an_error_in_a_stream_ends_it() -> None:
    assert isinstance(from_answer(200, {"error": {"message": "gone", "code": "no_replica"}}), ServiceError)


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(httpx.TransportError), key=repr))
def test_every_failure_of_the_transport_becomes_ours(kind: type[httpx.TransportError], paper: Path) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise kind("x")

    with OcrClient(transport=httpx.MockTransport(fail), retry=ONCE) as client, pytest.raises(ConnectionLostError):
        client.read(paper, NANO)
    assert from_httpx(kind("x")).was_sent == (kind not in (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
