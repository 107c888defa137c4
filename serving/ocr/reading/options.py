"""What a request for a document asks for: its options, checked once, as JSON or as form fields. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from serving.errors import InvalidRequestError
from serving.ocr.reading.pages import MODES, PageRequest
from serving.settings.ocr import OcrSettings

FORMATS = ("markdown", "text", "layout")
AUTO = "auto"
_MAX_PROMPT_CHARS = 4096
_MAX_NAME_CHARS = 255
_KNOWN = frozenset(
    {"model", "document", "pages", "mode", "format", "prompt", "dpi", "stream", "max_tokens", "include_images"}
    | {"include_page_images"}
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Everything but the document and the key."""

    model: str
    pages: str | None = None
    mode: str | None = None
    format: str = "markdown"
    prompt: str | None = None
    dpi: int | None = None
    max_tokens: int | None = None
    include_images: bool = False
    stream: bool = False
    include_page_images: bool = False
    """In a stream: the pages as they were drawn, too."""

    def page_request(self, settings: OcrSettings, api_key: str | None) -> PageRequest:
        """How each of the pages is to be read."""
        usual = settings.text_prompt if self.format == "text" else settings.markdown_prompt
        return PageRequest(self.model, self.prompt or usual, self.mode, self.max_tokens, api_key)

    def to_json(self) -> dict[str, Any]:
        """As the API shows them with a job; `read_options` takes it back."""
        found = asdict(self)
        del found["stream"], found["include_page_images"]
        return found


def read_options(given: Mapping[str, Any]) -> ReadOptions:
    """Options of a JSON body or of `ReadOptions.to_json`.

    Raises:
        InvalidRequestError: `param` says which one is wrong.
    """
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise InvalidRequestError(f"There is no option {unknown[0][:100]!r}.", param=unknown[0][:100])
    mode = _read_choice(given, "mode", (*MODES, AUTO))
    return ReadOptions(
        model=_read_text(given, "model", _MAX_NAME_CHARS) or _refuse("model", "the name of a model; it is required"),
        pages=_read_text(given, "pages", _MAX_PROMPT_CHARS),
        mode=mode,
        format=_read_choice(given, "format", FORMATS) or FORMATS[0],
        prompt=_read_text(given, "prompt", _MAX_PROMPT_CHARS, is_line=False),
        dpi=_read_count(given, "dpi", 18, 600),
        max_tokens=_read_count(given, "max_tokens", 1, 2**31 - 1),
        include_images=_read_flag(given, "include_images"),
        stream=_read_flag(given, "stream"),
        include_page_images=_read_flag(given, "include_page_images"),
    )


def read_form_options(fields: Mapping[str, str]) -> ReadOptions:
    """Options of form fields, where everything is text. Empty ones are as good as missing.

    Raises:
        InvalidRequestError: as `read_options` does.
    """
    given: dict[str, Any] = {name: text for name, text in fields.items() if text != ""}
    for name in ("dpi", "max_tokens"):
        if name in given and re.fullmatch(r"[0-9]{1,9}", given[name]):
            given[name] = int(given[name])
    for name in ("include_images", "include_page_images", "stream"):
        if name in given:
            given[name] = {"true": True, "1": True, "false": False, "0": False}.get(given[name].lower(), given[name])
    if "document" in given:
        _refuse("document", "left out of a form, whose file part it is")
    return read_options(given)


def without_stream(options: ReadOptions) -> ReadOptions:
    """For a job.

    Raises:
        InvalidRequestError: it asks for a stream.
    """
    if options.stream:
        _refuse("stream", "false for a job; GET its pages as they come")
    return replace(options, stream=False, include_page_images=False)


def _read_text(given: Mapping[str, Any], name: str, max_chars: int, *, is_line: bool = True) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value or len(value) > max_chars:
        _refuse(name, f"a text of 1 to {max_chars} characters")
    if is_line and _CONTROL.search(value):
        _refuse(name, "a text without control characters")
    return value


def _read_choice(given: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        _refuse(name, f"one of {', '.join(choices)}")
    return value


def _read_count(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        _refuse(name, f"a whole number from {least} to {most}")
    return value


def _read_flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, "true or false")
    return bool(value)


def _refuse(param: str, wanted: str) -> Any:
    raise InvalidRequestError(f"{param} must be {wanted}.", param=param)
