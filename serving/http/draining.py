"""ASGI middleware for graceful shutdown: no request on an open connection is lost."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_GRACE_S = 1.0
"""Within this time a client that uses its connection continuously has sent another request and has been answered with
`connection: close`."""
_READY = "/ready"
_NOT_READY = b'{"ready":false,"draining":true}'


class Drainable:
    """Counts running requests. `drain` makes clients move to other servers.

    A server that simply closes idle connections when it stops loses requests that are sent at that moment, and a client
    that sends one request after another always sends one right after an answer. Therefore every answer first announces
    that its connection closes (`connection: close`). Answers that had begun earlier could not announce it: they, and
    the next requests of their clients, are waited for.
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
        """Close connections with their answers and make `/ready` fail. Return when the server may be stopped: all
        running requests have announced the close, or their time is over.
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
