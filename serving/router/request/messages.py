"""Checks a chat's messages, and brings those that clients write in other ways into the engine's form. Pure.

A message that the engine understands as it is costs a look at each of its parts. One that it does not (`input_image`,
`image_url` as a string, `detail: null`, null content, base64 with line breaks) is changed in place, and the body is
then encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.errors import BadBase64Error, InvalidRequestError
from serving.plugin.modes.selection import AUTO
from serving.router.request.checks import refuse
from serving.router.request.fields import check_function
from serving.router.request.image_headers import check_image_url, repair_data_url
from serving.settings.router import RouterSettings

MODE_FOR_DETAIL = {"low": "small", "high": "gundam", "auto": AUTO, "original": "gundam"}
"""Modes for the values of OpenAI's `image_url.detail`."""
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_TEXT_PARTS = {"text": "text", "refusal": "refusal"}
_OTHER_TEXTS = frozenset({"input_text", "output_text"})
_FILES = frozenset({"file", "input_file"})
_KINDS = "text, refusal, image_url, input_text, input_image, file and input_file"
_OTHER_MEDIA = frozenset({"uuid", "image_pil", "image_embeds", "input_image"}) | {
    "audio_url",
    "audio_embeds",
    "input_audio",
    "video_url",
    "video_embeds",
    "prompt_embeds",
    "file",
    "thinking",
    "tool_reference",
}


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """A document that a message holds."""

    param: str
    """Its place in the request, for error messages."""
    url: str
    """A data URL, or one that the OCR service is to fetch."""
    name: str | None


@dataclass(slots=True)
class Content:
    """What a prompt consists of."""

    num_chars: int = 0
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    """Of every image; None for one that is still to be fetched."""
    details: list[str | None] = field(default_factory=list)
    documents: list[DocumentPart] = field(default_factory=list)
    num_prompts: int = 1
    is_changed: bool = False
    """Whether the messages are no longer those of the client's body."""


def check_messages(messages: Any, router: RouterSettings) -> Content:
    """Check all messages; those in a foreign form are changed in place.

    Raises:
        RequestError: `param` is the place of what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", param="messages")
    if len(messages) > router.limits.max_messages:
        raise InvalidRequestError(f"messages may hold {router.limits.max_messages} at most.", param="messages")
    found = Content()
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequestError("Every message must be an object.", param=f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, str):
            found.num_chars += len(content)
        elif isinstance(content, list):
            for j, part in enumerate(content):
                _check_part(content, j, part, f"messages[{i}].content[{j}]", found, router)
        elif content is None:
            message["content"] = ""
            found.is_changed = True
        else:
            raise refuse(f"messages[{i}].content", "a string or a list of parts")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            if role != "function":
                raise refuse(f"messages[{i}].role", f"one of {', '.join(sorted(_ROLES))}")
            message["role"] = "tool"  # OpenAI's name for it before there were tools
            found.is_changed = True
        if len(message) > 2:  # besides role and content
            _check_calls(message, f"messages[{i}]")
    return found


def _check_part(parts: list[Any], j: int, part: Any, param: str, found: Content, router: RouterSettings) -> None:
    """Accept only text, images and documents: vLLM would fetch what other parts refer to, and accepts embeddings and
    keys of its cache (`uuid`, shared by all clients) anywhere in a part."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
        parts[j], found.is_changed = part, True
    if not isinstance(part, dict):
        raise InvalidRequestError("Every content part must be an object.", param=param)
    kind = part.get("type", "image_url" if "image_url" in part else None)
    text_key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if text_key is None and kind != "image_url":
        part = _translate(part, kind, param, found)
        if part is None:
            parts[j] = {"type": "text", "text": ""}
            return
        parts[j], found.is_changed = part, True
        text_key = _TEXT_PARTS.get(part["type"])
    if text_key is not None and "image_url" in part:
        raise InvalidRequestError("A part of type text may not have image_url.", param=f"{param}.image_url")
    if not _OTHER_MEDIA.isdisjoint(part):
        key = sorted(_OTHER_MEDIA.intersection(part))[0]
        raise InvalidRequestError(f"A content part may not have {key}.", param=f"{param}.{key}")
    if text_key is None:
        _check_image(part, f"{param}.image_url", found, router)
        return
    text = part.get(text_key)
    if isinstance(text, str):
        found.num_chars += len(text)
    elif text is None:
        part[text_key], found.is_changed = "", True
    else:
        raise refuse(f"{param}.{text_key}", "a string")


def _translate(part: dict[str, Any], kind: Any, param: str, found: Content) -> dict[str, Any] | None:
    """A part of another API in the form of this one; None for a document, which is noted."""
    if isinstance(kind, str) and kind in _OTHER_TEXTS:
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image":
        _refuse_file_id(part, param)
        return {"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail")}}
    if not isinstance(kind, str) or kind not in _FILES:
        raise InvalidRequestError(f"Content parts may be of type {_KINDS}.", param=f"{param}.type")
    file, place = (part.get("file"), f"{param}.file") if kind == "file" else (part, param)
    if not isinstance(file, dict):
        raise refuse(place, "an object with file_data")
    _refuse_file_id(file, place)
    name = file.get("filename")
    if not isinstance(name, str | None):
        raise refuse(f"{place}.filename", "a string")
    key = "file_data" if file.get("file_data") is not None else "file_url"
    url = file.get(key)
    if not isinstance(url, str) or not url:
        raise refuse(f"{place}.file_data", "a data URL: data:application/pdf;base64,...")
    if url.startswith("data:image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    if key == "file_data" and not url.startswith("data:"):
        url = f"data:application/pdf;base64,{url}"
    found.documents.append(DocumentPart(f"{place}.{key}", url, name))
    return None


def _refuse_file_id(part: Mapping[str, Any], param: str) -> None:
    if part.get("file_id") is not None:
        raise InvalidRequestError(
            "No files are stored here; send the file itself as a data URL.",
            param=f"{param}.file_id",
            code="unsupported_parameter",
        )


def _check_image(part: dict[str, Any], param: str, found: Content, router: RouterSettings) -> None:
    if len(found.sizes) == router.limits.max_images:
        raise InvalidRequestError(f"A request may hold {router.limits.max_images} images at most.", param=param)
    image = part.get("image_url")
    if not isinstance(image, dict):
        image = part["image_url"] = {"url": image, "detail": part.pop("detail", None)}
        found.is_changed = True
    detail = None
    if "detail" in image:
        detail = image.pop("detail")  # the engine refuses null; a mode takes its place
        found.is_changed = True
        if detail is not None and (not isinstance(detail, str) or detail not in MODE_FOR_DETAIL):
            known = ", ".join(MODE_FOR_DETAIL)
            raise InvalidRequestError(f"detail must be one of {known}.", param=f"{param}.detail")
    url = image.get("url")
    try:
        size = check_image_url(url, param, router)
    except BadBase64Error:
        image["url"] = url = repair_data_url(str(url))
        found.is_changed = True
        size = check_image_url(url, param, router)
    found.sizes.append(size)
    found.details.append(detail)


def _check_calls(message: dict[str, Any], param: str) -> None:
    """Check the fields of a message whose types vLLM does not check."""
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise refuse(f"{param}.tool_calls", "a list")
        for k, call in enumerate(calls):
            check_function(f"{param}.tool_calls[{k}]", call)
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str | None):
            raise refuse(f"{param}.{key}", "a string")
