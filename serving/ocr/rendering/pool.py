"""A bounded pool of processes that draw pages, one page at a time each.

A worker that dies, hangs or grows too large takes its page with it and nothing else: the next page gets a new worker.
A document stays in its file and only the pages under way are in memory, so its length costs nothing.

Nobody pays for drawing, so it is shared out instead: tenants take turns (`turns`), the kernel bounds the CPU time of a
page, and a document that has used too much, or lost too many pages, is given up. CPU time is that of the worker's
process, so what others do on the machine is not counted.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pybase64

from serving.errors import RenderError
from serving.ocr.limits.turns import TurnQueue
from serving.ocr.rendering.formats import HEAD_BYTES, DocumentFormat, find_format
from serving.ocr.text.layout import Box
from serving.settings.ocr import RenderSettings

_LINE_BYTES = 2**20
_START_CPU_S = 2
"""CPU seconds for a worker's start, beside those of its first request."""
_DEATH_S = 5.0
"""From the end of a worker's pipes to that of its process, at most."""
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""Of the environment, where a service keeps secrets that no document should get near."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""For numpy, which would take a part of a worker's bounded memory for each of the machine's cores."""


@dataclass(slots=True)
class Effort:
    """What drawing one document has taken so far."""

    cpu_s: float = 0.0
    """Of the workers' processes."""
    num_lost: int = 0
    """Pages whose worker was killed or died."""


@dataclass(frozen=True, slots=True)
class OpenedDocument:
    file: Path
    format: DocumentFormat
    num_pages: int
    tenant: str
    """Whose turn it is when a page is drawn."""
    effort: Effort = field(default_factory=Effort, compare=False)


@dataclass(frozen=True, slots=True)
class DrawnPage:
    """One page as an image file."""

    data: bytes
    media_type: str
    width: int
    height: int

    def as_url(self) -> str:
        """A `data:` URL of it."""
        return f"data:{self.media_type};base64,{pybase64.b64encode(self.data).decode()}"


class Renderer:
    """The pool. Use it inside one event loop and `close` it; workers start when they are needed."""

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self._queue = TurnQueue(settings.workers, settings.tenant_cpu_s_per_minute)
        self.cpu_s = 0.0
        """That all workers have used so far."""
        self._idle: list[_Worker] = []
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Documents and pages that wait for their turn."""
        return self._queue.num_waiting

    async def open(self, file: Path, tenant: str) -> OpenedDocument:
        """Find out what a document is and how many pages it has, when its tenant's turn has come.

        Args:
            file: must stay while pages are drawn.
            tenant: whose it is.

        Raises:
            InvalidRequestError: a format that is not read.
            RenderError: it is encrypted or damaged, or took too long.
        """
        kind = find_format(await asyncio.to_thread(_read_head, file))
        effort = Effort()
        answer, _ = await self._ask({"file": str(file), "format": kind.value}, tenant, effort)
        if answer["num_pages"] < 1:
            raise RenderError("The document has no pages.", param="document")
        return OpenedDocument(file, kind, answer["num_pages"], tenant, effort)

    async def draw(
        self, document: OpenedDocument, page: int, dpi: int | None = None, part: Box | None = None
    ) -> DrawnPage:
        """Draw one page, or a part of it, when its tenant's turn has come.

        Args:
            document: as `open` gave it.
            page: counted from 0.
            dpi: pixels per inch of a PDF page; None for the settings'. Images have pixels of their own.
            part: in pixels of the drawn page.

        Raises:
            RenderError: it cannot be drawn, took too long, or ended its worker; or its document has cost too much.
        """
        request: dict[str, Any] = {
            "page": page,
            "dpi": dpi or self._settings.dpi,
            "max_pixels": self._settings.max_page_pixels,
        }
        if part is not None:
            request["part"] = (part.left, part.top, part.right, part.bottom)
        request |= {"file": str(document.file), "format": document.format.value}
        answer, data = await self._ask(request, document.tenant, document.effort)
        return DrawnPage(data, answer["media_type"], answer["width"], answer["height"])

    async def close(self) -> None:
        """End all workers that are idle; those at work end with their pages."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().kill()

    async def _ask(self, request: dict[str, Any], tenant: str, effort: Effort) -> tuple[dict[str, Any], bytes]:
        self._check_effort(effort)
        async with self._queue.place(tenant):
            self._check_effort(effort)  # others of its pages were drawn meanwhile
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
                    self._queue.charge(tenant, cpu_s)
        if "code" in answer:
            raise RenderError(answer["message"], param="document", code=answer["code"])
        return answer, data

    async def _ask_worker(self, worker: _Worker, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Raises:
        RenderError: the worker is lost.
        """
        try:
            async with asyncio.timeout(self._settings.page_timeout_s):
                answer, data = await worker.ask(request, self._settings.page_cpu_s)
        except TimeoutError as error:
            message = f"It could not be drawn within {self._settings.page_timeout_s:g} seconds."
            raise RenderError(message, param="document", code="render_timeout") from error
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            if await worker.has_used_up_its_time():
                message = f"It could not be drawn within {self._settings.page_cpu_s} seconds of CPU time."
                raise RenderError(message, param="document", code="render_timeout") from error
            message = "The process that drew it has died, probably of the document."
            raise RenderError(message, param="document", code="render_failed") from error
        worker.is_healthy = True
        return answer, data

    def _check_effort(self, effort: Effort) -> None:
        """Raises:
        RenderError: the document has cost too much already.
        """
        settings = self._settings
        if effort.num_lost >= settings.max_lost_pages:
            reason = f"{effort.num_lost} of its pages could not be drawn in the time that a page has"
        elif effort.cpu_s >= settings.document_cpu_s:
            reason = f"drawing it has taken the {settings.document_cpu_s:g} seconds of CPU time that a document has"
        else:
            return
        raise RenderError(
            f"The document was given up: {reason}. Choose fewer pages with pages, lower dpi, or send it as images.",
            param="document",
            code="document_too_costly",
        )

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        """A worker for one request. It is kept only when it has answered: whoever is cancelled in the middle leaves a
        worker behind that is still busy."""
        worker = self._take_idle() or await _Worker.start(self._settings.worker_memory_bytes)
        worker.is_healthy = False
        try:
            yield worker
        finally:
            is_fresh = worker.num_requests < self._settings.pages_per_worker
            if worker.is_healthy and is_fresh and not self._is_closed:
                self._idle.append(worker)
            else:
                await asyncio.shield(worker.kill())

    def _take_idle(self) -> _Worker | None:
        """One that is still alive."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.returncode is None:
                return worker
        return None


class _Worker:
    """One process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.num_requests = 0
        self.is_healthy = False
        self._seen_cpu_s = 0.0
        self._reported_cpu_s = 0.0
        """Up to here `measure_cpu_s` has told."""
        self._bound_cpu_s = 0
        """Where the kernel ends the process."""

    @classmethod
    async def start(cls, memory_bytes: int) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "serving.ocr.rendering.worker", str(memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_BYTES,
            env=_ONE_THREAD | {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the service, which ends its workers itself
        )
        return cls(process)

    async def ask(self, request: dict[str, Any], max_cpu_s: int) -> tuple[dict[str, Any], bytes]:
        """What it answers, and the image that belongs to that.

        Args:
            request: see `serving.ocr.rendering.worker`.
            max_cpu_s: CPU seconds after which the kernel ends it, up to one second more.
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
        """CPU seconds since the last call, or since the process began."""
        used_cpu_s = self._read_cpu_s()
        since_cpu_s = used_cpu_s - self._reported_cpu_s
        self._reported_cpu_s = used_cpu_s
        return since_cpu_s

    async def has_used_up_its_time(self) -> bool:
        """Whether the kernel has ended it for the CPU time of its request."""
        self._read_cpu_s()
        try:
            async with asyncio.timeout(_DEATH_S):
                return await self.process.wait() == -signal.SIGXCPU
        except TimeoutError:  # it has closed its pipes and lives
            return False

    def _limit_cpu(self, max_cpu_s: int) -> None:
        """The kernel counts in whole seconds, from the start of the process on."""
        if self.num_requests == 1:
            max_cpu_s += _START_CPU_S
        self._bound_cpu_s = math.ceil(self._read_cpu_s()) + max_cpu_s
        if self.process.returncode is None:  # else its number may be another's by now
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (self._bound_cpu_s, resource.RLIM_INFINITY))

    def _read_cpu_s(self) -> float:
        """CPU seconds of the process so far; of one that has ended, what it was allowed if it died of that, else what
        was last seen."""
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
