"""The router's OpenAPI document: what the router itself checks, and every status that it answers with."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from serving.router.lookups.openapi_ocr import describe_answers, describe_document_body, describe_documents
from serving.settings.stack import Settings

_STATUSES = {
    "400": "The request is invalid; `error.param` names the field",
    "401": "No key, or an unknown one",
    "403": "The key does not permit this; or, without keys, another site's web page may have sent it",
    "404": "No such model",
    "405": "The method is not supported on this path",
    "408": "The body stalled, or arrived too slowly",
    "413": "The body is too large",
    "415": "The body has a content coding other than gzip, deflate or zstd",
    "429": "A limit of the tenant is reached, or its budget is spent; Retry-After says when to try again",
    "431": "The headers are too large",
    "500": "The model failed",
    "502": "The replica was lost, and no other could take the request",
    "503": "Overloaded, or no replica is ready; Retry-After says when to try again",
    "504": "Not complete within the request's time",
}
_LOOK_UPS = ("400", "401", "403", "404", "405", "429", "431")


def build_document(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1, served at `GET /openapi.json`."""
    names = [name for key, model in settings.models.items() for name in (key, *model.aliases)]
    limits = settings.router.limits
    chat = _chat_schema(names, limits.max_messages)
    quoted = {"oneOf": [chat, describe_document_body(names)]} if settings.ocr.enabled else chat
    return {
        "openapi": "3.1.0",
        "info": {"title": "serving", "version": importlib.metadata.version("serving")},
        "paths": {
            "/v1/chat/completions": {"post": _generating("Chat", chat)},
            "/v1/completions": {"post": _generating("Completion", _completion_schema(names))},
            "/v1/responses": {"post": _generating("A response, without state", _response_schema(names))},
            "/v1/messages": {"post": _generating("A message, in Anthropic's shape", _message_schema(chat))},
            "/tokenize": {"post": _quoting(_tokenize_schema(names), "The tokens of a text or of texts in messages")},
            "/detokenize": {"post": _quoting(_detokenize_schema(names), "The text of tokens")},
            "/v1/models": {"get": _looking_up("Every model name that a request may use")},
            "/v1/models/{model}": {
                "get": _looking_up("One of them"),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            },
            **(describe_documents(names) if settings.ocr.enabled else {}),
            "/v1/tenant": {"get": _looking_up("Whose key it is")},
            "/v1/quote": {"post": _quoting(quoted)},
            "/v1/usage": {
                "get": _reporting(
                    "Your requests, tokens, pages and costs; with an admin key those of all tenants", _USAGE
                )
            },
            "/v1/organization/usage/completions": {
                "get": _reporting("The same in daily buckets, in OpenAI's format; requires an admin key", _OPENAI_USAGE)
            },
            "/admin/costs": {"get": _reporting("What the stack itself costs; requires an admin key", _WINDOW)},
            "/health": {"get": _looking_up("The router is up", ("405", "431"))},
            "/ready": {"get": _looking_up("At least one replica can serve", ("405", "431", "503"))},
            "/metrics/targets": {"get": _listing("Prometheus's scrape targets; requires an admin key")},
            "/admin/state": {"get": _looking_up("Replicas, queues and tenants; requires an admin key")},
        },
        "components": {
            "schemas": {"Error": _ERROR, **(describe_answers() if settings.ocr.enabled else {})},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if settings.router.keys_file is not None else [],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _STATUSES[status], "content": content} for status in statuses}


def _generating(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    answers = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "summary": summary,
        "parameters": [
            {
                "name": "x-request-timeout-ms",
                "in": "header",
                "description": "Longest time for the whole request, queueing included",
                "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999_999},
            },
            {"name": "x-request-id", "in": "header", "schema": {"type": "string", "maxLength": 128}},
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "The answer; with `stream` as server-sent events", "content": answers},
            **_errors(tuple(_STATUSES)),
        },
    }


def _looking_up(summary: str, statuses: tuple[str, ...] = _LOOK_UPS) -> dict[str, Any]:
    found = {"description": summary, "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"summary": summary, "responses": {"200": found, **_errors(statuses)}}


def _listing(summary: str) -> dict[str, Any]:
    found = {"description": summary, "content": {"application/json": {"schema": {"type": "array"}}}}
    return {"summary": summary, "responses": {"200": found, **_errors(_LOOK_UPS)}}


def _quoting(schema: dict[str, Any], summary: str = "What a request would cost, without running it") -> dict[str, Any]:
    statuses = ("400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "503")
    found = {"description": summary, "content": _JSON_OBJECT}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": found, **_errors(statuses)},
    }


def _reporting(summary: str, parameters: tuple[str, ...]) -> dict[str, Any]:
    content = {**_JSON_OBJECT, "text/csv": {"schema": _TEXT}}
    return {
        "summary": summary,
        "parameters": [{"name": name, "in": "query", "schema": _PARAMETERS[name]} for name in parameters],
        "responses": {"200": {"description": summary, "content": content}, **_errors((*_LOOK_UPS, "503"))},
    }


def _common(names: list[str]) -> dict[str, Any]:
    return {
        "model": {"type": "string", "enum": names},
        "max_tokens": {"type": ["integer", "null"], "minimum": 1},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16},
        "stop": {"type": ["string", "array", "null"], "items": {"type": "string"}},
        "seed": {"type": ["integer", "null"]},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
        "mm_processor_kwargs": {"type": ["object", "null"], "description": "Resolution modes: {'mode': 'base'}"},
        "vllm_xargs": {"type": ["object", "null"]},
    }


def _chat_schema(names: list[str], max_messages: int) -> dict[str, Any]:
    text = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
    url = {"type": "object", "required": ["url"], "properties": {"url": _TEXT, "detail": {"enum": _DETAILS}}}
    image = {
        "type": "object",
        "required": ["type", "image_url"],
        "properties": {"type": {"const": "image_url"}, "image_url": url},
    }
    content = {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"oneOf": [text, image]}}]}
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": content},
    }
    messages = {"type": "array", "minItems": 1, "maxItems": max_messages, "items": message}
    properties = {**_common(names), "messages": messages}
    return {"type": "object", "required": ["model", "messages"], "properties": properties}


def _completion_schema(names: list[str]) -> dict[str, Any]:
    prompt = {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "items": _TEXT}]}
    return {"type": "object", "required": ["model", "prompt"], "properties": {**_common(names), "prompt": prompt}}


def _response_schema(names: list[str]) -> dict[str, Any]:
    common = _common(names)
    properties = {
        **{name: common[name] for name in ("model", "temperature", "top_p", "stream", "mm_processor_kwargs")},
        "input": {"type": ["string", "array"]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        "text": {"type": ["object", "null"]},
    }
    return {"type": "object", "required": ["model", "input"], "properties": properties}


def _message_schema(chat: dict[str, Any]) -> dict[str, Any]:
    """The schema of a message's request, for texts; `chat` is that of a chat."""
    properties = {
        **{name: chat["properties"][name] for name in ("model", "temperature", "stream", "messages")},
        "max_tokens": {"type": "integer", "minimum": 1},
        "system": {"type": ["string", "array", "null"]},
        "stop_sequences": {"type": ["array", "null"], "items": _TEXT},
    }
    return {"type": "object", "required": ["model", "messages", "max_tokens"], "properties": properties}


def _tokenize_schema(names: list[str]) -> dict[str, Any]:
    properties = {"model": _common(names)["model"], "prompt": _TEXT, "messages": {"type": "array"}}
    return {"type": "object", "required": ["model"], "properties": properties}


def _detokenize_schema(names: list[str]) -> dict[str, Any]:
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    properties = {"model": _common(names)["model"], "tokens": tokens}
    return {"type": "object", "required": ["model", "tokens"], "properties": properties}


_TEXT: dict[str, Any] = {"type": "string"}
_JSON_OBJECT: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
_WINDOW = ("month", "since", "until")
_USAGE = (*_WINDOW, "group_by", "tenant", "format")
_OPENAI_USAGE = ("start_time", "end_time", "group_by")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "month": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
    "since": {"type": "string", "format": "date"},
    "until": {"type": "string", "format": "date"},
    "group_by": {"type": "string"},
    "tenant": {"type": "string"},
    "format": {"enum": ["json", "csv"]},
    "start_time": {"type": "integer", "minimum": 0},
    "end_time": {"type": "integer", "minimum": 0},
}
_DETAILS = ["low", "high", "auto"]
