"""The OCR service's ASGI app: its routes, and errors in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from serving.errors import InternalError, MethodNotAllowedError, RequestError, RouteNotFoundError, ServingError
from serving.http.bodies import ClientGoneError, discard_body, read_headers, read_request_id
from serving.http.origins import FORM, JSON, build_rules, check_content_type, check_source
from serving.http.reply import Reply
from serving.ocr.api.documents import DocumentsRoute
from serving.ocr.api.jobs import JobsRoute
from serving.ocr.api.service import OcrService

logger = logging.getLogger(__name__)

Answer = Callable[[Request, Reply], Awaitable[None]]
_PROBES = ("/health", "/ready")
_HEADS = {"GET": ("GET", "HEAD")}
_PREFIX = "/v1/openai/"  # DeepInfra's


class OcrApp:
    """The app. Its host starts and closes the service behind it."""

    def __init__(self, service: OcrService, pages: Sequence[BaseRoute] = ()) -> None:
        """Add `pages` for browsers to the routes of the API."""
        documents, jobs = DocumentsRoute(service), JobsRoute(service)

        def route(path: str, **answers: Answer) -> Route:
            return Route(path, _Endpoint(answers, service))

        routes: list[BaseRoute] = [
            route("/v1/ocr", POST=documents.answer),
            route("/v1/ocr/quote", POST=documents.answer_quote),
            route("/v1/ocr/jobs", POST=jobs.submit, GET=jobs.list_jobs),
            route("/v1/ocr/jobs/{job_id}", GET=jobs.show, DELETE=jobs.delete),
            route("/v1/ocr/jobs/{job_id}/pages", GET=jobs.list_pages),
            route("/v1/ocr/jobs/{job_id}/cancel", POST=jobs.cancel),
            route("/v1/models", GET=_ModelsRoute(service).answer),
            route("/health", GET=_answer_up),
            route("/ready", GET=_answer_up),
            *pages,
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_http_error})
        self._app.router.redirect_slashes = False
        self._service = service
        self._hosts = build_rules(service.settings.ocr.host, service.settings.router.allowed_hosts)

    @property
    def routes(self) -> Sequence[BaseRoute]:
        return self._app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].rstrip("/") or "/"
        if path.startswith(_PREFIX):
            path = "/v1/" + path.removeprefix(_PREFIX)
        if path.startswith("/v1/"):
            scope = {**scope, "path": path}
        try:
            await self._check_source(path, scope)
        except ServingError as error:
            await discard_body(receive, self._service.settings.router.limits)
            await Reply(send).send_error(error)
            return
        await self._app(scope, receive, send)

    async def _check_source(self, path: str, scope: Scope) -> None:
        """Refuse requests that another site's web page may have sent, unless the router requires API keys.

        Raises:
            ServingError: another site may have sent the request; or its headers contradict each other; or no router
                answers whether it requires keys.
        """
        headers = read_headers(scope)
        if path in _PROBES:
            return
        try:
            check_source(headers, self._hosts, is_page=not path.startswith("/v1/"))
            check_content_type(headers, JSON, FORM)
        except RequestError:
            if not await self._service.callers.needs_key():
                raise


class _Endpoint:
    """The methods of one path, with their error handling."""

    def __init__(self, answers: Mapping[str, Answer], service: OcrService) -> None:
        self._answers = answers
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        request_id = read_request_id({})
        try:
            request_id = read_request_id(read_headers(scope))
            reply.headers.append((b"x-request-id", request_id.encode()))
            await self._find(scope["method"])(Request(scope, receive), reply)
        except ServingError as error:
            self._service.metrics.see_refusal(error.code or error.type)
            await (reply.end_with_error(error) if reply.has_begun else reply.send_error(error))
        except ClientGoneError:
            return
        except Exception:
            logger.exception("the OCR service failed on %s %s (%s)", scope["method"], scope["path"], request_id)
            failure = InternalError("The OCR service failed on this request; it has been logged.")
            await (reply.end_with_error(failure) if reply.has_begun else reply.send_error(failure))

    def _find(self, method: str) -> Answer:
        found = self._answers.get("GET" if method == "HEAD" else method)
        if found is None:
            allowed = ", ".join(name for method in self._answers for name in _HEADS.get(method, (method,)))
            raise MethodNotAllowedError(f"This path does not support {method[:20]}; use {allowed}.", allowed)
        return found


class _ModelsRoute:
    """The router's models, for clients that know only this address."""

    def __init__(self, service: OcrService) -> None:
        self._service = service

    async def answer(self, request: Request, reply: Reply) -> None:
        await reply.send_body(200, await self._service.callers.fetch_models(request.headers.get("authorization")))


async def _answer_up(request: Request, reply: Reply) -> None:
    await reply.send_body(200, b'{"status":"up","ready":true}')


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An error of Starlette's routing in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    refusal: ServingError = RouteNotFoundError(f"There is no route {request.method} {request.url.path[:200]}.")
    if status == 405:
        refusal = MethodNotAllowedError("This path does not support the method.", "GET, HEAD")
    return Response(orjson.dumps(refusal.body()), refusal.http_status, refusal.headers, "application/json")
