"""Receives a request's document into a file, with its options: from a form, from JSON, or from a URL.

A form's file is written to disk piece by piece. JSON is held in memory while it is decoded, so there is a limit on each
JSON body and one on all of them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.errors import BodyTooLargeError, InvalidRequestError, ServingError, UnsupportedCodingError
from serving.http.addresses import is_public_address
from serving.http.base64_text import decode_base64
from serving.http.bodies import ClientGoneError, decode_json, discard_body, read_body, too_slow
from serving.http.body_pace import BodyPace, receive_in_time
from serving.http.fetching import FETCH_ERRORS, Fetcher
from serving.ocr.limits.shares import Refusals, Shares
from serving.ocr.limits.storage import Storage, StoredFile
from serving.ocr.reading.mistral import infer_type
from serving.ocr.reading.options import read_form_options, read_options
from serving.ocr.reading.router_client import Caller
from serving.ocr_api.options import ReadOptions
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 16 * 1024
_MAX_FORM_OVERHEAD = 64 * 1024
_HELD_BODIES = 4
"""How many JSON bodies of maximum size may be held at once."""
_BODIES_HELD = Refusals(
    own_code="too_many_bodies",
    own_message="Your JSON requests use as much memory as one tenant may use; send fewer at once, or send the documents"
    " as multipart/form-data.",
    full_code="overloaded",
    full_message="The service is holding as many requests as it can; try again shortly, or send the document as"
    " multipart/form-data.",
    retry_after_s=2.0,
)
_DATA_URL = re.compile(r"data:[A-Za-z0-9!#$&^_.+*/;=\"-]{0,255};base64")
_TYPES = ("document_url", "image_url", "file")
_AGENT = "serving-document-fetch/1"
_ACCEPT = "application/pdf, image/*"


@dataclass(frozen=True, slots=True)
class Submission:
    """A received document. The file is deleted when the context that yielded this ends, unless it was moved."""

    file: Path
    size_bytes: int
    digest: str
    """SHA-256 of the document."""
    options: ReadOptions


class UploadReceiver:
    """Receives requests. One per process."""

    def __init__(
        self,
        settings: OcrSettings,
        limits: LimitSettings,
        storage: Storage,
        check_address: Callable[[str], bool] = is_public_address,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._storage = storage
        self.bodies = Shares(
            _HELD_BODIES * limits.max_body_bytes, settings.tenant_share, _BODIES_HELD, least=limits.max_body_bytes
        )
        self.fetcher = Fetcher(settings.remote_documents, _ACCEPT, _AGENT, check_address)

    async def start(self) -> None:
        await self.fetcher.start()

    async def close(self) -> None:
        await self.fetcher.close()

    @contextlib.asynccontextmanager
    async def receive(self, request: Request, caller: Caller) -> AsyncIterator[Submission]:
        """Receive the document and the options of a request.

        Raises:
            ServingError: the request is invalid, or a limit is reached.
            ClientGoneError: the client disconnected while sending.
        """
        async with self._storage.receiving(caller) as file:
            try:
                sink = _Sink(file, self._settings.max_document_bytes)
                kind, parameters = parse_options_header(request.headers.get("content-type", ""))
                if kind == b"multipart/form-data":
                    if request.headers.get("content-encoding", "identity").lower() != "identity":
                        raise UnsupportedCodingError("Forms are received without a Content-Encoding; send it plain.")
                    options = await self._receive_form(request, parameters.get(b"boundary", b""), sink)
                elif kind in (b"application/json", b""):
                    options = await self._receive_json(request, caller, sink)
                else:
                    raise InvalidRequestError(
                        "The content-type must be application/json or multipart/form-data.",
                        param="content-type",
                        code="invalid_body",
                    )
            finally:
                await file.close()
            if not sink.size_bytes:
                raise InvalidRequestError("The document is missing or empty.", param="document")
            yield Submission(file.path, sink.size_bytes, sink.digest.hexdigest(), options)

    async def _receive_form(self, request: Request, boundary: bytes, sink: _Sink) -> ReadOptions:
        form = _Form(sink)
        body = UploadBody(request, self._limits, self._settings.max_document_bytes)
        try:
            parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]  # its stubs want protocols
            async for part in body.pieces():
                parser.write(part)
                await form.write_out()
            parser.finalize()
        except TimeoutError as error:
            raise too_slow(self._limits) from error
        except MultipartParseError as error:
            if not body.is_whole:
                await discard_body(request.receive, self._limits)
            raise InvalidRequestError("The body is not a valid multipart form.", code="invalid_body") from error
        except ServingError:
            # A client that is still sending would see a reset instead of the answer.
            if not body.is_whole:
                await discard_body(request.receive, self._limits)
            raise
        if not form.is_whole:
            raise InvalidRequestError("The multipart form is truncated.", code="invalid_body")
        return read_form_options(form.decoded())

    async def _receive_json(self, request: Request, caller: Caller, sink: _Sink) -> ReadOptions:
        with self.bodies.hold(caller) as held:
            body = await read_body(request.scope, request.receive, self._limits, held)
            given = await asyncio.to_thread(decode_json, body, self._limits)
            del body
            options = read_options(given)
            await self._take_document(given.get("document"), sink)
        return options

    async def _take_document(self, document: Any, sink: _Sink) -> None:
        if isinstance(document, dict):
            document = {**document, "type": infer_type(document)}
        if not isinstance(document, dict) or document["type"] not in _TYPES:
            raise InvalidRequestError(f"document must be an object with a type: {', '.join(_TYPES)}.", param="document")
        kind = document["type"]
        param = f"document.{kind}"
        source = document.get(kind)
        if kind == "image_url" and isinstance(source, dict):
            source = source.get("url")
        if not isinstance(source, str) or not source:
            raise InvalidRequestError(f"{param} must hold the document.", param=param)
        if kind != "file" and not source.startswith("data:"):
            await self._fetch(source, param, sink)
            return
        head, comma, encoded = source.partition(",")
        if not comma and kind == "file":
            head, encoded = "data:;base64", source
        if not _DATA_URL.fullmatch(head):
            raise InvalidRequestError("A data URL must be base64: data:application/pdf;base64,...", param=param)
        try:
            data = await asyncio.to_thread(decode_base64, encoded)
        except ValueError as error:
            raise InvalidRequestError("The document is not valid base64.", param=param) from error
        await sink.write(data)

    async def _fetch(self, url: str, param: str, sink: _Sink) -> None:
        remote = self._settings.remote_documents
        if not remote.enabled:
            raise InvalidRequestError(
                "Fetching documents from URLs is disabled; send a data: URL, or the file as multipart/form-data.",
                param=param,
            )
        try:
            async with (
                asyncio.timeout(remote.timeout_s),
                contextlib.aclosing(self.fetcher.fetch(url)) as parts,
            ):
                async for part in parts:
                    await sink.write(part)
        except FETCH_ERRORS:  # TimeoutError is an OSError
            raise InvalidRequestError(
                "The document could not be fetched from its URL.", param=param, code="document_fetch_failed"
            ) from None


class UploadBody:
    """A request's body, with limits on its size and its slowness."""

    def __init__(self, request: Request, limits: LimitSettings, max_document_bytes: int) -> None:
        self._receive = request.receive
        self._pace = BodyPace.from_limits(limits)
        self._max_bytes = max_document_bytes
        self.is_whole = False

    async def pieces(self) -> AsyncGenerator[bytes]:
        num_left = self._max_bytes + _MAX_FORM_OVERHEAD
        while not self.is_whole:
            message = await receive_in_time(self._receive, self._pace)
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            self.is_whole = not message.get("more_body", False)
            num_left -= len(part)
            if num_left < 0:
                raise _too_large(self._max_bytes)
            yield part


class _Sink:
    """The file that a document is written to."""

    def __init__(self, out: StoredFile, max_bytes: int) -> None:
        self._out = out
        self._max_bytes = max_bytes
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    async def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            ServingError: the document is too large, or there is no space for it.
        """
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        await asyncio.to_thread(self.digest.update, data)
        await self._out.write(data)


@dataclass(slots=True)
class _Form:
    """The callbacks for python-multipart, and their results. The parser does not catch our errors."""

    sink: _Sink
    fields: dict[str, bytearray] = field(default_factory=dict)
    has_file: bool = False
    is_whole: bool = False
    _pending: list[bytes] = field(default_factory=list)
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""
    _field: str | None = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._take_header,
            "on_header_value": self._take_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._take_content,
            "on_end": self._end,
        }

    async def write_out(self) -> None:
        """Write the received part of the file to disk."""
        if self._pending:
            pending, self._pending = self._pending, []
            await self.sink.write(b"".join(pending))

    def decoded(self) -> dict[str, str]:
        """The fields as text."""
        if not self.has_file:
            raise InvalidRequestError("The form has no part named file.", param="file")
        try:
            return {name: bytes(value).decode() for name, value in self.fields.items()}
        except UnicodeDecodeError as error:
            raise InvalidRequestError("A field of the form is not valid UTF-8.", code="invalid_body") from error

    def _begin_part(self) -> None:
        self._disposition = b""
        self._header.clear()
        self._value.clear()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end][: _MAX_FIELD_BYTES - len(self._header)]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._value) + len(self._header) > _MAX_FIELD_BYTES:
            raise InvalidRequestError("A header in the form is too long.", code="invalid_body")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        _, parameters = parse_options_header(self._disposition)
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self.has_file:
                raise InvalidRequestError(
                    "The form has several parts named file; send one document per request.", param="file"
                )
            self.has_file, self._field = True, None
            return
        if not name or name in self.fields or len(self.fields) >= _MAX_FIELDS:
            raise InvalidRequestError(
                "The form has an unnamed, repeated or surplus part; send one named file, and each option once.",
                param=name[:100],
            )
        self.fields[name] = bytearray()
        self._field = name

    def _take_content(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._pending.append(data[start:end])
            return
        value = self.fields[self._field]
        value += data[start:end]
        if len(value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"The field is too long; at most {_MAX_FIELD_BYTES} bytes are allowed.", param=self._field[:100]
            )

    def _end(self) -> None:
        self.is_whole = True


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The document is too large; at most {max_bytes} bytes are allowed.", param="document")
