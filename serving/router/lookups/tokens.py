"""`POST /tokenize` and `/detokenize`: vLLM's routes, answered by any replica of the model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from serving.cluster.directory import Snapshot
from serving.errors import InvalidRequestError, NoReplicaError
from serving.http.bodies import decode_json, read_body
from serving.router.access.auth import check_model_allowed
from serving.router.access.control import AccessControl, Incoming
from serving.router.access.limits import LOOKUP
from serving.router.relay.replica_relay import Relay
from serving.router.request.checks import MAX_INT, Check, an_object, anything, flag, refuse, text, token_ids
from serving.router.request.fields import check_fields
from serving.router.request.foreign_fields import build_header
from serving.router.request.messages import check_messages
from serving.router.request.parsing import find_model
from serving.settings.stack import Settings

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TOKEN_ROUTES: Mapping[str, str] = {path: name for name in (TOKENIZE, DETOKENIZE) for path in (name, "/v1" + name)}
"""The engine's path by the router's."""
_MAX_TOKENS = 131_072
_TOKENIZE_FIELDS: Mapping[str, Check] = {
    "model": anything,
    "prompt": text(MAX_INT),
    "messages": anything,
    "add_special_tokens": flag,
    "add_generation_prompt": flag,
    "continue_final_message": flag,
    "return_token_strs": flag,
    "mm_processor_kwargs": an_object,
}
_DETOKENIZE_FIELDS: Mapping[str, Check] = {"model": anything, "tokens": token_ids(_MAX_TOKENS)}


@dataclass(frozen=True, slots=True)
class TokenLookups:
    """Answers these routes, which count as look-ups."""

    settings: Settings
    access: AccessControl
    relay: Relay
    read_snapshot: Callable[[], Snapshot]

    async def answer(self, incoming: Incoming) -> None:
        """Answer one request.

        Raises:
            ServingError: what is wrong with it, or no replica can answer.
            ClientGoneError: the client has left.
        """
        identity = await self.access.identify(incoming)
        path, reply = TOKEN_ROUTES[incoming.path], incoming.reply
        async with self.access.admitted(incoming, identity, LOOKUP):
            reply.headers += self.access.limits.headers(identity, time.monotonic())
            with self.access.bodies.open() as held:
                body = await read_body(incoming.scope, incoming.receive, self.settings.router.limits, held)
                model, payload, ignored = self._parse(path, body)
                check_model_allowed(identity, model, *self.settings.models[model].aliases)
                if ignored:
                    reply.headers.append(build_header(ignored))
                ready = self.read_snapshot().ready(model)
                if not ready:
                    raise NoReplicaError("No replica of this model is ready; try again shortly.")
                replica = random.choice(ready)
                is_chat = "messages" in payload
                found = await self.relay.ask(replica, path, orjson.dumps(payload), incoming.request_id, is_chat=is_chat)
        await reply.send_body(200, found)

    def _parse(self, path: str, body: bytes) -> tuple[str, dict[str, Any], list[str]]:
        """The model, the engine's body, and names of fields without effect."""
        router = self.settings.router
        payload = decode_json(body, router.limits)
        model = find_model(payload.get("model"), self.settings)
        fields = _TOKENIZE_FIELDS if path == TOKENIZE else _DETOKENIZE_FIELDS
        report = check_fields(payload, fields, refuses_unknown=router.unknown_fields == "refuse")
        for name in report.dropped:
            payload.pop(name)
        if path == DETOKENIZE:
            if payload.get("tokens") is None:
                raise refuse("tokens", f"a list of at most {_MAX_TOKENS} token ids")
        elif payload.get("messages") is not None:
            content = check_messages(payload["messages"], router)
            if content.sizes or content.documents:
                raise InvalidRequestError(
                    "Only texts are tokenized; POST /v1/quote tells the tokens of images.", param="messages"
                )
        elif payload.get("prompt") is None:
            raise InvalidRequestError("Give either prompt or messages.", param="prompt")
        return model, payload, report.ignored
