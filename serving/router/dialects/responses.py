"""OpenAI's Responses API, without state: https://platform.openai.com/docs/api-reference/responses. Pure.

What needs a memory of earlier responses is refused. Items that agents send back (`reasoning`) are left out.
"""

from __future__ import annotations

import time
from typing import Any

from serving.errors import InvalidRequestError, ServingError
from serving.router.dialects.dialect import build_event, read_chunk, rename_param
from serving.router.request.checks import refuse
from serving.router.request.foreign_fields import NO_TOOLS

_STATE = ("previous_response_id", "conversation", "prompt", "background", "context_management", "access_programs")
_NOT_DONE = {
    "max_tool_calls": NO_TOOLS,
    "image": "Answers are text; remove image.",
    "background_options": "Responses are not run in the background; remove background_options.",
}
_OWN = frozenset({"input", "instructions", "text", "max_output_tokens", "tools", "tool_choice", "store", "include"}) | {
    "truncation",
    "stream_options",
    "top_logprobs",
    *_STATE,
    *_NOT_DONE,
}
"""Fields that are read here; any other is the chat's."""
_CLIENTS_NAMES = {"max_completion_tokens": "max_output_tokens", "response_format.json_schema": "text.format"} | {
    "response_format": "text.format"
}
_LEFT_OUT = frozenset({"reasoning", "compaction"})
_TOOL_ITEMS = frozenset({"function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"})
_ECHOED = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user", "truncation", "reasoning")


class Responses:
    """One request to the Responses API."""

    def __init__(self, request_id: str) -> None:
        self._id = f"resp_{request_id}"
        self._item_id = f"msg_{request_id}"
        self._asked: dict[str, Any] = {}
        self._sources: list[str] = []
        self._number = 0
        self._text = ""
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None
        self._created_s = int(time.time())

    # The request

    def to_chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._asked = payload
        _refuse_what_is_not_done(payload)
        chat: dict[str, Any] = {name: value for name, value in payload.items() if name not in _OWN}
        chat["messages"] = self._read_messages(payload)
        if payload.get("max_output_tokens") is not None:
            chat["max_completion_tokens"] = payload["max_output_tokens"]
        if payload.get("store"):
            chat["store"] = payload["store"]
        form = _read_format(payload.get("text"))
        if form is not None:
            chat["response_format"] = form
        return chat

    def _read_messages(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        instructions, given = payload.get("instructions"), payload.get("input")
        if instructions is not None:
            if not isinstance(instructions, str):
                raise refuse("instructions", "a string")
            messages.append({"role": "system", "content": instructions})
            self._sources.append("instructions")
        if isinstance(given, str):
            self._sources.append("input")
            return [*messages, {"role": "user", "content": given}]
        if not isinstance(given, list) or not given:
            raise refuse("input", "a string or a list of items")
        for i, item in enumerate(given):
            message = _read_item(item, f"input[{i}]")
            if message is not None:
                messages.append(message)
                self._sources.append(f"input[{i}]")
        return messages

    # The answer

    def build_answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        self._text = choice["message"].get("content") or ""
        self._finish_reason = choice.get("finish_reason")
        self._usage = answer.get("usage")
        return self._build_response(self._status(), [self._build_item()])

    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _build_response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self._asked
        is_done = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if is_done else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: asked.get(name) for name in _ECHOED},
            "model": asked.get("model"),
            "output": output,
            "parallel_tool_calls": bool(asked.get("parallel_tool_calls", True)),
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "usage": _build_usage(self._usage) if is_done and self._usage is not None else None,
        }

    def _build_item(self, status: str | None = None) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._build_part()]
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status or self._status(),
            "content": content,
        }

    def _build_part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    # The stream

    def begin(self) -> bytes:
        item = {"output_index": 0, "item": self._build_item("in_progress")}
        part = {"item_id": self._item_id, "output_index": 0, "content_index": 0, "part": self._build_part()}
        return (
            self._event("response.created", response=self._build_response("in_progress", []))
            + self._event("response.in_progress", response=self._build_response("in_progress", []))
            + self._event("response.output_item.added", **item)
            + self._event("response.content_part.added", **part)
        )

    def feed(self, chunk: dict[str, Any]) -> bytes:
        text, choice = read_chunk(chunk)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._usage = chunk.get("usage") or self._usage
        if not text:
            return b""
        self._text += text
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self) -> bytes:
        status, item = self._status(), self._build_item()
        return (
            self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=self._build_part())
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=self._build_response(status, [item]))
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return build_event(event)

    # Errors

    def build_error(self, error: ServingError) -> dict[str, Any]:
        body = error.body()
        body["error"]["param"] = rename_param(error.param, self._sources, _CLIENTS_NAMES)
        return body

    def build_error_event(self, error: ServingError) -> bytes:
        told = self.build_error(error)["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"], error=told)


def _refuse_what_is_not_done(payload: dict[str, Any]) -> None:
    for name in _STATE:
        if payload.get(name):
            raise InvalidRequestError(
                f"Nothing is stored between requests: remove {name}, and send all of the conversation as input.",
                param=name,
                code="unsupported_parameter",
            )
    for name, reason in _NOT_DONE.items():
        if payload.get(name) is not None:
            raise InvalidRequestError(reason, param=name, code="unsupported_parameter")
    if payload.get("tools") or payload.get("tool_choice") not in (None, "none", "auto"):
        raise InvalidRequestError(NO_TOOLS, param="tools", code="tools_not_supported")
    if payload.get("top_logprobs"):
        raise InvalidRequestError(
            "Log probabilities are told by /v1/chat/completions only; remove top_logprobs.",
            param="top_logprobs",
            code="unsupported_parameter",
        )
    if payload.get("n") not in (None, 1):
        raise refuse("n", "1")


def _read_item(item: Any, param: str) -> dict[str, Any] | None:
    """An input item as a message; None for one that says nothing to the model."""
    if not isinstance(item, dict):
        raise refuse(param, "an object")
    kind = item.get("type", "message")
    if kind in _LEFT_OUT:
        return None
    if kind in _TOOL_ITEMS:
        raise InvalidRequestError(NO_TOOLS, param=f"{param}.type", code="tools_not_supported")
    if kind != "message":
        raise InvalidRequestError(
            "Items of input may be messages; files, tools' items and references to stored items are not supported.",
            param=f"{param}.type",
        )
    return {"role": item.get("role"), "content": item.get("content")}


def _read_format(text: Any) -> dict[str, Any] | None:
    """`text.format` as a chat's `response_format`."""
    if text is None:
        return None
    form = text.get("format") if isinstance(text, dict) else text
    if form is None:
        return None
    if not isinstance(form, dict):
        raise refuse("text.format", "an object with a type")
    if form.get("type") != "json_schema":
        return form
    spec = {name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None}
    return {"type": "json_schema", "json_schema": spec}


def _build_usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage.get("prompt_tokens_details") or {}
    of_input = {"cached_tokens": details.get("cached_tokens") or 0, "cache_write_tokens": 0}
    if "image_tokens" in details:
        of_input["image_tokens"] = details["image_tokens"]
    found = {
        "input_tokens": usage.get("prompt_tokens") or 0,
        "input_tokens_details": of_input,
        "output_tokens": usage.get("completion_tokens") or 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.get("total_tokens") or 0,
    }
    return found | {name: usage[name] for name in ("estimated_cost", "credited_cost") if name in usage}
