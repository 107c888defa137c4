"""Cancels work when its client disconnects."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from serving.http.bodies import ClientGoneError


class ClientPresence:
    """`async with ClientPresence(receive):` cancels what runs inside when the client disconnects.

    It then raises ClientGoneError. The body must have been received completely, so that the next ASGI message is the
    disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        self._worker = worker
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not awaited: a cancelled watcher does nothing more, and nothing depends on its end.
        self._watcher.cancel()
        if self._has_left:
            self._worker.uncancel()
            raise ClientGoneError from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._worker.cancel()
