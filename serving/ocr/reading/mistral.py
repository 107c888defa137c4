"""Mistral's names for the options of a document: https://docs.mistral.ai/api/endpoint/ocr. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidRequestError

_MAX_PAGES = 10_000
_NOT_DONE = {
    "bbox_annotation_format": "Figures are not annotated",
    "document_annotation_format": "Documents are not annotated",
    "document_annotation_prompt": "Documents are not annotated",
    "confidence_scores_granularity": "Confidence is not told",
    "extract_header": "Headers are part of the page",
    "extract_footer": "Footers are part of the page",
}
"""Options that ask for something which is not done, unless they are off."""
_WITHOUT_EFFECT = frozenset({"id"})
_SHAPES = ("document_url", "image_url", "file", "file_id")


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same options under this service's names. A list of pages counts from 0, as it does there, and a text from 1,
    unless `page_base` says otherwise.

    Raises:
        InvalidRequestError: an option asks for something that is not done.
    """
    found = {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT and name not in _NOT_DONE}
    for name, reason in _NOT_DONE.items():
        if given.get(name):
            raise InvalidRequestError(f"{reason}; remove {name}.", param=name, code="unsupported_parameter")
    if given.get("include_image_base64") is not None:
        found["include_images"] = given["include_image_base64"]
    found.pop("include_image_base64", None)
    pages = given.get("pages")
    if isinstance(pages, list):
        if not pages or len(pages) > _MAX_PAGES or not all(type(page) is int and page >= 0 for page in pages):
            raise InvalidRequestError("pages must be a text such as 1-3,7, or a list of whole numbers.", param="pages")
        found["pages"] = ",".join(map(str, pages))
        if found.get("page_base") is None:
            found["page_base"] = 0
    return found


def infer_type(document: Mapping[str, Any]) -> Any:
    """The type of a document: what it says, or the one field that holds it."""
    kind = document.get("type")
    held = [shape for shape in _SHAPES if document.get(shape) is not None]
    if "file_id" in held:
        raise InvalidRequestError(
            "No files are stored here; send the document itself.",
            param="document.file_id",
            code="unsupported_parameter",
        )
    return held[0] if kind is None and len(held) == 1 else kind
