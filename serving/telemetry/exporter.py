"""Serves a process's metrics on its own port: routers share their public port, where any of them could answer."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from serving.http.addresses import http_url
from serving.http.bearer import BearerKey
from serving.http.server import HttpServer
from serving.telemetry.targets import Group, render_targets

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class MetricsApp:
    """The ASGI app: `GET /metrics`, and `GET /metrics/targets` for Prometheus' HTTP service discovery."""

    def __init__(
        self, render: Callable[[], bytes], list_targets: Callable[[], list[Group]], key: SecretStr | None = None
    ) -> None:
        """Create the app.

        Args:
            render: returns the metrics in Prometheus' text format.
            list_targets: returns the current scrape targets.
            key: bearer token that a scrape must send; None accepts every request.
        """
        self._render = render
        self._list_targets = list_targets
        self._key = BearerKey(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] not in ("/metrics", "/metrics/targets"):
            await _send(send, 404, b"There are /metrics and /metrics/targets here.\n")
        elif scope["method"] not in ("GET", "HEAD"):
            await _send(send, 405, b"/metrics answers GET only.\n", (b"allow", b"GET"))
        elif not self._key.lets_in(scope):
            wanted = b"Bring telemetry.metrics_key as `Authorization: Bearer KEY`.\n"
            await _send(send, 401, wanted, (b"www-authenticate", b"Bearer"))
        elif scope["path"] == "/metrics":
            await _send(send, 200, self._render())
        else:
            await _send(send, 200, render_targets(self._list_targets()), content_type=b"application/json")


async def _send(
    send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes], content_type: bytes = _TEXT
) -> None:
    fixed = ((b"content-type", content_type), (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


class MetricsServer:
    """`MetricsApp` on a free port."""

    def __init__(
        self,
        render: Callable[[], bytes],
        list_targets: Callable[[], list[Group]],
        host: str,
        key: SecretStr | None = None,
    ) -> None:
        """Bind the port.

        Args:
            render: see `MetricsApp`.
            list_targets: see `MetricsApp`.
            host: an address that Prometheus can reach, not a wildcard, because it becomes part of `url`.
            key: see `MetricsApp`.

        Raises:
            OSError: the address does not belong to this machine.
        """
        self._server = HttpServer(MetricsApp(render, list_targets, key), host=host, port=0, drain_s=1)
        self.url = f"{http_url(host, self._server.port)}/metrics"

    @property
    def is_serving(self) -> bool:
        return self._server.is_serving

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()
