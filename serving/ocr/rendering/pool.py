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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pybase64

from serving.errors import RenderError
from serving.ocr.limits.turns import TurnQueue
from serving.ocr.rendering.formats import HEAD_BYTES, DocumentFormat, find_format
from serving.ocr.rendering.worker_process import RenderWorker
from serving.ocr.text.documents import PlacedText, WordBox
from serving.ocr.text.layout import Box
from serving.ocr_api.shapes import PageWarning
from serving.settings.ocr import RenderSettings


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

    async def place(
        self, document: OpenedDocument, page: int, dpi: int | None, blocks: Sequence[tuple[str, Box | None]]
    ) -> list[PlacedText]:
        """Find where the words of a page stand, given its blocks and the boxes that the model saw.

        Raises:
            RenderError: as `draw` does.
        """
        _, data = await self._ask(document, self._build_placing(page, dpi, blocks))
        return [
            PlacedText(
                text,
                Box(*box) if box is not None else None,
                tuple(tuple(WordBox(word, Box(*edges)) for word, edges in line) for line in lines),
            )
            for text, box, lines in json.loads(data)
        ]

    async def build_pdf(
        self, document: OpenedDocument, page: int, dpi: int | None, blocks: Sequence[tuple[str, Box | None]]
    ) -> bytes:
        """A PDF of one page with its words under its picture.

        Raises:
            RenderError: as `draw` does.
        """
        request = self._build_placing(page, dpi, blocks)
        _, data = await self._ask(document, {**request, "searchable": True})
        return data

    def _build_placing(self, page: int, dpi: int | None, blocks: Sequence[tuple[str, Box | None]]) -> dict[str, Any]:
        boxes = [
            (text, (box.left, box.top, box.right, box.bottom) if box is not None else None) for text, box in blocks
        ]
        pixels = self.settings.max_page_pixels
        return {"page": page, "dpi": dpi or self.settings.dpi, "max_pixels": pixels, "place": boxes}

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


def _read_head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEAD_BYTES)
