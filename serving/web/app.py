"""The playground's routes, for the Starlette app that also serves `/v1/ocr`.

    Starlette(routes=[*routes_of_the_service, *build_routes()])

`GET /` is the page, `/playground/...` its files. The page sends requests to `v1/ocr` and `v1/models` of its own origin
by relative URLs, so it also works behind a path prefix. The API key that a user enters is sent in the `Authorization`
header of these requests and nowhere else. The page contacts no third party; its content security policy enforces that.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STATIC = Path(__file__).parent / "static"

HEADERS = {
    # https://www.w3.org/TR/CSP3/: only the page's own files. Page images are created in the browser (blob:) or are part
    # of the answer (data:). Text is never turned into markup (trusted types).
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",  # with an ETag: new versions are used immediately
}
"""Headers of every response of the playground."""


def build_routes() -> list[BaseRoute]:
    """Routes for GET and HEAD. Unknown files raise Starlette's 404, which the surrounding app renders."""
    return [
        Route("/", _show_page),
        Route("/playground/sample.png", _show_sample),
        Mount("/playground", _Guarded(StaticFiles(directory=_STATIC)), name="playground"),
    ]


async def _show_page(request: Request) -> Response:
    return FileResponse(_STATIC / "index.html", headers=HEADERS)


async def _show_sample(request: Request) -> Response:
    """A page that the bundled checkpoint can read."""
    file = Path(str(importlib.resources.files("serving.nano") / "sample.png"))
    return FileResponse(file, headers=HEADERS)


class _Guarded:
    """Adds the headers to all responses of an app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)
