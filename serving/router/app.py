"""The router's ASGI app: its routes, and the assembly of the parts behind them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import orjson
from starlette.types import Receive, Scope, Send

from serving.cluster.directory import EMPTY, RouterReport, ServiceRecord, Snapshot
from serving.errors import (
    InternalError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ServingError,
)
from serving.http.bodies import ClientGoneError, discard_body
from serving.http.cors import CorsRules
from serving.http.reply import Reply
from serving.router.access.arrival import read_arrival
from serving.router.access.auth import Authenticator
from serving.router.access.control import AccessControl, Incoming
from serving.router.access.limits import TenantLimits
from serving.router.accounting.accounts import Accounts, Journal, build_ledger
from serving.router.dialects import DIALECTS
from serving.router.generation import Generation
from serving.router.lookups.openapi import build_document
from serving.router.lookups.routes import GET_ROUTES, MODEL, QUOTE, Lookups
from serving.router.lookups.state import RouterState
from serving.router.lookups.tokens import TOKEN_ROUTES, TokenLookups
from serving.router.relay.ocr_relay import DocumentRelay, find_charge, is_for_ocr
from serving.router.relay.replica_relay import Relay
from serving.router.request.remote_images import RemoteImages
from serving.router.scheduling.dispatcher import Dispatcher
from serving.settings.base import is_loopback
from serving.settings.stack import Settings
from serving.telemetry.gauges import read_settings
from serving.telemetry.router_metrics import Reading, RouterMetrics
from serving.telemetry.targets import Group, list_targets

if TYPE_CHECKING:
    from serving.telemetry.traces import Traces

logger = logging.getLogger(__name__)

GENERATE = ("/v1/chat/completions", "/v1/completions", *DIALECTS)
OPEN = ("/health", "/ready", "/openapi.json")
_PROBES = ("/health", "/ready")
"""Requested by monitoring systems, under any host name."""
METHODS = dict.fromkeys((*GENERATE, *TOKEN_ROUTES, QUOTE), "POST") | dict.fromkeys((*GET_ROUTES, *OPEN), "GET")
"""Every route except the OCR service's (`is_for_ocr`) and single models (`MODEL`)."""
_ALLOWED = {"GET": "GET, HEAD, OPTIONS", "POST": "POST, OPTIONS"}
"""The methods of a route by its own."""


class RouterApp:
    """The app. Requests come through `__call__`; its owner calls `refresh`, `tick`, `report` and `absorb`."""

    def __init__(
        self,
        settings: Settings,
        read_snapshot: Callable[[], Snapshot] = lambda: EMPTY,
        *,
        has_ledger: bool = False,
        journal: Journal | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            settings: all settings.
            read_snapshot: returns the current replica list.
            has_ledger: whether rows go into the ledger named in the settings.
            journal: receives the rows of requests instead.

        Raises:
            SettingsError: the keys file cannot be used.
        """
        self.settings = settings
        self.router_id = uuid.uuid4().hex[:12]
        self.metrics_url = ""
        """Where this router's metrics are served, if anywhere: reported to the other routers, which list it for
        Prometheus."""
        self.url = ""
        """Where it answers, if known: reported to OCR services."""
        self._others: tuple[RouterReport, ...] = ()
        self._read_snapshot = read_snapshot
        key = settings.engine.api_key
        self._relay = Relay(settings.router, key.get_secret_value() if key is not None else None)
        self._keys = Authenticator(settings.router.keys_file, is_local=is_loopback(settings.router.host))
        self.access = AccessControl(settings, self._keys, TenantLimits(time.monotonic))
        self.dispatcher = Dispatcher(settings, read_snapshot, router_id=self.router_id, rng=random.Random())
        self._metrics = RouterMetrics(self._read_gauges)
        self.accounts = Accounts(
            settings,
            self.router_id,
            self.access.limits,
            self._metrics,
            self._relay.fetch_usage,
            build_ledger(settings, self.router_id) if has_ledger else None,
            journal,
        )
        self._remote = RemoteImages(settings.router.remote_images)
        self._documents = DocumentRelay(settings.router, settings.ocr)
        self._state = RouterState(self.router_id, read_snapshot, self.dispatcher, self.access.limits)
        self._lookups = Lookups(
            settings,
            read_snapshot,
            self.dispatcher,
            self.accounts,
            self._state,
            self._documents,
            self.access,
            self.list_targets,
        )
        self._tokens = TokenLookups(settings, self.access, self._relay, read_snapshot)
        self._traces = _build_traces(settings, self.router_id)
        self._document = orjson.dumps(build_document(settings))
        self._generation = Generation(
            settings,
            self.access,
            self.dispatcher,
            self._relay,
            self._remote,
            self.accounts,
            self._documents,
            self._traces,
        )

    async def start(self) -> None:
        """Must run inside the event loop that serves."""
        await self.accounts.start()
        await self._relay.start()
        await self._remote.start()
        await self._documents.start()

    async def close(self) -> None:
        self.dispatcher.close()
        await self.accounts.close()
        await self._remote.close()
        await self._documents.close()
        await self._relay.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued, in flight or still to be settled, and no document is relayed."""
        return self.dispatcher.is_idle and self.accounts.num_settling == 0 and self._documents.num_open == 0

    def refresh(self) -> None:
        """The replica list has changed, or the whole stack is shutting down."""
        self.access.is_stopping = self._read_snapshot().is_stopping
        self.dispatcher.refresh()

    def tick(self) -> None:
        """Called about twice a second, for keys that have changed and requests that have been queued too long."""
        asyncio.get_running_loop().run_in_executor(
            None, self._keys.reload_if_changed
        )  # thousands of keys take a while to read
        self.dispatcher.tick()
        self.accounts.see_replicas(self._read_snapshot())

    def report(self) -> RouterReport:
        """What the other routers need to know about this one."""
        return RouterReport(
            router_id=self.router_id,
            queued_work=tuple(self.dispatcher.queued_work().items()),
            replica_work=tuple(self.dispatcher.replica_work().items()),
            tenants=self.access.limits.uses(),
            metrics_url=self.metrics_url,
            url=self.url,
        )

    def list_targets(self) -> list[Group]:
        """Prometheus's scrape targets: engines, routers and OCR services, as far as this router knows."""
        return list_targets(self._read_snapshot(), (self.report(), *self._others), self._documents.services)

    def render_metrics(self) -> bytes:
        """The metrics in Prometheus's text format. Each router serves them on a port of its own: the public one is
        shared."""
        return self._metrics.render()

    def absorb(self, reports: tuple[RouterReport, ...]) -> None:
        """Take in the other routers' reports."""
        self._others = reports
        self.dispatcher.absorb(reports)
        self.access.limits.absorb(reports)

    def follow_services(self, services: tuple[ServiceRecord, ...]) -> None:
        """These are the OCR services from now on."""
        self._documents.update(services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request. Every failure becomes an answer in OpenAI's shape."""
        if scope["type"] != "http":
            return
        incoming, refusal = read_arrival(scope, receive, send)
        reply = incoming.reply
        try:
            if refusal is not None:
                await discard_body(receive, self.settings.router.limits)
                raise refusal
            cors = self.access.cors
            if cors is not None and cors.allows(incoming.headers) and await _answer_page(cors, incoming):
                return
            await self._route(incoming)
        except ServingError as error:
            await reply.send_error(error)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("the router failed on %s %s (%s)", scope["method"], scope["path"], incoming.request_id)
            failure = InternalError("The router failed on this request; it has been logged.")
            await (reply.end_with_error(failure) if reply.has_begun else reply.send_error(failure))

    async def _route(self, incoming: Incoming) -> None:
        path, method, reply = incoming.path, incoming.scope["method"], incoming.reply
        if is_for_ocr(path):
            await self._relay_documents(incoming)
            return
        if path not in _PROBES:
            await self.access.check_source(incoming)
        allowed = "GET" if path.startswith(MODEL) else METHODS.get(path)
        if method == "OPTIONS" and (allowed is not None or path == "*"):
            reply.headers.append((b"allow", _ALLOWED.get(allowed or "", "GET, HEAD, POST, OPTIONS").encode()))
            await reply.send_empty(204)
            return
        if allowed is None:
            raise RouteNotFoundError(f"No route matches {method} {incoming.scope['path'][:200]}.")
        if method != allowed and not (allowed == "GET" and method == "HEAD"):
            raise MethodNotAllowedError(f"{path} supports {allowed} only.", _ALLOWED[allowed])
        await self.access.check_open(incoming)
        if path in GENERATE:
            await self._generation.serve(incoming)
        elif path == "/health":
            await reply.send_body(200, b'{"status":"up"}')
        elif path == "/ready":
            await self._answer_ready(reply)
        elif path == "/openapi.json":
            await reply.send_body(200, self._document)
        elif path in TOKEN_ROUTES:
            await self._tokens.answer(incoming)
        elif path == QUOTE:
            await self._lookups.answer_quote(incoming)
        else:
            await self._lookups.answer(incoming)

    async def _relay_documents(self, incoming: Incoming) -> None:
        """Relay to an OCR service. The playground's files are public; a document is not even read without a key."""
        self._documents.check_enabled()
        scope = {**incoming.scope, "path": incoming.path or "/"}
        charge = find_charge(scope["method"], incoming.path)
        await self.access.check_source(incoming, is_page=charge is None, takes_forms=True)
        await self.access.check_open(incoming)
        if charge is None:
            await self._documents.relay(incoming.request_id, scope, incoming.receive, incoming.reply)
            return
        identity = await self.access.identify(incoming)
        async with self.access.admitted(incoming, identity, charge):
            incoming.reply.headers += self.access.limits.headers(identity, time.monotonic())
            await self._documents.relay(incoming.request_id, scope, incoming.receive, incoming.reply, identity)

    async def _answer_ready(self, reply: Reply) -> None:
        snapshot = self._read_snapshot()
        counts = {name: len(snapshot.ready(name)) for name in self.settings.models}
        is_ready = any(counts.values()) and not snapshot.is_stopping
        await reply.send_body(200 if is_ready else 503, orjson.dumps({"ready": is_ready, "replicas": counts}))

    def _read_gauges(self) -> Iterator[Reading]:
        yield from self._state.read_gauges()
        yield from self.accounts.read_gauges()
        yield from read_settings(self.settings)


async def _answer_page(cors: CorsRules, incoming: Incoming) -> bool:
    """Let a page of an allowed origin read the answer. Returns whether this was only its browser's question whether it
    may ask, which comes without a key; it is answered now."""
    reply = incoming.reply
    if incoming.scope["method"] == "OPTIONS" and b"access-control-request-method" in incoming.headers:
        reply.headers += cors.build_preflight(incoming.headers)
        await reply.send_empty(204)
        return True
    reply.headers += cors.build_headers(incoming.headers)
    return False


def _build_traces(settings: Settings, router_id: str) -> Traces | None:
    if settings.telemetry.otlp_endpoint is None:
        return None
    from serving.telemetry.traces import Traces  # imports the whole SDK, which most stacks do not need

    return Traces(settings.telemetry, router_id)
