"""Answers, options and the OpenAPI document agree."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pydantic
import pytest
from support.router_stack import build_settings

from serving.errors import InvalidRequestError
from serving.ocr.reading.options import read_form_options, read_options
from serving.ocr_api.options import MODES, ReadOptions
from serving.ocr_api.shapes import DocumentQuote, JobList, JobPages, OcrJob, OcrResult, Shape, read_event
from serving.router.lookups.openapi import build_document
from serving.settings.ocr import OcrSettings
from unit.ocr.api.test_wire import ANSWERS

KINDS: dict[str, type[Shape]] = {
    "layout": OcrResult,
    "text": OcrResult,
    "quote": DocumentQuote,
    "submitted": OcrJob,
    "job": OcrJob,
    "failed job": OcrJob,
    "pages": JobPages,
    "jobs": JobList,
}
RECORDED: dict[str, str] = json.loads(ANSWERS.read_text())
DOCUMENT = build_document(build_settings().model_copy(update={"ocr": OcrSettings(enabled=True)}))


def check(value: Any, schema: dict[str, Any]) -> None:
    jsonschema.validate(value, {**schema, "components": DOCUMENT["components"]})


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_that_was_parsed_is_written_as_it_came(name: str) -> None:
    assert KINDS[name].model_validate_json(RECORDED[name]).to_json().decode() == RECORDED[name]


def test_a_stream_that_was_parsed_is_written_as_it_came() -> None:
    lines = [line.removeprefix("data: ") for line in RECORDED["stream"].split("\n\n")][:-2]
    events = [read_event(json.loads(line)) for line in lines]
    assert [event.to_json().decode() for event in events if event is not None] == lines


@pytest.mark.parametrize(
    ("name", "path", "method", "status"),
    [
        ("layout", "/v1/ocr", "post", "200"),
        ("text", "/v1/ocr", "post", "200"),
        ("quote", "/v1/ocr/quote", "post", "200"),
        ("submitted", "/v1/ocr/jobs", "post", "202"),
        ("jobs", "/v1/ocr/jobs", "get", "200"),
        ("job", "/v1/ocr/jobs/{job_id}", "get", "200"),
        ("failed job", "/v1/ocr/jobs/{job_id}/cancel", "post", "200"),
        ("pages", "/v1/ocr/jobs/{job_id}/pages", "get", "200"),
    ],
)
def test_answers_fit_the_document(name: str, path: str, method: str, status: str) -> None:
    schema = DOCUMENT["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
    check(json.loads(RECORDED[name]), schema)
    with pytest.raises(jsonschema.ValidationError):
        check({}, schema)


OPTIONS = [
    {"mode": mode} for mode in (*MODES, "huge", "", 3)
] + [
    {"format": "layout"},
    {"format": "docx"},
    {"pages": "1-3,7"},
    {"pages": ""},
    {"pages": "1\n2"},
    {"prompt": "What is\nthis?"},
    {"prompt": "x" * 4097},
    {"dpi": 18},
    {"dpi": 17},
    {"dpi": True},
    {"dpi": "144"},
    {"dpi": 600.5},
    {"max_tokens": 1},
    {"max_tokens": 0},
    {"include_images": True},
    {"stream": 1},
    {"mode": None, "dpi": None, "prompt": None, "max_tokens": None},
]  # fmt: skip


@pytest.mark.parametrize("given", OPTIONS, ids=json.dumps)
def test_the_document_the_service_and_the_client_take_the_same_options(given: dict[str, Any]) -> None:
    body = {"model": "nano", "document": {"type": "file", "file": "eA=="}, **given}
    content = DOCUMENT["paths"]["/v1/ocr"]["post"]["requestBody"]["content"]
    name = next(iter(given))
    try:
        check(body, content["application/json"]["schema"])
    except jsonschema.ValidationError:
        with pytest.raises(InvalidRequestError) as refused:
            read_options(body)
        assert refused.value.param == name
        with pytest.raises(pydantic.ValidationError):
            ReadOptions("nano", **given)
    else:
        assert read_options(body) == ReadOptions("nano", **given)


def test_options_of_a_form_are_those_of_json() -> None:
    chosen = ReadOptions(
        "nano", "2-3", "auto", "layout", "Read.", 100, 9, include_images=True, include_page_images=True
    )
    texts = {name: str(value).lower() if value is True else str(value) for name, value in chosen.fields().items()}
    assert read_form_options({**texts, "stream": "0"}) == chosen
    assert read_options(chosen.fields()) == chosen
    for field, text in {"dpi": "1e2", "stream": "yes", "mode": "Tiny", "document": "x", "dip": "100"}.items():
        with pytest.raises(InvalidRequestError) as refused:
            read_form_options({"model": "nano", field: text})
        assert refused.value.param == field
