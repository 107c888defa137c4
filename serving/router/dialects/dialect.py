"""What a dialect is, and the reply that speaks it.

A request in a dialect is a chat completion for everything behind it: its body is translated before it is parsed, and
the reply translates what goes to the client. Both are pure but for the sending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import orjson
from starlette.types import Send

from serving.errors import ServingError
from serving.http.reply import Reply

_JSON = b"application/json"
_FRAME_END = b"\n\n"
_DATA = b"data: "


class Dialect(Protocol):
    """One request in another shape. Keeps what its answer repeats."""

    def to_chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The body of the chat completion.

        Raises:
            InvalidRequestError: `param` is a path of the client's body.
        """
        ...

    def begin(self) -> bytes:
        """The first events of a stream."""
        ...

    def feed(self, chunk: dict[str, Any]) -> bytes:
        """The events for one chunk of the chat's stream."""
        ...

    def end(self) -> bytes:
        """The last events of a stream."""
        ...

    def build_answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer for a whole chat completion."""
        ...

    def build_error(self, error: ServingError) -> dict[str, Any]:
        """The body of an error."""
        ...

    def build_error_event(self, error: ServingError) -> bytes:
        """The event that ends a stream which has failed."""
        ...


class DialectReply(Reply):
    """Translates what is sent through it."""

    __slots__ = ("_dialect",)

    def __init__(
        self, send: Send, headers: list[tuple[bytes, bytes]], asked: Mapping[bytes, bytes], dialect: Dialect
    ) -> None:
        super().__init__(send, headers, asked)
        self._dialect = dialect

    async def start_stream(self) -> None:
        await super().start_stream()
        await super().write(self._dialect.begin())

    async def write(self, data: bytes) -> None:
        events = self._translate(data)
        if events:
            await super().write(events)

    async def end(self, data: bytes = b"") -> None:
        await super().end(self._translate(data) + self._dialect.end())

    async def end_with_error(self, error: ServingError) -> None:
        await super().end(self._dialect.build_error_event(error))

    async def send_body(
        self,
        status: int,
        body: bytes,
        extra: Mapping[str, str] | None = None,
        content_type: bytes = _JSON,
    ) -> None:
        if status == 200:
            body = orjson.dumps(self._dialect.build_answer(orjson.loads(body)))
        await super().send_body(status, body, extra, content_type)

    async def send_error(self, error: ServingError) -> None:
        await super().send_body(error.http_status, orjson.dumps(self._dialect.build_error(error)), error.headers)

    def _translate(self, frames: bytes) -> bytes:
        """Whole frames of a chat's stream, as events of the dialect."""
        events = b""
        for frame in frames.split(_FRAME_END):
            text = frame.removeprefix(_DATA)
            if text.startswith(b"{"):
                events += self._dialect.feed(orjson.loads(text))
        return events


def build_event(event: Mapping[str, Any]) -> bytes:
    """A server-sent event that is named by its `type`."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


def rename_param(param: str | None, sources: list[str], names: Mapping[str, str]) -> str | None:
    """A path of the chat's body as one of the client's.

    Args:
        param: the path, such as `messages[1].content[0].image_url`.
        sources: where each message comes from.
        names: the client's names of fields, by the chat's.
    """
    if param is None:
        return None
    for chats, clients in names.items():
        if param == chats or param.startswith((chats + ".", chats + "[")):
            return clients + param[len(chats) :]
    if param.startswith("messages["):
        number, _, rest = param[len("messages[") :].partition("]")
        if number.isdecimal() and int(number) < len(sources):
            return sources[int(number)] + rest
    return sources[-1] if param == "messages" and sources else param


def read_chunk(chunk: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The text that a chunk of a chat's stream adds, and its choice; empty without one."""
    choices = chunk.get("choices")
    choice: Mapping[str, Any] = choices[0] if choices else {}
    return (choice.get("delta") or {}).get("content") or "", choice
