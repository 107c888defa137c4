"""Reads the options of a request from JSON or from form fields. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from serving.errors import InvalidRequestError
from serving.ocr.reading.mistral import translate
from serving.ocr_api.options import ReadOptions

_FIELDS: Mapping[str, dict[str, Any]] = TypeAdapter(ReadOptions).json_schema()["properties"]
_FORM_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def read_options(given: Mapping[str, Any]) -> ReadOptions:
    """Parse options from a JSON body, or from `options_to_json`. Null counts as missing.

    Raises:
        InvalidRequestError: `param` names the option that is wrong.
    """
    given = translate(given)
    unknown = sorted(set(given) - _FIELDS.keys() - {"document"})
    if unknown:
        raise InvalidRequestError(f"Unknown option {unknown[0][:100]!r}; remove it.", param=unknown[0][:100])
    try:
        options = ReadOptions(**{name: given[name] for name in _FIELDS if given.get(name) is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        _refuse(
            name,
            "given: the name of a model that GET /v1/models lists"
            if first["type"] == "missing"
            else _describe(_FIELDS[name]),
        )
    if options.join and options.format not in ("markdown", "layout", "text"):
        _refuse("join", f"false for the format {options.format}")
    return options


def read_form_options(fields: Mapping[str, str]) -> ReadOptions:
    """Parse options from form fields, where everything is text. Empty fields count as missing.

    Raises:
        InvalidRequestError: as `read_options` does.
    """
    if fields.get("document"):
        _refuse("document", "left out of a form; send the document as the part named file")
    given: dict[str, Any] = {name: text for name, text in fields.items() if text != ""}
    for name in given.keys() & _FIELDS.keys():
        kind, text = _find_choice(_FIELDS[name]).get("type"), given[name]
        if kind == "integer" and re.fullmatch(r"[0-9]{1,9}", text):
            given[name] = int(text)
        elif kind == "boolean":
            given[name] = _FORM_FLAGS.get(text.lower(), text)
    return read_options(given)


def without_stream(options: ReadOptions) -> ReadOptions:
    """The options of a job, without those that only apply to streams.

    Raises:
        InvalidRequestError: they ask for a stream.
    """
    if options.stream:
        _refuse("stream", "false for a job; fetch its pages as they finish")
    if options.join:
        _refuse("join", "false for a job; join its pages when all are there")
    return replace(options, include_page_images=False)


def options_to_json(options: ReadOptions) -> dict[str, Any]:
    """Options as they are stored, and returned with a job: without the password."""
    found = asdict(options)
    del found["stream"], found["include_page_images"], found["password"], found["join"]
    if options.text_layer == "off":
        del found["text_layer"]
    return found


def _find_choice(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A field's schema without the alternative null."""
    found: Mapping[str, Any] = next((part for part in schema.get("anyOf", ()) if part["type"] != "null"), schema)
    return found


def _describe(schema: Mapping[str, Any]) -> str:
    """Describe the values of a field, from its JSON schema."""
    choice = _find_choice(schema)
    if "enum" in choice:
        return f"one of {', '.join(map(str, choice['enum']))}"
    if choice["type"] == "integer":
        return f"a whole number from {choice['minimum']} to {choice['maximum']}"
    if choice["type"] == "boolean":
        return "true or false"
    control = ", without control characters" if "pattern" in choice else ""
    return f"a text of 1 to {choice['maxLength']} characters{control}"


def _refuse(param: str, wanted: str) -> NoReturn:
    raise InvalidRequestError(f"{param} must be {wanted}.", param=param)
