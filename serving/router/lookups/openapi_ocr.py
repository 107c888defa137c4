"""The OpenAPI document's part of what the router relays to OCR services."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from serving.ocr_api.options import ReadOptions
from serving.ocr_api.shapes import DocumentQuote, JobList, JobPages, OcrJob, OcrResult, Shape

_ERROR = {"description": "What is wrong, in OpenAI's shape", "content": {"application/json": {"schema": {}}}}
_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_SENT: Literal["serialization"] = "serialization"
_ANSWERS = (OcrResult, DocumentQuote, OcrJob, JobList, JobPages)


def describe_documents(names: list[str]) -> dict[str, Any]:
    """Paths of documents and jobs; `names` are those of models."""
    job_id = [{"name": "job_id", "in": "path", "required": True, "schema": _TEXT}]
    body = _body(names)
    key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}}
    submit = {**_answering("Submit a document to be read in the background", "202", OcrJob), "requestBody": body}
    return {
        "/v1/ocr": {"post": {**_answering("Read a document", "200", OcrResult, has_stream=True), "requestBody": body}},
        "/v1/ocr/quote": {
            "post": {
                **_answering("What reading it would cost, each page once", "200", DocumentQuote),
                "requestBody": body,
            }
        },
        "/v1/ocr/jobs": {
            "post": {**submit, "parameters": [key]},
            "get": {**_answering("Your jobs, newest first", "200", JobList), "parameters": _page_by(_TEXT)},
        },
        "/v1/ocr/jobs/{job_id}": {
            "parameters": job_id,
            "get": _answering("A job", "200", OcrJob),
            "delete": {
                "summary": "Delete a job: its document, its results and its key",
                "responses": {"204": {"description": "They are gone"}, "default": _ERROR},
            },
        },
        "/v1/ocr/jobs/{job_id}/pages": {
            "parameters": job_id,
            "get": {
                **_answering("Pages that are done, in the order in which they were", "200", JobPages),
                "parameters": _page_by(_COUNT),
            },
        },
        "/v1/ocr/jobs/{job_id}/cancel": {
            "parameters": job_id,
            "post": _answering("End a job; what was read stays", "200", OcrJob),
        },
    }


def describe_answers() -> dict[str, Any]:
    """Schemas of the answers, by name, for `components.schemas`."""
    models = [(answer, _SENT) for answer in _ANSWERS]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    found: dict[str, Any] = schemas["$defs"]
    return found


def describe_document_body(names: list[str]) -> dict[str, Any]:
    """The schema of a document's request as JSON; `names` are those of models."""
    schema: dict[str, Any] = _body(names)["content"]["application/json"]["schema"]
    return schema


def _answering(summary: str, status: str, answer: type[Shape], *, has_stream: bool = False) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{answer.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if has_stream:
        content["text/event-stream"] = {}
    answers = {status: {"description": summary, "content": content}, "default": _ERROR}
    return {"summary": summary, "responses": answers}


def _page_by(after: dict[str, Any]) -> list[dict[str, Any]]:
    limit = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}}
    return [limit, {"name": "after", "in": "query", "schema": after}]


def _body(names: list[str]) -> dict[str, Any]:
    options = dict(TypeAdapter(ReadOptions).json_schema()["properties"])
    options["model"] = {**options["model"], "enum": names}
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
