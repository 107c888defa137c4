"""Anthropic's Messages API: https://docs.anthropic.com/en/api/messages. Pure."""

from __future__ import annotations

from typing import Any

from serving.errors import InvalidRequestError, ServingError
from serving.router.dialects.dialect import build_event, read_chunk, rename_param
from serving.router.request.checks import refuse
from serving.router.request.foreign_fields import NO_TOOLS

_OWN = frozenset({"system", "messages", "stop_sequences", "metadata", "tools", "tool_choice", "thinking"})
"""Fields that are read here; any other is the chat's."""
_CLIENTS_NAMES = {"stop": "stop_sequences"}
_LEFT_OUT = frozenset({"thinking", "redacted_thinking"})
_KINDS = "text, image, document and tool_result"
_STOP_REASONS = {"length": "max_tokens"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Messages:
    """One request to the Messages API."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._model: Any = None
        self._sources: list[str] = []
        self._choice: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}

    # The request

    def to_chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._model = payload.get("model")
        if payload.get("max_tokens") is None:
            raise InvalidRequestError("max_tokens must be given.", param="max_tokens")
        if payload.get("tools"):
            raise InvalidRequestError(NO_TOOLS, param="tools", code="tools_not_supported")
        chat = {name: value for name, value in payload.items() if name not in _OWN}
        messages, given = [], payload.get("messages")
        if payload.get("system") is not None:
            messages.append({"role": "system", "content": _read_content(payload["system"], "system")})
            self._sources.append("system")
        if not isinstance(given, list):
            raise refuse("messages", "a list")
        for i, message in enumerate(given):
            if not isinstance(message, dict):
                raise refuse(f"messages[{i}]", "an object")
            content = _read_content(message.get("content"), f"messages[{i}].content")
            messages.append({"role": message.get("role"), "content": content})
            self._sources.append(f"messages[{i}]")
        chat["messages"] = messages
        if payload.get("stop_sequences"):
            chat["stop"] = payload["stop_sequences"]
        metadata = payload.get("metadata")
        if isinstance(metadata, dict) and metadata.get("user_id") is not None:
            chat["user"] = metadata["user_id"]
        return chat

    # The answer

    def build_answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        self._choice = answer["choices"][0]
        self._usage = answer.get("usage") or {}
        text = self._choice["message"].get("content") or ""
        return {**self._build_message([{"type": "text", "text": text}]), **self._build_stop()}

    def _build_message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._build_usage(),
        }

    def _build_stop(self) -> dict[str, Any]:
        """Why the answer ended."""
        stop = self._choice.get("stop_reason")
        if isinstance(stop, str) and self._choice.get("finish_reason") == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        reason = _STOP_REASONS.get(self._choice.get("finish_reason") or "", "end_turn")
        return {"stop_reason": reason, "stop_sequence": None}

    def _build_usage(self) -> dict[str, Any]:
        usage = self._usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        found = {
            "input_tokens": (usage.get("prompt_tokens") or 0) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.get("completion_tokens") or 0,
        }
        return found | {name: usage[name] for name in ("estimated_cost", "credited_cost") if name in usage}

    # The stream

    def begin(self) -> bytes:
        block = {"type": "text", "text": ""}
        return build_event({"type": "message_start", "message": self._build_message([])}) + build_event(
            {"type": "content_block_start", "index": 0, "content_block": block}
        )

    def feed(self, chunk: dict[str, Any]) -> bytes:
        text, choice = read_chunk(chunk)
        if choice.get("finish_reason"):
            self._choice = dict(choice)
        self._usage = chunk.get("usage") or self._usage
        if not text:
            return b""
        delta = {"type": "text_delta", "text": text}
        return build_event({"type": "content_block_delta", "index": 0, "delta": delta})

    def end(self) -> bytes:
        return (
            build_event({"type": "content_block_stop", "index": 0})
            + build_event({"type": "message_delta", "delta": self._build_stop(), "usage": self._build_usage()})
            + build_event({"type": "message_stop"})
        )

    # Errors

    def build_error(self, error: ServingError) -> dict[str, Any]:
        status = error.http_status
        kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        param = rename_param(error.param, self._sources, _CLIENTS_NAMES)
        if param is not None:
            param = param.replace(".image_url", ".source")
        told = {"type": kind, "message": error.message, "param": param, "code": error.code}
        return {"type": "error", "error": told, "request_id": self._request_id}

    def build_error_event(self, error: ServingError) -> bytes:
        return build_event(self.build_error(error))


def _read_content(content: Any, param: str) -> str | list[dict[str, Any]] | None:
    """Content blocks as a chat's parts."""
    if isinstance(content, str) or content is None:
        return content
    if not isinstance(content, list):
        raise refuse(param, "a string or a list of blocks")
    parts: list[dict[str, Any]] = []
    for j, block in enumerate(content):
        parts += _read_block(block, f"{param}[{j}]")
    return parts


def _read_block(block: Any, param: str) -> list[dict[str, Any]]:
    """A block as parts; none for one that says nothing to the model."""
    if not isinstance(block, dict):
        raise refuse(param, "an object")
    kind = block.get("type")
    if kind == "text":
        return [{"type": "text", "text": block.get("text")}]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _read_source(block.get("source"), f"{param}.source")}}]
    if kind == "document":
        return [_read_document(block, f"{param}.source")]
    if kind == "tool_result":
        content = _read_content(block.get("content"), f"{param}.content")
        return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    if isinstance(kind, str) and kind in _LEFT_OUT:
        return []
    if kind == "tool_use":
        raise InvalidRequestError(NO_TOOLS, param=f"{param}.type", code="tools_not_supported")
    raise InvalidRequestError(f"Content blocks may be of type {_KINDS}.", param=f"{param}.type")


def _read_document(block: dict[str, Any], param: str) -> dict[str, Any]:
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") == "text":
        return {"type": "text", "text": source.get("data")}
    url = _read_source(source, param)
    key = "file_data" if url.startswith("data:") else "file_url"
    return {"type": "input_file", key: url, "filename": block.get("title")}


def _read_source(source: Any, param: str) -> str:
    """A source as a URL."""
    if isinstance(source, dict):
        if source.get("type") == "base64" and isinstance(source.get("data"), str):
            return f"data:{source.get('media_type') or 'application/octet-stream'};base64,{source['data']}"
        if source.get("type") == "url" and isinstance(source.get("url"), str):
            url: str = source["url"]
            return url
    raise refuse(param, "a source of type base64 with data, or of type url with a URL")
