"""One request inside a scripted engine, from queueing to its last byte, including scripted failures."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import Send

from serving.engine.scripted.batching import Counts, RequestUsage, RunningBatch
from serving.engine.scripted.failures import FailureKind, ScriptedFailure
from serving.engine.scripted.frames import DONE, StreamFrames, build_answer, build_error
from serving.engine.scripted.requests import ScriptedRequest

_JSON = b"application/json"
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]

UsageFrames = Literal["last", "asked", "forced"]
"""Which streams contain usage. `last`: all streams, in one frame at the end, unless `include_usage` is false. `asked`:
those that ask for it, vLLM's default. `forced`: every frame, as with vLLM's --enable-force-include-usage."""


@dataclass(slots=True)
class Core:
    """State that the requests of one engine share."""

    batch: RunningBatch
    usage_frames: UsageFrames
    exit_process: Callable[[int], object]
    counts: Counts = field(default_factory=Counts)
    dead_error: BaseException | None = None

    def frames_for(self, request: ScriptedRequest, answer_id: str) -> tuple[StreamFrames, bool]:
        """Return the frames of a stream, and whether to send the one with usage."""
        is_forced = self.usage_frames == "forced"
        has_usage = is_forced or request.include_usage is True
        if self.usage_frames == "last":
            has_usage = request.include_usage is not False
        continuous = is_forced or request.continuous_usage
        return StreamFrames(request, answer_id, int(time.time()), has_continuous_usage=continuous), has_usage

    def fail(self, failure: ScriptedFailure) -> None:
        """Handles failures that affect more than one request."""
        if failure.kind is FailureKind.EXIT:
            self.exit_process(1)
        elif failure.kind is FailureKind.DEAD:
            self.dead_error = RuntimeError("the script says that the engine dies")


class ScriptedRun:
    """One request: waits to be scheduled, is prefilled, and generates its tokens."""

    def __init__(
        self, core: Core, request: ScriptedRequest, usage: RequestUsage, failure: ScriptedFailure | None, send: Send
    ) -> None:
        self._core = core
        self._request = request
        self.usage = usage
        self._failure = failure
        self._send = send
        prefix = "chatcmpl-" if request.is_chat else "cmpl-"
        self._answer_id = prefix + (usage.request_id or uuid.uuid4().hex)

    async def answer(self) -> None:
        """Run it from queueing to the last byte. Cancelling aborts the request; its usage remains counted."""
        failure = self._failure
        if failure is not None and failure.kind is FailureKind.STATUS:
            self._finish("error")
            await _send_refusal(self._send, failure)
            return
        if failure is not None and failure.kind is FailureKind.REFUSE:
            self._finish("error")
            await _cut(self._send)
            return
        try:
            if self._request.is_stream:  # vLLM, too, sends status 200 before the request is scheduled
                await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            async with self._core.batch.seat(self._request.num_choices):
                await self._prefill()
                is_whole = await (self._stream() if self._request.is_stream else self._build())
                if not self.usage.is_finished:
                    self._finish(self._request.finish_reason if is_whole else "error")
            if not self._request.is_stream and is_whole:
                body = build_answer(self._request, self._answer_id, int(time.time()))
                await send_body(self._send, 200, body)
        finally:
            if not self.usage.is_finished:
                self._finish("abort")

    async def _prefill(self) -> None:
        await self._core.batch.prefill(self._request.prompt_tokens)
        self.usage.prompt_tokens = self._request.prompt_tokens
        self.usage.image_tokens = self._request.image_tokens
        self._core.counts.prompt_tokens += self._request.prompt_tokens
        self._core.counts.prompted += 1
        if self._failure is not None and self._failure.kind is FailureKind.SLOW_START:
            await asyncio.sleep(self._failure.value)

    async def _stream(self) -> bool:
        """Send a frame for each token. Return False if a failure ended the answer."""
        send, batch, request = self._send, self._core.batch, self._request
        fails_at = self._fails_at()
        frames, has_usage = self._core.frames_for(request, self._answer_id)
        started_s = asyncio.get_running_loop().time()
        if fails_at == 0 and not await self._survive():
            return False
        if role := frames.first():
            await send({"type": "http.response.body", "body": role, "more_body": True})
        for number in range(1, request.output_tokens + 1):
            await batch.wait_for_token(number, started_s)
            for index in range(request.num_choices):
                self._count(1)
                await send({"type": "http.response.body", "body": frames.token(index, number), "more_body": True})
            if (number == fails_at or self._core.dead_error is not None) and not await self._survive():
                return False
        if has_usage:
            await send({"type": "http.response.body", "body": frames.usage(), "more_body": True})
        self._finish(
            request.finish_reason
        )  # before the end is sent, so that a client that has seen it finds the usage complete
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
        return True

    async def _build(self) -> bool:
        """Generate a whole answer. Return False if a failure ended it."""
        total, fails_at = self._request.output_tokens, self._fails_at()
        before = total if fails_at is None else min(fails_at, total)
        await self._generate_unseen(before)
        if (before == fails_at or self._core.dead_error is not None) and not await self._survive():
            return False
        await self._generate_unseen(total - before)
        return True

    async def _generate_unseen(self, num_tokens: int) -> None:
        async for num_new in self._core.batch.generate_unseen(num_tokens):
            self._count(num_new * self._request.num_choices)

    def _fails_at(self) -> int | None:
        return self._failure.after_tokens if self._failure is not None and self._failure.is_midway else None

    async def _survive(self) -> bool:
        """Apply the failure in the middle of the answer. Return whether the answer continues."""
        failure = self._failure
        if self._core.dead_error is not None or failure is None:
            await self._send_error()
            return False
        if failure.kind is FailureKind.STALL:
            if failure.for_s is not None:
                await asyncio.sleep(failure.for_s)
                return True
            await asyncio.get_running_loop().create_future()  # until the client disconnects
        if failure.kind is FailureKind.DIE:
            await _cut(self._send)
            return False
        self._core.fail(failure)
        await self._send_error()
        return False

    async def _send_error(self) -> None:
        body = build_error(500, "EngineCore encountered an issue.", "InternalServerError")
        if not self._request.is_stream:
            await send_body(self._send, 500, body)
            return
        await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n" + DONE, "more_body": False})

    def _count(self, num_tokens: int) -> None:
        self.usage.completion_tokens += num_tokens
        self._core.counts.generation_tokens += num_tokens

    def _finish(self, reason: str) -> None:
        self.usage.finish_reason = reason
        self.usage.is_finished = True
        self._core.counts.finished[reason] += 1


async def _send_refusal(send: Send, failure: ScriptedFailure) -> None:
    status = int(failure.value)
    kind = "ServiceUnavailableError" if status == 503 else "BadRequestError" if status < 500 else "InternalServerError"
    extra = [] if failure.retry_after_s is None else [(b"retry-after", b"%d" % failure.retry_after_s)]
    await send_body(send, status, build_error(status, "The script says so.", kind), extra=extra)


async def _cut(send: Send) -> None:
    """Close the connection after the data sent so far, as the kernel does for a killed process.

    ASGI has no such operation, so this uses uvicorn's object behind `send`. With any other server the answer is left
    incomplete, which makes the server close the connection.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.close()
        await (
            asyncio.get_running_loop().create_future()
        )  # the server reports the lost connection, and the request is cancelled


async def send_body(
    send: Send, status: int, body: bytes, kind: bytes = _JSON, extra: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
