"""Serves an ASGI app on its own port inside an existing event loop, for example a Ray Serve replica's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from serving.http.protocol import build_protocol
from serving.settings.router import LimitSettings

_BACKLOG = 2048
_KEEP_ALIVE_S = 75


class _SignallessServer(uvicorn.Server):
    """Does not install signal handlers: the process's signals belong to Ray."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Binds its port when created, serves until stopped, and lets running requests finish."""

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        drain_s: float,
        shares_port: bool = False,
        has_lifespan: bool = False,
        limits: LimitSettings | None = None,
    ) -> None:
        """Bind the address.

        Args:
            app: the ASGI app.
            host: address to listen on.
            port: port to listen on; 0 picks a free one, see `port`.
            drain_s: how long `stop` waits for running requests.
            shares_port: let other processes listen on the same port; the kernel balances connections over them.
            has_lifespan: whether to send ASGI lifespan events to the app.
            limits: protection against untrusted clients; None for an internal server.

        Raises:
            OSError: the address is in use or does not belong to this machine.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # The protocol is named because asyncio disables Nagle's algorithm only on sockets that are explicitly TCP.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares_port:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        config = uvicorn.Config(
            app,
            http=build_protocol(limits),
            loop="none",
            lifespan="on" if has_lifespan else "off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        self._server = _SignallessServer(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def connections(self) -> set[Any]:
        """The open connections, as uvicorn's protocol objects."""
        return self._server.server_state.connections

    @property
    def is_serving(self) -> bool:
        return self._task is not None and not self._task.done() and self._server.started

    async def start(self) -> None:
        """Start serving.

        Raises:
            RuntimeError: the app failed to start.
        """
        self._task = asyncio.get_running_loop().create_task(self._serve())
        while not self._server.started:
            if self._task.done():
                raise RuntimeError("the HTTP server ended before it had started; see the log above")
            await asyncio.sleep(0.01)

    async def _serve(self) -> None:
        # uvicorn exits the process if the app fails to start; here the process and its event loop belong to someone
        # else.
        with contextlib.suppress(SystemExit):
            await self._server.serve(sockets=[self._socket])

    async def stop(self) -> None:
        """Stop listening, wait for running requests for at most `drain_s`, and end."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task])
        self._socket.close()
