"""The load: streams and whole requests, each judged by what its client saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
import orjson

_ATTEMPTS = 3
_PAUSE_S = 0.5


class Seen(StrEnum):
    """What a client can see of one request."""

    COMPLETE = "complete"
    TOLD = "broken, and told so by an error event"
    SILENT = "broken in silence"
    RESET = "connection lost"
    """The process that held the client's own connection died: no server can tell of that."""
    REFUSED = "refused (429, 503)"
    FAILED = "failed with another status"


@dataclass(frozen=True, slots=True)
class Told:
    """What a whole answer says of itself, for the books to be compared with."""

    request_id: str
    num_tokens: int
    nanodollars: int


@dataclass
class Load:
    """Workers that keep requests going until told to stop."""

    url: str
    model: str
    num_streams: int = 32
    num_whole: int = 32
    num_leaving: int = 0
    """Clients that close their stream in the middle."""
    tokens: int = 60
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body."""
    streams: Counter[Seen] = field(default_factory=Counter)
    whole: Counter[Seen] = field(default_factory=Counter)
    lost: int = 0
    """Whole requests that failed although their client did what the official clients do: try again, twice."""
    told: list[Told] = field(default_factory=list)
    """Of every answer that came whole, stream or not."""
    num_left: int = 0
    _must_stop: bool = False

    async def run(self) -> None:
        """Until `stop` is called; requests that run then are waited for."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
        session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers)
        async with session, asyncio.TaskGroup() as group:
            for _ in range(self.num_streams):
                group.create_task(self._repeat_streams(session))
            for _ in range(self.num_whole):
                group.create_task(self._repeat_whole(session))
            for number in range(self.num_leaving):
                group.create_task(self._repeat_leaving(session, 2 + 3 * number))

    def stop(self) -> None:
        self._must_stop = True

    async def _repeat_streams(self, session: aiohttp.ClientSession) -> None:
        while not self._must_stop:
            seen = await self._stream(session)
            self.streams[seen] += 1
            if seen is not Seen.COMPLETE:
                await asyncio.sleep(_PAUSE_S / 5)

    async def _repeat_whole(self, session: aiohttp.ClientSession) -> None:
        while not self._must_stop:
            for attempt in range(_ATTEMPTS):
                seen = await self._ask_whole(session)
                self.whole[seen] += 1
                if seen is Seen.COMPLETE:
                    break
                await asyncio.sleep(_PAUSE_S * 2**attempt)
            else:
                self.lost += 1

    async def _repeat_leaving(self, session: aiohttp.ClientSession, num_chunks: int) -> None:
        while not self._must_stop:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.post(f"{self.url}/v1/chat/completions", json=self._body(is_stream=True)) as answer:
                    for _ in range(num_chunks):
                        await answer.content.readany()
                    answer.close()
                    self.num_left += 1
            await asyncio.sleep(_PAUSE_S / 5)

    def _body(self, *, is_stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Read this."}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": is_stream,
        }
        if is_stream:
            body["stream_options"] = {"include_usage": True}
        return {**body, **self.extra}

    def _take(self, answer: aiohttp.ClientResponse, usage: dict[str, Any]) -> None:
        cost = round(usage.get("estimated_cost", 0.0) * 1e9)
        self.told.append(Told(answer.headers.get("x-request-id", ""), usage["completion_tokens"], cost))

    async def _stream(self, session: aiohttp.ClientSession) -> Seen:
        tail = b""
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=self._body(is_stream=True)) as answer:
                if answer.status != 200:
                    return Seen.REFUSED if answer.status in (429, 503) else Seen.FAILED
                async for chunk in answer.content.iter_any():
                    tail = (tail + chunk)[-4096:]
        except (aiohttp.ClientError, OSError, TimeoutError):
            return Seen.RESET
        rest, _, last = tail.rstrip().rpartition(b"data: ")
        if last == b"[DONE]":
            self._take(answer, orjson.loads(rest.rstrip().rpartition(b"data: ")[2])["usage"])
            return Seen.COMPLETE
        with contextlib.suppress(orjson.JSONDecodeError):
            if "error" in orjson.loads(last):
                return Seen.TOLD
        return Seen.SILENT

    async def _ask_whole(self, session: aiohttp.ClientSession) -> Seen:
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=self._body(is_stream=False)) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return Seen.RESET
        if answer.status != 200:
            return Seen.REFUSED if answer.status in (429, 503) else Seen.FAILED
        usage = orjson.loads(body)["usage"]
        self._take(answer, usage)
        num_tokens = usage["completion_tokens"]
        return Seen.COMPLETE if num_tokens == self.tokens else Seen.SILENT
