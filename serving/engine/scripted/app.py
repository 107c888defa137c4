"""An engine without a model: an ASGI app with the API of vLLM's OpenAI server that answers according to a script.

It replaces the engine, so that everything around an engine can be tested in milliseconds and measured without an
engine's own cost: HTTP formats, continuous batching (`max_num_seqs` run, others wait in order), prefill and token
rates, aborts on disconnect, metrics under vLLM's names, usage by request id, and failures (`failures.py`) on demand.
The same requests in the same order always give the same answers.

    python -m serving.engine.scripted --port 9000 --tokens-per-s 100 --failure die:after_tokens=5:every=20

In addition to vLLM's routes there are `GET /usage/{request_id}` (for requests with an `X-Request-Id`), and `GET` and
`POST /script`, which return and change the script at run time: `{"failures": [...], "tokens_per_s": 50}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence

import orjson
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from serving.engine.scripted.answering import Core, ScriptedRun, UsageFrames, send_body
from serving.engine.scripted.batching import RequestUsage, RunningBatch, UsageLog, render_metrics
from serving.engine.scripted.failures import parse_failures
from serving.engine.scripted.frames import build_error
from serving.engine.scripted.requests import ScriptedRefusalError, read_request
from serving.errors import SettingsError
from serving.settings.stack import ScriptSettings

_GENERATE = ("/v1/chat/completions", "/v1/completions")
_USAGE = "/usage/"


class ScriptedEngine:
    """The engine, which is also its ASGI app."""

    def __init__(
        self,
        script: ScriptSettings,
        names: Sequence[str],
        *,
        pid: int | None = None,
        api_key: str | None = None,
        usage_frames: UsageFrames = "last",
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """Create the engine.

        Args:
            script: rates, sizes and failures.
            names: names of the model; the first is the canonical one.
            pid: process id that it reports; None is this process.
            api_key: required below `/v1`, as in vLLM.
            usage_frames: which streams contain usage.
            exit_process: called by the failure `exit`.

        Raises:
            SettingsError: a failure is not valid.
        """
        self.names = tuple(names)
        self.pid = pid or os.getpid()
        self._core = Core(RunningBatch(script), usage_frames=usage_frames, exit_process=exit_process)
        self._ledger = UsageLog()
        self._failures = parse_failures(script.failures)
        self._api_key = api_key
        self._started_s = int(time.time())

    @property
    def batch(self) -> RunningBatch:
        """The running and queued sequences."""
        return self._core.batch

    @property
    def script(self) -> ScriptSettings:
        return self.batch.script

    @property
    def dead_error(self) -> BaseException | None:
        return self._core.dead_error

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    @property
    def is_running(self) -> bool:
        return self.dead_error is None

    @property
    def max_num_seqs(self) -> int:
        return self.script.max_num_seqs

    @property
    def kv_tokens(self) -> int:
        return self.script.kv_tokens

    @property
    def max_model_len(self) -> int:
        return self.script.max_model_len

    def find_usage(self, request_id: str) -> RequestUsage | None:
        """Return the usage of requests with this id, or None if it is unknown."""
        return self._ledger.find(request_id)

    def usage_totals(self) -> dict[str, int]:
        """Return the usage of all requests since the start."""
        counts = self._core.counts
        return {
            "started_ns": self._started_s * 10**9,
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.generation_tokens,
            "requests": counts.prompted,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                await self._route(scope, receive, send)
            except ScriptedRefusalError as error:
                body = build_error(error.status, str(error), error.type, error.param)
                await send_body(send, error.status, body)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path.startswith("/v1") and not self._lets_in(scope):
            await send_body(send, 401, b'{"error":"Unauthorized"}')
        elif path in _GENERATE and method == "POST":
            await self._generate(path, scope, receive, send)
        elif path == "/v1/models":
            await send_body(send, 200, orjson.dumps({"object": "list", "data": self._cards()}))
        elif path == "/health":
            await send_body(send, 200 if self.is_running else 503, b"")
        elif path == "/metrics":
            text = b"text/plain; version=0.0.4; charset=utf-8"
            await send_body(send, 200, render_metrics(self.names, self.batch, self._core.counts), text)
        elif path.startswith(_USAGE):
            await self._answer_usage(path.removeprefix(_USAGE), send)
        elif path == "/script":
            await self._change_script(method, receive, send)
        else:
            raise ScriptedRefusalError("Not Found", status=404, type="NotFoundError")

    def _lets_in(self, scope: Scope) -> bool:
        if self._api_key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._api_key.encode())

    def _cards(self) -> list[dict[str, object]]:
        card = {"object": "model", "created": self._started_s, "owned_by": "vllm", "root": "scripted", "parent": None}
        return [{"id": name, **card, "max_model_len": self.max_model_len} for name in self.names]

    async def _answer_usage(self, request_id: str, send: Send) -> None:
        usage = self._ledger.find(request_id)
        if usage is None:
            raise ScriptedRefusalError("No request of this id is known here.", status=404, type="NotFoundError")
        await send_body(send, 200, orjson.dumps(dataclasses.asdict(usage)))

    async def _change_script(self, method: str, receive: Receive, send: Send) -> None:
        if method == "POST":
            try:
                changes = orjson.loads(await _read_body(receive) or b"{}")
                script = ScriptSettings(**{**self.script.model_dump(), **changes})
                failures = parse_failures(script.failures)
            except (orjson.JSONDecodeError, TypeError, ValidationError, SettingsError) as error:
                raise ScriptedRefusalError(str(error)) from error
            if "failures" in changes:
                self._failures = failures  # starts counting requests again
            self.batch.change(script)
        told = {**self.script.model_dump(), "num_requests": self._failures.num_requests, "pid": self.pid}
        await send_body(send, 200, orjson.dumps(told))

    async def _generate(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        if body is None:
            return
        if self.errored:
            raise ScriptedRefusalError("EngineCore encountered an issue.", status=500, type="InternalServerError")
        request = read_request(path, body, self.script, self.names)
        given_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        run = ScriptedRun(self._core, request, RequestUsage(given_id), self._failures.next(), send)
        if given_id:
            self._ledger.add(run.usage)
        answering = asyncio.ensure_future(run.answer())
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait((answering, leaving))
        if not answering.cancelled():
            answering.result()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body, or None if the client disconnected."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


@contextlib.asynccontextmanager
async def run_scripted(
    script: ScriptSettings,
    names: Sequence[str],
    *,
    api_key: str | None = None,
    usage_frames: UsageFrames = "last",
) -> AsyncIterator[tuple[ScriptedEngine, ScriptedEngine]]:
    """Start an engine, which takes `script.start_s`, and yield (engine, ASGI app), as the start of vLLM does."""
    engine = ScriptedEngine(script, names, api_key=api_key, usage_frames=usage_frames)
    await asyncio.sleep(script.start_s)
    yield engine, engine
