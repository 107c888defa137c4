"""A bounded pool of processes that draw pages, one page at a time each.

A worker that dies, hangs or grows too large takes its page with it and nothing else: the next page gets a new worker.
A document stays in its file and only the pages under way are in memory, so its length costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybase64

from serving.errors import RenderError
from serving.ocr.documents import HEAD_BYTES, Format, find_format
from serving.ocr.layout import Box
from serving.ocr_settings import RenderSettings

_LINE_BYTES = 2**20
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""Of the environment, where a service keeps secrets that no document should get near."""


@dataclass(frozen=True, slots=True)
class Document:
    file: Path
    format: Format
    num_pages: int


@dataclass(frozen=True, slots=True)
class PageImage:
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
        self._room = asyncio.Semaphore(settings.workers)
        self._idle: list[_Worker] = []
        self._is_closed = False

    async def open(self, file: Path) -> Document:
        """Find out what a document is and how many pages it has. The file must stay while pages are drawn.

        Raises:
            InvalidRequestError: a format that is not read.
            RenderError: it is encrypted or damaged, or took too long.
        """
        kind = find_format(await asyncio.to_thread(_read_head, file))
        told, _ = await self._ask({"file": str(file), "format": kind.value})
        if told["num_pages"] < 1:
            raise RenderError("The document has no pages.", param="document")
        return Document(file, kind, told["num_pages"])

    async def draw(self, document: Document, page: int, dpi: int | None = None, part: Box | None = None) -> PageImage:
        """Draw one page, or a part of it.

        Args:
            document: as `open` gave it.
            page: counted from 0.
            dpi: pixels per inch of a PDF page; None for the settings'. Images have pixels of their own.
            part: in pixels of the drawn page.

        Raises:
            RenderError: it cannot be drawn, took too long, or ended its worker.
        """
        order: dict[str, Any] = {
            "page": page,
            "dpi": dpi or self._settings.dpi,
            "max_pixels": self._settings.max_page_pixels,
        }
        if part is not None:
            order["part"] = (part.left, part.top, part.right, part.bottom)
        told, data = await self._ask({"file": str(document.file), "format": document.format.value, **order})
        return PageImage(data, told["media_type"], told["width"], told["height"])

    async def close(self) -> None:
        """End all workers that are idle; those at work end with their pages."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().kill()

    async def _ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        async with self._worker() as worker:
            try:
                async with asyncio.timeout(self._settings.page_timeout_s):
                    told, data = await worker.ask(order)
            except TimeoutError as error:
                message = f"It could not be drawn within {self._settings.page_timeout_s:g} seconds."
                raise RenderError(message, param="document", code="render_timeout") from error
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                message = "The process that drew it has died, probably of the document."
                raise RenderError(message, param="document", code="render_failed") from error
            worker.is_healthy = True
        if "code" in told:
            raise RenderError(told["message"], param="document", code=told["code"])
        return told, data

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        """A worker for one order. It is kept only when it has answered: whoever is cancelled in the middle leaves a
        worker behind that is still busy."""
        async with self._room:
            worker = self._take_idle() or await _Worker.start(self._settings.worker_memory_bytes)
            worker.is_healthy = False
            try:
                yield worker
            finally:
                is_fresh = worker.num_orders < self._settings.pages_per_worker
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
        self.num_orders = 0
        self.is_healthy = False

    @classmethod
    async def start(cls, memory_bytes: int) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "serving.ocr.render_process", str(memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_BYTES,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the service, which ends its workers itself
        )
        return cls(process)

    async def ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.num_orders += 1
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        await self.process.stdin.drain()
        line = await self.process.stdout.readuntil(b"\n")
        told = json.loads(line)
        return told, await self.process.stdout.readexactly(told.get("size_bytes", 0))

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.process.wait()


def _read_head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEAD_BYTES)
