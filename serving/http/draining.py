"""ASGI middleware that lets a server go without losing a request of anybody who is connected to it."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_GRACE_S = 1.0
"""Within it a client that keeps a connection busy has asked again, and has been told that it closes."""
_READY = "/ready"
_NOT_READY = b'{"ready":false,"draining":true}'


class Drainable:
    """Counts what runs. `drain` has clients take their connections elsewhere.

    A server that just closes its idle connections when it stops loses the requests that are sent at that moment, and
    clients that send one after another always send one: as soon as they have their answer. So each answer says first
    that its connection closes after it (`connection: close`); answers that had begun before could not say so, and are
    waited for, and their clients' next requests as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_draining = False
        self._num_old = 0
        self._no_old = asyncio.Event()
        self._no_old.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._is_draining:
            await self._answer_last(scope, receive, send)
        else:
            self._num_old += 1
            self._no_old.clear()
            try:
                await self._app(scope, receive, send)
            finally:
                self._num_old -= 1
                if not self._num_old:
                    self._no_old.set()

    async def drain(self, timeout_s: float) -> None:
        """From now on answers close their connections, and `/ready` says no. Returns when the server may be stopped:
        what still runs then has said so, or has had its time.
        """
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_old.wait(), timeout_s)
        await asyncio.sleep(min(_GRACE_S, timeout_s))

    async def _answer_last(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        if scope["path"] != _READY:
            await self._app(scope, receive, send_closing)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_NOT_READY))]
        await send_closing({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": _NOT_READY})
