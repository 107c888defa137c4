"""The routes that only read: models, quotes, usage, costs and the router's own state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from serving.cluster.directory import Snapshot
from serving.errors import InvalidRequestError, ModelNotFoundError, PermissionDeniedError
from serving.http.bodies import decode_json, read_body, replay_body
from serving.router.access.auth import check_model_allowed
from serving.router.access.control import AccessControl, Incoming
from serving.router.access.limits import COUNTED_DOCUMENT, LOOKUP, Charge
from serving.router.accounting.accounts import Accounts
from serving.router.lookups.model_cards import build_cards
from serving.router.lookups.state import RouterState
from serving.router.lookups.usage_reports import (
    answer_costs,
    answer_openai_usage,
    answer_quote,
    answer_usage,
    parse_query,
)
from serving.router.relay.ocr_relay import DocumentRelay
from serving.router.request.parsing import parse_request
from serving.router.scheduling.dispatcher import Dispatcher
from serving.router.scheduling.work_estimate import read_images
from serving.settings.stack import Settings
from serving.settings.tenants import Identity
from serving.telemetry.targets import Group, render_targets

MODEL = "/v1/models/"
TENANT = "/v1/tenant"
TARGETS = "/metrics/targets"
GET_ROUTES: Mapping[str, Charge | None] = {
    "/v1/models": None,
    TENANT: None,
    "/v1/usage": LOOKUP,
    "/v1/organization/usage/completions": LOOKUP,
    "/admin/state": None,
    "/admin/costs": LOOKUP,
    TARGETS: None,
}
"""What each counts as. What this router has in memory is free: OCR services ask whose key it is, and user interfaces
list the models, on behalf of tenants who want something else."""
QUOTE = "/v1/quote"


class Lookups:
    """Answers these routes."""

    def __init__(
        self,
        settings: Settings,
        read_snapshot: Callable[[], Snapshot],
        dispatcher: Dispatcher,
        accounts: Accounts,
        state: RouterState,
        documents: DocumentRelay,
        access: AccessControl,
        list_targets: Callable[[], list[Group]] = list,
    ) -> None:
        self._settings = settings
        self._read_snapshot = read_snapshot
        self._dispatcher = dispatcher
        self._accounts = accounts
        self._state = state
        self._documents = documents
        self._access = access
        self._list_targets = list_targets
        self._started_s = int(time.time())

    async def answer(self, incoming: Incoming) -> None:
        """Answer one of `GET_ROUTES`, or a model of `MODEL`.

        Raises:
            ServingError: what is wrong with the request.
        """
        identity = await self._access.identify(incoming)
        charge = GET_ROUTES.get(incoming.path)
        if charge is None:
            await self._answer(incoming, identity)
            return
        async with self._access.admitted(incoming, identity, charge):
            incoming.reply.headers += self._access.limits.headers(identity, time.monotonic())
            await self._answer(incoming, identity)

    async def _answer(self, incoming: Incoming, identity: Identity) -> None:
        path, content_type = incoming.path, "application/json"
        query = parse_query(incoming.scope["query_string"])
        found: bytes | dict[str, Any]
        if path == "/v1/models":
            found = {"object": "list", "data": self._model_cards(identity)}
        elif path == TENANT:
            found = {"object": "tenant", "id": identity.tenant_id, "key_id": identity.key_id or None}
        elif path.startswith(MODEL):
            found = self._find_card(path.removeprefix(MODEL), identity)
        elif path == "/v1/usage":
            found, content_type = await answer_usage(self._accounts.ledger, identity, query)
        else:
            _check_admin(identity)
            if path == TARGETS:
                found = render_targets(self._list_targets())
            elif path == "/admin/state":
                found = self._state.describe()
            elif path == "/admin/costs":
                found = await answer_costs(self._accounts.ledger, query)
            else:
                found = await answer_openai_usage(self._accounts.ledger, query)
        body = found if isinstance(found, bytes) else orjson.dumps(found)
        await incoming.reply.send_body(200, body, content_type=content_type.encode())

    async def answer_quote(self, incoming: Incoming) -> None:
        """Answer `QUOTE`: for a chat or a completion, or for a document, which the OCR service has to open.

        Raises:
            ServingError: what is wrong with the request.
            ClientGoneError: the client has left.
        """
        identity = await self._access.identify(incoming)
        with self._access.bodies.open() as held:
            async with contextlib.AsyncExitStack() as admitted:
                # A service asks for a quote of every page of a document whose own quote was counted.
                if self._access.read_credit(incoming) is None:
                    await admitted.enter_async_context(self._access.admitted(incoming, identity, LOOKUP))
                    incoming.reply.headers += self._access.limits.headers(identity, time.monotonic())
                body = await read_body(incoming.scope, incoming.receive, self._settings.router.limits, held)
                path = self._find_quoted(body)
                if path is not None:
                    await incoming.reply.send_body(200, orjson.dumps(self._quote(identity, path, body)))
                    return
            async with self._access.admitted(incoming, identity, COUNTED_DOCUMENT):
                scope, receive = replay_body(incoming.scope, body, incoming.receive)
                await self._documents.relay_quote(incoming.request_id, scope, receive, incoming.reply, identity)

    def _find_quoted(self, body: bytes) -> str | None:
        """The path of the request to be quoted; None for a document."""
        given = decode_json(body, self._settings.router.limits)
        if "document" in given and not given.keys() & {"messages", "prompt"}:
            return None
        return "/v1/chat/completions" if "messages" in given else "/v1/completions"

    def _quote(self, identity: Identity, path: str, body: bytes) -> dict[str, Any]:
        request = parse_request(path, body, self._settings)
        check_model_allowed(identity, request.model, *self._settings.models[request.model].aliases)
        if request.documents:
            raise InvalidRequestError(
                'To quote a document, send it as "document", as to POST /v1/ocr.', param=request.documents[0].param
            )
        replica = self._dispatcher.sample(request.model)
        reading = read_images(request, replica)
        return answer_quote(self._accounts, identity, request, reading, replica.max_model_len if replica else 0)

    def _model_cards(self, identity: Identity) -> list[dict[str, Any]]:
        """OpenAI's model cards: every name that a request may use, with the model behind it as `root`."""
        snapshot, now_ns = self._read_snapshot(), time.time_ns()
        cards: list[dict[str, Any]] = []
        for name, model in self._settings.models.items():
            try:
                check_model_allowed(identity, name, *model.aliases)
            except PermissionDeniedError:
                continue
            price = self._accounts.find_price(name, identity.tenant_id, now_ns)
            cards += build_cards(name, model, price, snapshot.ready(name), self._started_s)
        return cards

    def _find_card(self, name: str, identity: Identity) -> dict[str, Any]:
        card = next((card for card in self._model_cards(identity) if card["id"] == name), None)
        if card is None:
            raise ModelNotFoundError(f"The model '{name[:100]}' does not exist; GET /v1/models lists those that do.")
        return card


def _check_admin(identity: Identity) -> None:
    if not identity.is_admin:
        raise PermissionDeniedError("This requires an admin key; `serving keys create --admin` creates one.")
