"""The process that opens untrusted documents and renders their pages.

It has no secrets and writes no files, the kernel limits its memory, and it may be killed at any time. Requests arrive
on stdin as lines of JSON; each is answered on stdout by a line of JSON, followed by `size_bytes` of an image file. The
document's file is opened again for each page, so that nothing of it stays in memory.

    {"file": "/tmp/x", "format": "pdf"}                                             -> {"num_pages": 50}
    {"file": "/tmp/x", "format": "pdf", "page": 0, "dpi": 144, "max_pixels": 50000000}
        -> {"width": 1190, "height": 1684, "media_type": "image/png", "size_bytes": 81234, "dpi": 144,
            "warnings": [["damaged", "..."]], "parts": [[0, 0, 1190, 1684]]}
    the same with "part": [left, top, right, bottom], in pixels of the page         -> only that part of it
    {"file": "/tmp/x", "format": "pdf", "page": 0, "text": true}
        -> {"flaw": null, "size_bytes": 812}, followed by JSON: [["a line", left, top, right, bottom], ...]
    {"file": ..., "format": ..., "page": 0, "dpi": 144, "max_pixels": 50000000, "place": [["a block", [0, 0, 90, 20]]]}
        -> {"size_bytes": 912}, followed by JSON: [["a block", box, [[["a", box], ["block", box]]]], ...]
    the same with "searchable": true                                                -> a PDF of the page
    any request that fails                                                          -> {"code": ..., "message": ...}

Requests for encrypted documents have a "password" too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from serving.ocr.rendering import pdf, pictures
from serving.ocr.rendering.drawing import Drawing, PageError, WarningKind
from serving.ocr.rendering.strips import find_parts

_DEFAULT_MEMORY_BYTES = 2 * 2**30
_PART_TEXT = "The page is a strip of {} x {} pixels; it was read in {} parts, one after the other."


def main() -> None:
    """Answer requests until stdin ends."""
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Anything that a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # each request has its own limit
    for line in sys.stdin.buffer:
        answer(json.loads(line), answers, memory_bytes)


def answer(request: dict[str, Any], answers: BinaryIO, memory_bytes: int = _DEFAULT_MEMORY_BYTES) -> None:
    """Carry out a request and write the answer."""
    data = b""
    reply: dict[str, Any]
    try:
        if "text" in request:
            data, reply = read_text(request)
        elif "place" in request:
            data, reply = place(request, memory_bytes)
        elif "page" in request:
            data, reply = draw(request, memory_bytes)
        else:
            reply = {"num_pages": count_pages(Path(request["file"]), request["format"], request.get("password"))}
        reply["size_bytes"] = len(data)
    except PageError as error:
        reply = {"code": error.code, "message": str(error)}
    except MemoryError:
        reply = {"code": "page_too_large", "message": "The page needs more memory than rendering may use; lower dpi."}
    except Exception:  # noqa: BLE001  decoders raise anything on malformed files
        reply = {
            "code": "damaged_document",
            "message": "The document is damaged, or its content does not match its format.",
        }
    answers.write(json.dumps(reply).encode() + b"\n")
    answers.write(data)
    answers.flush()


def count_pages(file: Path, name: str, password: str | None = None) -> int:
    """The number of pages; frames of a GIF or WebP do not count as pages.

    Raises:
        PageError: the document cannot be opened.
    """
    return pdf.count_pages(file, password) if name == "pdf" else pictures.count_pages(file, name)


def draw(request: dict[str, Any], memory_bytes: int = _DEFAULT_MEMORY_BYTES) -> tuple[bytes, dict[str, Any]]:
    """Render one page: its image file, and the answer that describes it.

    Raises:
        PageError: the page cannot be rendered.
    """
    part = request.get("part")
    drawing = _draw(request, memory_bytes)
    if part is not None:
        drawing.image = drawing.image.crop(part)
        return drawing.encode()
    parts = find_parts(drawing.image)
    if len(parts) > 1:
        drawing.warn(WarningKind.CUT_INTO_PARTS, _PART_TEXT.format(*drawing.image.size, len(parts)))
    data, reply = drawing.encode()
    return data, reply | {"parts": parts}


def _draw(request: dict[str, Any], memory_bytes: int) -> Drawing:
    file, name, page, max_pixels = Path(request["file"]), request["format"], request["page"], request["max_pixels"]
    if name == "pdf":
        return pdf.draw(file, page, request["dpi"], max_pixels, request.get("password"))
    as_is = "part" not in request and "place" not in request
    return pictures.draw(file, name, page, max_pixels, memory_bytes, is_part=not as_is)


def place(request: dict[str, Any], memory_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """The places of a page's words as JSON, or the page as a searchable PDF.

    Raises:
        PageError: the page cannot be rendered.
    """
    from serving.ocr.rendering.words import TextBlock, place_words

    drawing = _draw(request, memory_bytes)
    texts = [TextBlock(text, tuple(box) if box is not None else None) for text, box in request["place"]]
    placed = place_words(drawing.image, texts)
    if request.get("searchable"):
        from serving.ocr.rendering.searchable_pdf import build_pdf

        return build_pdf(drawing.image, placed, drawing.dpi or request["dpi"]), {}
    lines = [
        [block.text, block.box, [[[word.text, word.box] for word in line] for line in block.lines]] for block in placed
    ]
    return json.dumps(lines).encode(), {}


def read_text(request: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The lines of a page's text layer as JSON, and the answer that describes them.

    Raises:
        PageError: the document cannot be opened.
    """
    from serving.ocr.rendering.text_layer import read_text_layer

    layer = read_text_layer(Path(request["file"]), request["page"], request.get("password"))
    return json.dumps([[line.text, *line.box] for line in layer.lines]).encode(), {"flaw": layer.flaw}


if __name__ == "__main__":
    main()
