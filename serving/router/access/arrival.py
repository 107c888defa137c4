"""What an HTTP request's head says, brought into one form: its id, its path, its key. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from serving.errors import InvalidRequestError, ServingError
from serving.http.bodies import read_headers, read_request_id
from serving.http.reply import Reply
from serving.router.access.control import Incoming
from serving.router.dialects import DIALECTS
from serving.router.dialects.dialect import DialectReply

_PREFIX = "/v1/openai/"  # DeepInfra's
_SLASHES = re.compile("//+")
_KEY_HEADERS = frozenset({b"x-api-key", b"api-key"})
"""Anthropic's and Azure's headers for the key; OpenAI's is `Authorization`."""


def read_arrival(scope: Scope, receive: Receive, send: Send) -> tuple[Incoming, ServingError | None]:
    """The request, and the error in its headers, if any."""
    refusal: ServingError | None = None
    headers: Mapping[bytes, bytes] = {}
    try:
        headers = read_headers(scope)
        if not _KEY_HEADERS.isdisjoint(headers):
            scope, headers = _move_key(scope, headers)
    except InvalidRequestError as error:
        refusal = error
    request_id = read_request_id(headers)
    given = [(b"x-request-id", request_id.encode())]
    path: str = scope["path"]
    if "//" in path:  # of a base URL that ends with a slash
        path = _SLASHES.sub("/", path)
    path = path.rstrip("/")
    is_deepinfra = path.startswith(_PREFIX)
    if is_deepinfra:
        path = "/v1/" + path.removeprefix(_PREFIX)
    if path in DIALECTS:
        dialect = DIALECTS[path](request_id)
        reply: Reply = DialectReply(send, given, headers, dialect)
        return Incoming(request_id, path, is_deepinfra, headers, scope, receive, reply, dialect), refusal
    reply = Reply(send, given, headers)
    return Incoming(request_id, path, is_deepinfra, headers, scope, receive, reply), refusal


def _move_key(scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[Scope, Mapping[bytes, bytes]]:
    """The request with its key in `Authorization`, where everything behind the router looks for it.

    Raises:
        InvalidRequestError: two headers hold different keys.
    """
    keys = {headers[name].strip() for name in _KEY_HEADERS if name in headers}
    given = headers.get(b"authorization")
    if given is not None:
        keys.add(given.partition(b" ")[2].strip())
    if len(keys) > 1:
        raise InvalidRequestError(
            "Authorization, x-api-key and api-key hold different keys; send one.", param="authorization"
        )
    moved = {name: value for name, value in headers.items() if name not in _KEY_HEADERS}
    moved[b"authorization"] = b"Bearer " + keys.pop() if given is None else given
    kept = [(name, value) for name, value in scope["headers"] if name not in _KEY_HEADERS and name != b"authorization"]
    return {**scope, "headers": [*kept, (b"authorization", moved[b"authorization"])]}, moved
