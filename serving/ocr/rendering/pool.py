"""A bounded pool of processes that render pages, each one page at a time.

A worker that dies, hangs or uses too much memory loses its own page and nothing else: the next page gets a new worker.
Documents stay in files and only the pages in progress are in memory, so long documents need no more memory.

Rendering is not charged for, so it is shared fairly instead: tenants take turns (`limits.turns`), the kernel limits the
CPU time of a page, and a document that has used too much, or lost too many pages, is given up. CPU time is that of the
worker process, so other load on the machine does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pybase64

from serving.errors import RenderError
from serving.ocr.limits.turns import TurnQueue
from serving.ocr.rendering.formats import HEAD_BYTES, DocumentFormat, find_format
from serving.ocr.text.layout import Box
from serving.ocr_api.shapes import PageWarning
from serving.settings.ocr import RenderSettings

_LINE_BYTES = 2**20
_START_CPU_S = 2
"""CPU seconds for a worker's startup, in addition to those of its first request."""
_DEATH_S = 5.0
"""How long a worker process may take to end after its pipes have closed."""
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""Environment variables that workers inherit; the service's others may be secrets."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""Keeps numpy from reserving part of a worker's limited memory for each core of the machine."""


@dataclass(slots=True)
class Effort:
    """What rendering one document has cost so far."""

    cpu_s: float = 0.0
    """CPU seconds of the worker processes."""
    num_lost: int = 0
    """Pages whose worker died or was killed."""


@dataclass(frozen=True, slots=True)
class OpenedDocument:
    file: Path
    format: DocumentFormat
    num_pages: int
    tenant: str
    """The tenant on whose turn pages are rendered."""
    password: str | None = field(default=None, repr=False)
    """Opens an encrypted PDF."""
    effort: Effort = field(default_factory=Effort, compare=False)


@dataclass(frozen=True, slots=True)
class DrawnPage:
    """One page as an image file."""

    data: bytes
    media_type: str
    width: int
    height: int
    dpi: int | None = None
    """Pixels per inch; None for images, which have pixels of their own."""
    warnings: tuple[PageWarning, ...] = ()
    """What may be wrong with the page."""
    parts: tuple[Box, ...] = ()
    """Where an extremely long or wide page is cut, in pixels; empty for others."""

    def as_url(self) -> str:
        """The image as a `data:` URL."""
        return f"data:{self.media_type};base64,{pybase64.b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class LayerLine:
    """A line of a page's text layer."""

    text: str
    box: tuple[float, ...]
    """Left, top, right and bottom, as parts of the page's width and height."""


@dataclass(frozen=True, slots=True)
class PageLayer:
    """The text that a PDF page contains."""

    lines: tuple[LayerLine, ...] = ()
    flaw: str | None = "the document is not a PDF"
    """Why the text cannot be taken for the page's; None if it can."""

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


class Renderer:
    """The pool. Use it inside one event loop and `close` it; workers are started on demand."""

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self.queue = TurnQueue(settings.workers, settings.tenant_cpu_s_per_minute)
        self.cpu_s = 0.0
        """CPU seconds that all workers have used so far."""
        self._idle: list[RenderWorker] = []
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Number of documents and pages that wait for their turn."""
        return self.queue.num_waiting

    async def open(self, file: Path, tenant: str, password: str | None = None) -> OpenedDocument:
        """Detect a document's format and count its pages, once it is the tenant's turn.

        Args:
            file: must exist while pages are rendered.
            tenant: the document's owner.
            password: opens an encrypted PDF; other documents ignore it.

        Raises:
            InvalidRequestError: the format is not supported.
            RenderError: it is encrypted or damaged, or took too long.
        """
        kind = find_format(await asyncio.to_thread(_read_head, file))
        document = OpenedDocument(file, kind, 0, tenant, password)
        answer, _ = await self._ask(document, {})
        if answer["num_pages"] < 1:
            raise RenderError("The document has no pages.", param="document")
        return replace(document, num_pages=answer["num_pages"])

    async def draw(
        self, document: OpenedDocument, page: int, dpi: int | None = None, part: Box | None = None
    ) -> DrawnPage:
        """Render one page, or a part of it, once it is the tenant's turn.

        Args:
            document: from `open`.
            page: counted from 0.
            dpi: pixels per inch for PDF pages; None uses the settings. Images have pixels of their own.
            part: in pixels of the rendered page.

        Raises:
            RenderError: the page cannot be rendered, took too long or crashed its worker; or its document has reached
                its limits.
        """
        request: dict[str, Any] = {
            "page": page,
            "dpi": dpi or self.settings.dpi,
            "max_pixels": self.settings.max_page_pixels,
        }
        if part is not None:
            request["part"] = (part.left, part.top, part.right, part.bottom)
        answer, data = await self._ask(document, request)
        parts = tuple(Box(*edges) for edges in answer.get("parts", ()))
        return DrawnPage(
            data,
            answer["media_type"],
            answer["width"],
            answer["height"],
            answer["dpi"],
            tuple(PageWarning(code=code, message=message) for code, message in answer["warnings"]),
            parts if len(parts) > 1 else (),
        )

    async def read_layer(self, document: OpenedDocument, page: int) -> PageLayer:
        """Read the text layer of a page, once it is the tenant's turn. Documents other than PDFs have none.

        Raises:
            RenderError: as `draw` does.
        """
        if document.format is not DocumentFormat.PDF:
            return PageLayer()
        answer, data = await self._ask(document, {"page": page, "text": True})
        lines = tuple(
            LayerLine(text, (left, top, right, bottom)) for text, left, top, right, bottom in json.loads(data)
        )
        return PageLayer(lines, answer["flaw"])

    async def close(self) -> None:
        """Stop idle workers; busy ones stop after their page."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().kill()

    async def _ask(self, document: OpenedDocument, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Have a worker carry out a request for a document.

        Raises:
            RenderError: it cannot be carried out.
        """
        tenant, effort = document.tenant, document.effort
        request = {"file": str(document.file), "format": document.format.value, **request}
        if document.password is not None:
            request["password"] = document.password
        self._check_effort(effort)
        async with self.queue.place(tenant):
            self._check_effort(effort)  # other pages of it were rendered meanwhile
            async with self._worker() as worker:
                try:
                    answer, data = await self._ask_worker(worker, request)
                except RenderError:
                    effort.num_lost += 1
                    raise
                finally:
                    cpu_s = worker.measure_cpu_s()
                    effort.cpu_s += cpu_s
                    self.cpu_s += cpu_s
                    self.queue.charge(tenant, cpu_s)
        if "code" in answer:
            param = "password" if answer["code"] == "wrong_password" else "document"
            raise RenderError(answer["message"], param=param, code=answer["code"])
        return answer, data

    async def _ask_worker(self, worker: RenderWorker, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Send a request to a worker.

        Raises:
            RenderError: the worker died or did not answer in time.
        """
        try:
            async with asyncio.timeout(self.settings.page_timeout_s):
                answer, data = await worker.ask(request, self.settings.page_cpu_s)
        except TimeoutError as error:
            message = f"The page could not be rendered within {self.settings.page_timeout_s:g} seconds."
            raise RenderError(message, param="document", code="render_timeout") from error
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            if await worker.has_used_up_its_time():
                message = f"The page could not be rendered within {self.settings.page_cpu_s} seconds of CPU time."
                raise RenderError(message, param="document", code="render_timeout") from error
            message = "The process that rendered the page crashed, probably because of the document."
            raise RenderError(message, param="document", code="render_failed") from error
        worker.is_healthy = True
        return answer, data

    def _check_effort(self, effort: Effort) -> None:
        """Check a document's limits.

        Raises:
            RenderError: the document has reached one of them.
        """
        settings = self.settings
        if effort.num_lost >= settings.max_lost_pages:
            reason = f"{effort.num_lost} of its pages could not be rendered within the limits of a page"
        elif effort.cpu_s >= settings.document_cpu_s:
            reason = f"rendering it has used the {settings.document_cpu_s:g} seconds of CPU time that a document has"
        else:
            return
        raise RenderError(
            f"The document was given up: {reason}. Choose fewer pages with pages, lower dpi, or send it as images.",
            param="document",
            code="document_too_costly",
        )

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[RenderWorker]:
        """A worker for one request.

        It is reused only if it has answered: a request that is cancelled leaves its worker busy.
        """
        worker = self._take_idle() or await RenderWorker.start(self.settings.worker_memory_bytes)
        worker.is_healthy = False
        try:
            yield worker
        finally:
            is_fresh = worker.num_requests < self.settings.pages_per_worker
            if worker.is_healthy and is_fresh and not self._is_closed:
                self._idle.append(worker)
            else:
                await asyncio.shield(worker.kill())

    def _take_idle(self) -> RenderWorker | None:
        """An idle worker that is still alive."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.returncode is None:
                return worker
        return None


class RenderWorker:
    """A worker process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.num_requests = 0
        self.is_healthy = False
        self._seen_cpu_s = 0.0
        self._reported_cpu_s = 0.0
        """CPU seconds that `measure_cpu_s` has reported."""
        self._bound_cpu_s = 0
        """CPU seconds after which the kernel kills the process."""

    @classmethod
    async def start(cls, memory_bytes: int) -> RenderWorker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "serving.ocr.rendering.worker", str(memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_BYTES,
            env=_ONE_THREAD | {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the service, which stops its workers itself
        )
        return cls(process)

    async def ask(self, request: dict[str, Any], max_cpu_s: int) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the answer with its image.

        Args:
            request: see `serving.ocr.rendering.worker`.
            max_cpu_s: CPU seconds after which the kernel kills the worker, give or take one second.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.num_requests += 1
        self._limit_cpu(max_cpu_s)
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        await self.process.stdin.drain()
        line = await self.process.stdout.readuntil(b"\n")
        answer = json.loads(line)
        return answer, await self.process.stdout.readexactly(answer.get("size_bytes", 0))

    def measure_cpu_s(self) -> float:
        """CPU seconds since the last call, or since the process started."""
        used_cpu_s = self._read_cpu_s()
        since_cpu_s = used_cpu_s - self._reported_cpu_s
        self._reported_cpu_s = used_cpu_s
        return since_cpu_s

    async def has_used_up_its_time(self) -> bool:
        """Whether the kernel has killed the worker because its request exceeded the CPU time."""
        self._read_cpu_s()
        try:
            async with asyncio.timeout(_DEATH_S):
                return await self.process.wait() == -signal.SIGXCPU
        except TimeoutError:  # it has closed its pipes but is alive
            return False

    def _limit_cpu(self, max_cpu_s: int) -> None:
        """Set the kernel's limit, which counts whole seconds since the process started."""
        if self.num_requests == 1:
            max_cpu_s += _START_CPU_S
        self._bound_cpu_s = math.ceil(self._read_cpu_s()) + max_cpu_s
        if self.process.returncode is None:  # otherwise its pid may belong to another process
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (self._bound_cpu_s, resource.RLIM_INFINITY))

    def _read_cpu_s(self) -> float:
        """CPU seconds of the process so far.

        For a process that has ended: its limit if that is why it was killed, or else the last measurement.
        """
        if self.process.returncode == -signal.SIGXCPU:
            self._seen_cpu_s = float(self._bound_cpu_s)
        elif self.process.returncode is None:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(self.process.pid).cpu_times()
                self._seen_cpu_s = float(times.user + times.system)
        return self._seen_cpu_s

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.process.wait()


def _read_head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEAD_BYTES)
