"""An OCR service that keeps to the contract of the real one and reads nothing: pages say their number.

It listens on a socket, can be stopped and started again with its jobs, and counts how often each page was read.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pypdfium2
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.http.server import HttpServer
from serving.web.app import build_routes

USAGE = {"prompt_tokens": 83, "completion_tokens": 30, "image_tokens": 73, "estimated_cost": 0.00001}
PIECES: tuple[str, ...] = ("<|ref|>title<|/ref|><|det|>[[100, 50, 900, 100]]<|/det|>\n", "# Page ", "{n}", "\n\n")
PIECES += ("<|ref|>text<|/ref|>", "<|det|>[[100, 150, 900, 500]]<|/det|>\n", "Read ", "by ", "nobody.")


@dataclass
class DoubleJob:
    id: str
    data: bytes
    fields: dict[str, str]
    numbers: list[int]
    status: str = "queued"
    pages: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class OcrDouble:
    key: str | None = None
    page_s: float = 0.0
    """That a page takes."""
    bad_pages: set[int] = field(default_factory=set)
    """Numbers of pages that fail."""
    refusals: list[tuple[int, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Status, headers and error of the next answers."""
    reads: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By document and page number."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    forgets_jobs: bool = False
    """Whether the first job stops after two pages, and is lost with all others as soon as a client has seen a page."""
    breaks_after: int | None = None
    """Events of a stream after which the connection ends."""
    jobs: dict[str, DoubleJob] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    port: int = 0
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._stop, started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(30)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)

    async def _serve(self, started: threading.Event) -> None:
        server = HttpServer(self.build_app(), host="127.0.0.1", port=self.port, drain_s=1)
        self.port = server.port
        await server.start()
        started.set()
        work = [
            asyncio.create_task(self._run(job)) for job in self.jobs.values() if job.status in ("queued", "running")
        ]
        await asyncio.to_thread(self._stop.wait)
        for task in work:
            task.cancel()
        await server.stop()

    def build_app(self) -> Starlette:
        job = "/v1/ocr/jobs/{id}"
        routes = [
            ("GET", "/v1/models", self.models),
            ("POST", "/v1/ocr", self.read),
            ("POST", "/v1/ocr/jobs", self.submit),
            ("GET", "/v1/ocr/jobs", self.list_jobs),
            ("GET", job, self.show_job),
            ("GET", f"{job}/pages", self.job_pages),
            ("POST", f"{job}/cancel", self.cancel),
            ("DELETE", job, self.delete),
        ]
        made = [Route(path, self._guard(handler), methods=[method]) for method, path, handler in routes]
        return Starlette(routes=[*made, *build_routes()])

    def _guard(self, handler: Any) -> Any:
        async def guarded(request: Request) -> Response:
            self.requests.append((request.method, request.url.path))
            if self.refusals:
                status, headers, error = self.refusals.pop(0)
                return JSONResponse({"error": error}, status, headers)
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return refuse(401, "There is no such key.", "invalid_api_key")
            if "id" in request.path_params and request.path_params["id"] not in self.jobs:
                return refuse(404, "There is no such job.", "not_found")
            return await handler(request)

        return guarded

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "nano", "object": "model"}]})

    async def read(self, request: Request) -> Response:
        data, fields = await take_document(request)
        if (numbers := find_pages(data, fields)) is None:
            return refuse(400, "This is no document that can be read.", "unsupported_document")
        if fields.get("stream") == "true":
            return StreamingResponse(self._stream(data, fields, numbers), media_type="text/event-stream")
        pages = [await self.read_page(fields, number) for number in numbers]
        facts = {"format": "pdf", "num_pages": len(numbers), "size_bytes": len(data)}
        answer = {"id": "ocr-1", "object": "ocr.result", "created": 1, "model": fields["model"], "document": facts}
        return JSONResponse({**answer, "pages": pages, "usage": add_up(pages)})

    async def _stream(self, data: bytes, fields: dict[str, str], numbers: list[int]) -> AsyncIterator[bytes]:
        for count, event in enumerate([e async for e in self._events(data, fields, numbers)]):
            if self.breaks_after == count:
                raise ConnectionResetError
            await asyncio.sleep(self.page_s / len(PIECES))
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _events(self, data: bytes, fields: dict[str, str], numbers: list[int]) -> AsyncIterator[dict[str, Any]]:
        facts = {"format": "pdf", "num_pages": len(numbers), "size_bytes": len(data)}
        indices = [number - 1 for number in numbers]
        yield {"type": "document", "id": "ocr-1", "model": fields["model"], "document": facts, "pages": indices}
        pages = []
        for number in numbers:
            index = {"index": number - 1}
            page = {**(await self.read_page(fields, number)), "dimensions": None}
            yield {"type": "page.started", **index, "try": 1, "mode": None}
            if fields.get("include_page_images") == "true":
                url, width, height = draw(data, number)
                page["dimensions"] = {"width": width, "height": height, "dpi": 144}
                yield {"type": "page.image", **index, "image_url": url, "width": width, "height": height}
            if page["status"] == "completed":
                for piece in PIECES if fields.get("format") == "layout" else ("# Page ", str(number)):
                    yield {"type": "page.delta", **index, "text": piece.replace("{n}", str(number))}
            pages.append(page)
            yield {"type": f"page.{page['status']}", **index, "page": page}
        yield {"type": "result", "usage": add_up(pages)}

    async def read_page(self, fields: dict[str, str], number: int) -> dict[str, Any]:
        self.reads[fields.get("name", ""), number] += 1
        common = {"index": number - 1, "number": number, "mode": fields.get("mode", "tiny"), "retries": 0}
        common["dimensions"] = {"width": 512, "height": 512, "dpi": 144}
        if number in self.bad_pages:
            error = {"message": "The page is damaged.", "type": "invalid_request_error", "param": None}
            nothing = dict.fromkeys(USAGE, 0)
            return {**common, "status": "failed", "usage": nothing, "error": {**error, "code": "damaged_page"}}
        done = {**common, "status": "completed", "finish_reason": "stop", "usage": USAGE, "error": None}
        if fields.get("format") == "layout":
            blocks = [{"label": "title", "text": f"# Page {number}", "boxes": [[51, 26, 461, 51]]}]
            blocks.append({"label": "text", "text": "Read by nobody.", "boxes": [[51, 77, 461, 256]]})
            done["blocks"] = blocks
        return {**done, "text" if fields.get("format") == "text" else "markdown": f"# Page {number}"}

    async def submit(self, request: Request) -> Response:
        data, fields = await take_document(request)
        if (numbers := find_pages(data, fields)) is None:
            return refuse(400, "This is no document that can be read.", "unsupported_document")
        key = request.headers.get("idempotency-key", "")
        job = self.jobs.get(self.keys.get(key, ""))
        if job is None:
            # Never that of a job that was deleted: whoever still asks for a job would be given another's pages.
            job = DoubleJob(f"job-{next(self._numbers)}", data, fields, numbers)
            self.jobs[job.id] = job
            self.keys[key] = job.id
            self._task = asyncio.create_task(self._run(job))
        return JSONResponse(describe(job), 202)

    async def _run(self, job: DoubleJob) -> None:
        job.status = "running"
        done = {page["number"] for page in job.pages}
        for number in job.numbers:
            if self.forgets_jobs and len(job.pages) == 2:
                return
            if number not in done and job.status == "running" and not self._stop.is_set():
                await asyncio.sleep(self.page_s)
                if job.status == "running" and not self._stop.is_set():
                    page = await self.read_page(job.fields, number)
                    job.pages.append({**page, "seq": len(job.pages) + 1})
        if job.status == "running" and len(job.pages) == len(job.numbers):
            job.status = "completed"

    async def list_jobs(self, request: Request) -> Response:
        found = [describe(job) for job in reversed(self.jobs.values())]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def show_job(self, request: Request) -> Response:
        return JSONResponse(describe(self.jobs[request.path_params["id"]]))

    async def job_pages(self, request: Request) -> Response:
        after, limit = (int(request.query_params[name]) for name in ("after", "limit"))
        found = [page for page in self.jobs[request.path_params["id"]].pages if page["seq"] > after]
        if self.forgets_jobs and found:
            self.forgets_jobs = False
            self.jobs.clear()
            self.keys.clear()
        return JSONResponse({"object": "list", "data": found[:limit], "has_more": len(found) > limit})

    async def cancel(self, request: Request) -> Response:
        job = self.jobs[request.path_params["id"]]
        job.status = "cancelled"
        return JSONResponse(describe(job))

    async def delete(self, request: Request) -> Response:
        self.jobs.pop(request.path_params["id"])
        return Response(status_code=204)


@contextlib.contextmanager
def run_double(**settings: Any) -> Iterator[OcrDouble]:
    double = OcrDouble(**settings)
    double.start()
    try:
        yield double
    finally:
        double.stop()


def refuse(status: int, message: str, code: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": code}}, status)


async def take_document(request: Request) -> tuple[bytes, dict[str, str]]:
    if request.headers["content-type"].startswith("application/json"):
        body = await request.json()
        url = body.pop("document")["document_url"]
        fields = {name: str(value).lower() if value is True else str(value) for name, value in body.items()}
        return base64.b64decode(url.split(",", 1)[1]), fields
    async with request.form() as form:
        upload: Any = form["file"]
        fields = {name: str(value) for name, value in form.items() if name != "file"}
        return await upload.read(), {**fields, "name": upload.filename}


def find_pages(data: bytes, fields: dict[str, str]) -> list[int] | None:
    if data.startswith(b"%PDF"):
        with contextlib.closing(pypdfium2.PdfDocument(data)) as document:
            num_pages = len(document)
    elif data.startswith(b"\x89PNG"):
        num_pages = 1
    else:
        return None
    chosen: list[int] = []
    for part in fields.get("pages", f"1-{num_pages}").split(","):
        first, _, last = part.partition("-")
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def draw(data: bytes, number: int) -> tuple[str, int, int]:
    if data.startswith(b"%PDF"):
        with contextlib.closing(pypdfium2.PdfDocument(data)) as document:
            image = document[number - 1].render(scale=2).to_pil()
    else:
        image = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width, image.height


def add_up(pages: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(page["usage"][name] for page in pages) for name in USAGE}
    image_tokens = total.pop("image_tokens")
    counts = Counter(page["status"] for page in pages)
    return {
        **total,
        "total_tokens": total["prompt_tokens"] + total["completion_tokens"],
        "prompt_tokens_details": {"image_tokens": image_tokens},
        "pages_processed": counts["completed"],
        "pages_failed": counts["failed"],
    }


def describe(job: DoubleJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "ocr.job",
        "status": job.status,
        "created_at": int(time.time()),
        "finished_at": None,
        "expires_at": None,
        "model": job.fields["model"],
        "document": {"format": "pdf", "num_pages": len(job.numbers), "size_bytes": len(job.data)},
        "options": {},
        "pages_total": len(job.numbers),
        "pages_done": len(job.pages),
        "pages_failed": sum(page["status"] == "failed" for page in job.pages),
        "usage": add_up(job.pages),
        "error": None,
    }
