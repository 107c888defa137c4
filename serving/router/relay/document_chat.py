"""Chats that hold a PDF: the OCR service reads it page by page, and its result becomes the chat's answer.

The model reads one page at a time, so the chat's text becomes the prompt for every page, and the answer is the pages'
texts in order, with an empty line in between. A page that fails leaves a comment in its place; if all do, so does the
chat. The OCR service prices and limits the pages; the chat itself costs nothing more.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.types import Message

from serving.errors import EngineError, InvalidRequestError, ServingError
from serving.http.reply import Reply
from serving.router.request.parsing import RoutedRequest

_BETWEEN = "\n\n"
_FRAME_END = b"\n\n"
_DATA = b"data: "
_READ = frozenset({"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "usage"}) | {
    "mm_processor_kwargs",
    "user",
    "metadata",
    "n",
}
"""Fields that have an effect here, or never have one."""
_OPTIONS = ("prompt", "mode", "max_tokens", "model")


class DocumentsFoundError(Exception):
    """A chat holds documents, which engines do not read."""

    def __init__(self, request: RoutedRequest) -> None:
        super().__init__()
        self.request = request


def build_reading(request: RoutedRequest) -> tuple[dict[str, Any], list[str]]:
    """The OCR service's request for a chat's document, and the names of fields that have no effect on it.

    Raises:
        InvalidRequestError: the chat asks for more than the text of one document.
    """
    payload = orjson.loads(request.body)
    first, *others = request.documents
    if others or request.image_sizes:
        raise InvalidRequestError(
            "A chat may hold one document, without images beside it; send the others in chats of their own.",
            param=others[0].param if others else "messages",
        )
    if request.num_choices > 1:
        raise InvalidRequestError("n must be 1 for a document.", param="n")
    reading: dict[str, Any] = {
        "model": payload["model"],
        "document": {"type": "document_url", "document_url": first.url},
        "stream": request.is_stream,
    }
    prompt = "\n".join(text for text in _texts(payload["messages"]) if text.strip())
    mode = request.image_options.get("mode")
    given = {"prompt": prompt or None, "mode": mode, "max_tokens": request.max_tokens}
    reading |= {name: value for name, value in given.items() if value is not None}
    return reading, [name for name, value in payload.items() if name not in _READ and value is not None]


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    texts: list[str] = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    return texts


class DocumentReply(Reply):
    """Takes the OCR service's answer, and sends it as a chat's through the client's own reply."""

    __slots__ = ("_body", "_created_s", "_id", "_num_sent", "_order", "_outer", "_pages", "_request")

    def __init__(self, outer: Reply, request: RoutedRequest, request_id: str) -> None:
        super().__init__(_send_nothing)
        self._outer = outer
        self._request = request
        self._id = f"chatcmpl-{request_id}"
        self._body = b""
        self._pages: list[dict[str, Any]] = []
        """In the order in which they ended."""
        self._order: list[int] = []
        """Indices of the pages that will be read."""
        self._num_sent = 0
        """Pages whose text has been sent."""
        self._created_s = int(time.time())

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            return
        self._body += message.get("body", b"")
        if self.is_stream:
            *frames, self._body = self._body.split(_FRAME_END)
            for frame in frames:
                await self._take(frame)
        elif not message.get("more_body", False):
            await self._answer()

    async def end_with_error(self, error: ServingError) -> None:
        if not self._outer.has_begun:
            raise error
        await self._outer.end_with_error(error)

    # A whole answer

    async def _answer(self) -> None:
        try:
            found = orjson.loads(self._body)
        except orjson.JSONDecodeError:
            found = None
        if self.status != 200 or not isinstance(found, dict):
            raise self._read_error(found)
        self._pages = found["pages"]
        self._check_pages()
        message = {"role": "assistant", "content": _BETWEEN.join(map(_show, self._pages))}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish_reason()}
        answer = {**self._head("chat.completion"), "choices": [choice], "usage": found["usage"]}
        await self._outer.send_body(200, orjson.dumps(answer))

    def _read_error(self, found: Any) -> ServingError:
        """The OCR service's refusal, with the place of the chat's own field."""
        error = found.get("error") if isinstance(found, dict) else None
        told = error if isinstance(error, dict) else {}
        param = told.get("param")
        if isinstance(param, str):
            param = param if param in _OPTIONS else self._request.documents[0].param
        status = self.status if self.status >= 400 else 502
        message = str(told.get("message") or "The document could not be read.")
        return EngineError(status, message, type=told.get("type") or "server_error", param=param, code=told.get("code"))

    def _check_pages(self) -> None:
        if self._pages and all(page["status"] == "failed" for page in self._pages):
            error = self._pages[0].get("error") or {}
            kind = error.get("type") or "invalid_request_error"
            raise EngineError(
                502 if kind == "server_error" else 400,
                str(error.get("message") or "No page of the document could be read."),
                type=kind,
                param=self._request.documents[0].param,
                code=error.get("code"),
            )

    # A stream

    async def _take(self, frame: bytes) -> None:
        text = frame.removeprefix(_DATA)
        if not text.startswith(b"{"):
            return
        event = orjson.loads(text)
        kind = event.get("type")
        if kind == "document":
            self._order = sorted(event["pages"])
        elif kind in ("page.completed", "page.failed"):
            self._pages.append(event["page"])
            await self._send_pages()
        elif kind == "result":
            self._check_pages()
            await self._finish(event["usage"])
        elif "error" in event:
            await self.end_with_error(self._read_error(event))

    async def _send_pages(self) -> None:
        """Send the pages whose turn has come. Failed ones wait for one that is read: if all fail, so does the chat."""
        ended = {page["index"]: page for page in self._pages}
        ready: list[dict[str, Any]] = []
        for index in self._order[self._num_sent :]:
            if index not in ended:
                break
            ready.append(ended[index])
        if not self._outer.has_begun and all(page["status"] == "failed" for page in ready):
            return
        if not self._outer.has_begun:
            await self._outer.start_stream()
            await self._write({"role": "assistant", "content": ""})
        for page in ready:
            text = _show(page)
            await self._write({"content": _BETWEEN + text if self._num_sent else text})
            self._num_sent += 1

    async def _finish(self, usage: dict[str, Any]) -> None:
        if not self._outer.has_begun:
            await self._outer.start_stream()  # of a document without pages
        in_last = self._request.usage_in_last_chunk
        last = self._build_chunk({}, self._finish_reason(), usage if in_last else None)
        if self._request.wants_stream_usage:
            last += _frame({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        await self._outer.end(last + b"data: [DONE]\n\n")

    async def _write(self, delta: dict[str, Any]) -> None:
        await self._outer.write(self._build_chunk(delta))

    def _build_chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, usage: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return _frame({**chunk, "usage": usage} if usage is not None else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created_s, "model": self._request.model}

    def _finish_reason(self) -> str:
        return "length" if any(page.get("finish_reason") == "length" for page in self._pages) else "stop"


def _show(page: dict[str, Any]) -> str:
    """A page's text, or a comment in the place of one that failed."""
    if page["status"] == "failed":
        reason = str((page.get("error") or {}).get("code") or "failed")
        return f"<!-- page {page['number']} could not be read: {reason} -->"
    return str(page.get("markdown") or page.get("text") or "")


def _frame(event: dict[str, Any]) -> bytes:
    return _DATA + orjson.dumps(event) + _FRAME_END


async def _send_nothing(message: Message) -> None:
    """Nothing goes past `pass_on`."""
