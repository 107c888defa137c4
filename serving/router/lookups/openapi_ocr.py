"""The OpenAPI document's part of what the router relays to OCR services."""

from __future__ import annotations

from typing import Any

_ERROR = {"description": "What is wrong, in OpenAI's shape", "content": {"application/json": {"schema": {}}}}
_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}


def describe_documents(names: list[str]) -> dict[str, Any]:
    """Paths of documents and jobs; `names` are those of models."""
    job_id = [{"name": "job_id", "in": "path", "required": True, "schema": _TEXT}]
    body = _body(names)
    key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}}
    submit = {**_answering("A document to be read while nobody waits", "202", _JOB), "requestBody": body}
    return {
        "/v1/ocr": {"post": {**_answering("Read a document", "200", _RESULT, has_stream=True), "requestBody": body}},
        "/v1/ocr/quote": {
            "post": {**_answering("What reading it would cost, each page once", "200", _QUOTE), "requestBody": body}
        },
        "/v1/ocr/jobs": {
            "post": {**submit, "parameters": [key]},
            "get": {**_answering("Your jobs, newest first", "200", _list(_JOB)), "parameters": _page_by(_TEXT)},
        },
        "/v1/ocr/jobs/{job_id}": {
            "parameters": job_id,
            "get": _answering("A job", "200", _JOB),
            "delete": {
                "summary": "Delete a job: its document, its results and its key",
                "responses": {"204": {"description": "They are gone"}, "default": _ERROR},
            },
        },
        "/v1/ocr/jobs/{job_id}/pages": {
            "parameters": job_id,
            "get": {
                **_answering("Pages that are done, in the order in which they were", "200", _list(_PAGE)),
                "parameters": _page_by(_COUNT),
            },
        },
        "/v1/ocr/jobs/{job_id}/cancel": {
            "parameters": job_id,
            "post": _answering("End a job; what was read stays", "200", _JOB),
        },
    }


def _answering(summary: str, status: str, schema: dict[str, Any], *, has_stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if has_stream:
        content["text/event-stream"] = {}
    answers = {status: {"description": summary, "content": content}, "default": _ERROR}
    return {"summary": summary, "responses": answers}


def _page_by(after: dict[str, Any]) -> list[dict[str, Any]]:
    limit = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}}
    return [limit, {"name": "after", "in": "query", "schema": after}]


def _list(item: dict[str, Any]) -> dict[str, Any]:
    properties = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": item},
        "has_more": {"type": "boolean"},
    }
    return {"type": "object", "required": ["data", "has_more"], "properties": properties}


def describe_document_body(names: list[str]) -> dict[str, Any]:
    """The schema of a document's request as JSON; `names` are those of models."""
    schema: dict[str, Any] = _body(names)["content"]["application/json"]["schema"]
    return schema


def _body(names: list[str]) -> dict[str, Any]:
    options = {
        "model": {"type": "string", "enum": names},
        "pages": {"type": "string", "description": "Counted from 1: 1-3,7"},
        "mode": {"enum": ["tiny", "small", "base", "large", "gundam", "auto"]},
        "format": {"enum": ["markdown", "text", "layout"], "default": "markdown"},
        "prompt": {"type": "string", "maxLength": 4096},
        "dpi": {"type": "integer", "minimum": 18, "maximum": 600},
        "max_tokens": {"type": "integer", "minimum": 1},
        "include_images": {"type": "boolean", "default": False},
        "stream": {"type": "boolean", "default": False},
    }
    document = {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["document_url", "image_url", "file"]},
            "document_url": {"type": "string", "description": "A data: URL, or https:// where the operator allows it"},
            "image_url": {"type": ["string", "object"]},
            "file": {"type": "string", "contentEncoding": "base64"},
            "file_name": _TEXT,
        },
    }
    form = {**options, "file": {"type": "string", "contentMediaType": "application/octet-stream"}}
    as_json = {"type": "object", "required": ["model", "document"], "properties": {**options, "document": document}}
    as_form = {"type": "object", "required": ["model", "file"], "properties": form}
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {"required": True, "content": content}


_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": {"type": "object", "properties": {"image_tokens": _COUNT}},
        "estimated_cost": {"type": "number", "description": "US dollars, in whole nanodollars"},
        "pages_processed": _COUNT,
        "pages_failed": _COUNT,
    },
}
_PAGE: dict[str, Any] = {
    "type": "object",
    "required": ["index", "number", "status"],
    "properties": {
        "index": _COUNT,
        "number": {"type": "integer", "minimum": 1},
        "status": {"enum": ["completed", "failed"]},
        "dimensions": {"type": ["object", "null"]},
        "markdown": _TEXT,
        "text": _TEXT,
        "blocks": {"type": "array", "items": {"type": "object"}},
        "images": {"type": "array", "items": {"type": "object"}},
        "mode": {"type": ["string", "null"]},
        "finish_reason": {"enum": ["stop", "length", "repetition", None]},
        "retries": _COUNT,
        "usage": {"type": "object"},
        "error": {"type": ["object", "null"]},
    },
}
_RESULT = {
    "type": "object",
    "required": ["id", "object", "pages", "usage"],
    "properties": {"object": {"const": "ocr.result"}, "pages": {"type": "array", "items": _PAGE}, "usage": _USAGE},
}
_RANGE = {"type": "object", "required": ["least", "most"], "properties": {"least": _COUNT, "most": _COUNT}}
_DOLLARS = {"type": "object", "required": ["least", "most"], "properties": {"least": _TEXT, "most": _TEXT}}
_QUOTED = {
    "prompt_tokens": _RANGE,
    "image_tokens": _COUNT,
    "completion_tokens": _RANGE,
    "cost_dollars": _DOLLARS,
    "price_version": _TEXT,
}
_QUOTED_PAGE = {
    "type": "object",
    "required": ["index", "number", "status", *_QUOTED],
    "properties": {
        **{name: _PAGE["properties"][name] for name in ("index", "number", "dimensions", "error")},
        **_QUOTED,
        "status": {"enum": ["quoted", "failed"]},
    },
}
_QUOTE = {
    "type": "object",
    "required": ["object", "model", *_QUOTED, "pages"],
    "properties": {
        "object": {"const": "quote"},
        "model": _TEXT,
        "document": {"type": "object"},
        **_QUOTED,
        "pages_quoted": _COUNT,
        "pages_failed": _COUNT,
        "pages": {"type": "array", "items": _QUOTED_PAGE},
    },
}
_JOB = {
    "type": "object",
    "required": ["id", "object", "status"],
    "properties": {
        "object": {"const": "ocr.job"},
        "status": {"enum": ["queued", "running", "completed", "failed", "cancelled"]},
        "pages_total": _COUNT,
        "pages_done": _COUNT,
        "pages_failed": _COUNT,
        "usage": _USAGE,
        "error": {"type": ["object", "null"]},
    },
}
