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


@dataclass
class Load:
    """Workers that keep requests going until told to stop."""

    url: str
    model: str
    num_streams: int = 32
    num_whole: int = 32
    tokens: int = 60
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body."""
    streams: Counter[Seen] = field(default_factory=Counter)
    whole: Counter[Seen] = field(default_factory=Counter)
    lost: int = 0
    """Whole requests that failed although their client did what the official clients do: try again, twice."""
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

    def _body(self, *, is_stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Read this."}]
        return {"model": self.model, "messages": messages, "max_tokens": self.tokens, "stream": is_stream, **self.extra}

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
        last = tail.rstrip().rpartition(b"data: ")[2]
        if last == b"[DONE]":
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
        num_tokens = orjson.loads(body)["usage"]["completion_tokens"]
        return Seen.COMPLETE if num_tokens == self.tokens else Seen.SILENT
