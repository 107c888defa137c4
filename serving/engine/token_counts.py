"""Token counts of each request as the engine counted them, including requests whose answer was not completed.

An answer carries its usage in its last frame, which is never sent if the client disconnects early. The engine's front
end still knows the usage: it follows every sequence and counts tokens for its own metrics. `EngineUsage` reads the
counts when a sequence ends, so it costs time per request and none per token.

Served by `UsageApp` beside the engine's own routes, under the same key:

    GET /usage/{request_id}   that request; 404 if it is unknown or was forgotten
    GET /usage                totals since the engine's start
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import AuthenticationError, MethodNotAllowedError, RouteNotFoundError, ServingError
from serving.http.bearer import BearerKey
from serving.settings.telemetry import TelemetrySettings

_MAX_KEPT = 10_000
_KEPT_S = 600.0
_PATH = "/usage"
_REQUEST_ID = b"x-request-id"
# vLLM's names of the sequences of one request: `chatcmpl-<id>`, `cmpl-<id>-<prompt>`.
_CHAT = "chatcmpl-"
_COMPLETION = re.compile(r"cmpl-(.*)-\d+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SequenceCounts:
    """Tokens of one sequence, as counted by the engine's metrics so far."""

    num_prompt_tokens: int = 0
    """0 until the prompt was computed: a sequence that only queued cost nothing."""
    num_image_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(slots=True)
class _Entry:
    """One request. Sequences of the same prompt (`n` > 1) share its prompt tokens, as in OpenAI's usage."""

    prompts: dict[str, SequenceCounts] = field(default_factory=dict)
    num_completion_tokens: int = 0
    finish_reason: str = ""
    num_open: int = 0
    """HTTP requests with this id whose answers are not complete."""
    live: dict[str, tuple[str, Callable[[], SequenceCounts]]] = field(default_factory=dict)
    finished_s: float = 0.0

    @property
    def is_finished(self) -> bool:
        return not self.live and not self.num_open

    def add(self, prompt: str, counts: SequenceCounts) -> None:
        """Add the counts of a sequence that has ended."""
        known = self.prompts.get(prompt)
        if known is None or counts.num_prompt_tokens > known.num_prompt_tokens:
            self.prompts[prompt] = counts
        self.num_completion_tokens += counts.num_completion_tokens

    def now(self) -> _Entry:
        """Return the usage including the request's running sequences."""
        if not self.live:
            return self
        present = _Entry(dict(self.prompts), self.num_completion_tokens)
        for prompt, read in self.live.values():
            present.add(prompt, read())
        return present

    def total(self, name: str) -> int:
        return sum(getattr(counts, name) for counts in self.prompts.values())


class EngineUsage:
    """The usage of an engine's requests. The engine's front end reports sequences, the HTTP server reports requests.

    Requests with the same id add up, so that all tries of a request are counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_ns = time.time_ns()
        self._running: dict[str, _Entry] = {}
        self._finished: OrderedDict[str, _Entry] = OrderedDict()
        self._owners: dict[str, str] = {}
        self._num_requests = 0
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0

    def open(self, request_id: str) -> None:
        """Record the arrival of an HTTP request. It is not finished before `close`, whatever its sequences do."""
        self._enter(request_id).num_open += 1

    def close(self, request_id: str) -> None:
        """Record that the HTTP request was answered, or that its client disconnected."""
        self._running[request_id].num_open -= 1
        self._settle(request_id)

    def begin(self, sequence_id: str, engine_id: str, read: Callable[[], SequenceCounts]) -> None:
        """Record the start of a sequence.

        Args:
            sequence_id: unique among running sequences.
            engine_id: the engine's name of its prompt, see `request_id_of`.
            read: returns its counts; called when usage is requested and when the sequence ends.
        """
        request_id = self.request_id_of(engine_id)
        self._enter(request_id).live[sequence_id] = (engine_id, read)
        self._owners[sequence_id] = request_id

    def end(self, sequence_id: str, finish_reason: str) -> None:
        """Record the end of a sequence. Unknown sequences are ignored."""
        request_id = self._owners.pop(sequence_id, None)
        if request_id is None:
            return
        entry = self._running[request_id]
        before = entry.total("num_prompt_tokens")
        prompt, read = entry.live.pop(sequence_id)
        counts = read()
        entry.add(prompt, counts)
        self._num_requests += int(not before and entry.total("num_prompt_tokens") > 0)
        if not entry.finish_reason or finish_reason == "abort":
            entry.finish_reason = finish_reason
        self._num_prompt_tokens += entry.total("num_prompt_tokens") - before
        self._num_completion_tokens += counts.num_completion_tokens
        self._settle(request_id)

    def end_all(self, finish_reason: str) -> None:
        """Record that the engine has died: end all running sequences."""
        for sequence_id in list(self._owners):
            self.end(sequence_id, finish_reason)

    def find(self, request_id: str) -> dict[str, Any] | None:
        """Return a request's usage, or None if it is unknown or was forgotten."""
        self._forget()
        entry = self._running.get(request_id) or self._finished.get(request_id)
        if entry is None:
            return None
        present = entry.now()
        return {
            "request_id": request_id,
            "prompt_tokens": present.total("num_prompt_tokens"),
            "image_tokens": present.total("num_image_tokens"),
            "cached_tokens": present.total("num_cached_tokens"),
            "completion_tokens": present.num_completion_tokens,
            "finish_reason": entry.finish_reason,
            "is_finished": entry.is_finished,
        }

    def totals(self) -> dict[str, int]:
        """Return the totals since the start, including running sequences. A prompt with several answers counts once.

        Only requests whose prompt was computed count: not those that were refused or ended while queued.
        """
        prompt, completion, requests = self._num_prompt_tokens, self._num_completion_tokens, self._num_requests
        for entry in self._running.values():
            if entry.live:
                present = entry.now()
                before = entry.total("num_prompt_tokens")
                prompt += present.total("num_prompt_tokens") - before
                requests += int(not before and present.total("num_prompt_tokens") > 0)
                completion += present.num_completion_tokens - entry.num_completion_tokens
        return {
            "started_ns": self._started_ns,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "requests": requests,
            "running": len(self._running),
        }

    def request_id_of(self, engine_id: str) -> str:
        """Return the request behind vLLM's name of a prompt. An id that was passed to `open` is used exactly."""
        if engine_id.startswith(_CHAT):
            plain = engine_id.removeprefix(_CHAT)
            return plain if plain in self._running else _without_number(plain, self._running)
        found = _COMPLETION.fullmatch(engine_id)
        return found[1] if found else engine_id

    def _enter(self, request_id: str) -> _Entry:
        entry = self._running.get(request_id)
        if entry is None:
            entry = self._finished.pop(request_id, None)
            if entry is None:
                entry = _Entry()
            self._running[request_id] = entry
        return entry

    def _settle(self, request_id: str) -> None:
        entry = self._running[request_id]
        if entry.is_finished:
            del self._running[request_id]
            entry.finished_s = self._clock()
            self._finished[request_id] = entry
            self._forget()

    def _forget(self) -> None:
        oldest_s = self._clock() - _KEPT_S
        while self._finished:
            request_id, entry = next(iter(self._finished.items()))
            if len(self._finished) <= _MAX_KEPT and entry.finished_s >= oldest_s:
                return
            del self._finished[request_id]


def _without_number(name: str, known: dict[str, _Entry]) -> str:
    """Return the request id of a chat with several prompts, which are numbered `<id>_<prompt>`."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() and stem in known else name


class UsageSource(Protocol):
    """The usage as `UsageApp` needs it; `EngineUsage` documents the methods."""

    def open(self, request_id: str) -> None: ...

    def close(self, request_id: str) -> None: ...

    def find(self, request_id: str) -> dict[str, Any] | None: ...

    def totals(self) -> dict[str, int]: ...


class UsageApp:
    """ASGI middleware around an engine's app: checks the key, reports requests to the usage, and serves the usage.

    vLLM itself requires its key below `/v1` only; tokenizing, engine control and `/invocations` would be open.
    """

    def __init__(
        self, app: ASGIApp, usage: UsageSource, api_key: str | None, telemetry: TelemetrySettings | None = None
    ) -> None:
        """Set up the middleware.

        Args:
            app: the engine's app.
            usage: the engine's usage.
            api_key: required on every route except `/health`, and except `/metrics` if it has its own rule.
            telemetry: whether `/metrics` has a key of its own or is open.
        """
        self._app = app
        self._usage = usage
        self._key = BearerKey(api_key)
        self._metrics_key = self._key
        if telemetry is not None and (telemetry.metrics_key is not None or telemetry.opens_metrics):
            self._metrics_key = BearerKey(telemetry.metrics_key)
        self.num_running = 0
        """HTTP requests in progress."""
        self.last_end_s = float("-inf")
        """When the last HTTP request ended (monotonic seconds)."""
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no HTTP request is in progress."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._lets_in(scope):
            await _send_json(send, 401, AuthenticationError("The engine's key is wanted here.").body())
        elif scope["path"] == _PATH or scope["path"].startswith(f"{_PATH}/"):
            await self._answer(scope, send)
        elif scope["method"] == "POST":
            await self._follow(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"").decode("latin-1")
        self.num_running += 1
        self._idle.clear()
        if request_id:
            self._usage.open(request_id)
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_running -= 1
            self.last_end_s = time.monotonic()
            if not self.num_running:
                self._idle.set()
            if request_id:
                self._usage.close(request_id)

    async def _answer(self, scope: Scope, send: Send) -> None:
        try:
            status, body = 200, self._find(scope)
        except ServingError as error:
            status, body = error.http_status, error.body()
        await _send_json(send, status, body)

    def _lets_in(self, scope: Scope) -> bool:
        path = scope["path"]
        if path == "/health":
            return True
        if path.rstrip("/") == "/metrics":
            return self._metrics_key.lets_in(scope) or self._key.lets_in(scope)
        return self._key.lets_in(scope)

    def _find(self, scope: Scope) -> dict[str, Any]:
        if scope["method"] != "GET":
            raise MethodNotAllowedError(f"{_PATH} answers GET only.", "GET")
        request_id = scope["path"].removeprefix(_PATH).removeprefix("/")
        found = self._usage.find(request_id) if request_id else self._usage.totals()
        if found is None:
            raise RouteNotFoundError("This engine knows of no such request, or does no longer.")
        return found


async def _send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(body)})
