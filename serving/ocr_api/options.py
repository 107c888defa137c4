"""How a document is to be read: the options of a request, with their limits."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

ResolutionMode = Literal["tiny", "small", "base", "large", "gundam"]
Mode = Literal[ResolutionMode, "auto"]
TextLayer = Literal["off", "prefer", "verify"]
PageFormat = Literal["markdown", "text", "layout", "html", "hocr", "alto", "pdf"]
PLACED_FORMATS: frozenset[PageFormat] = frozenset({"hocr", "alto", "pdf"})
"""Formats that say where each word stands."""

RESOLUTION_MODES: tuple[ResolutionMode, ...] = get_args(ResolutionMode)
"""Fewest tokens per page first."""
MODES: tuple[Mode, ...] = get_args(Mode)

_Line = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True))
class ReadOptions:
    """Everything a request says except the document and the key. None leaves the choice to the service.

    Raises:
        pydantic.ValidationError: a value that the service would refuse.
    """

    model: Annotated[_Line, Field(max_length=255)]
    """One of the names that `GET /v1/models` lists."""
    pages: Annotated[_Line, Field(max_length=65_536)] | None = None
    """Pages to read: `1-3,7`, `5-` or `-5`. All of them by default. A list of numbers, as Mistral has it, counts from
    0."""
    mode: Mode | None = None
    """Resolution of the images that the model sees; `auto` chooses by page."""
    format: PageFormat = "markdown"
    """`layout` adds blocks with boxes to the markdown. `hocr`, `alto` and `pdf` (the page's picture with the text under
    it) place every word; where the model gives no boxes, words are placed by the page's ink."""
    prompt: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Replaces the format's own prompt."""
    dpi: Annotated[int, Field(ge=18, le=600)] | None = None
    """Resolution in which PDF pages are rendered."""
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Limit on the answer for one page."""
    text_layer: TextLayer = "off"
    """PDFs that contain their text: `prefer` takes it, without a model and at no cost, where it is all that the page
    shows; `verify` reads the page as well and reports where the two differ."""
    password: Annotated[_Line, Field(max_length=255)] | None = dataclasses.field(default=None, repr=False)
    """Opens an encrypted PDF. It is not logged, and kept in encrypted form until the document has been read."""
    join: bool = False
    """Return the document as one text as well: with paragraphs and tables whole that a page break cuts, and without
    running heads and page numbers. Only with the formats `markdown`, `layout` and `text`, and not for jobs: clients can
    join their pages with `serving.ocr_api.joining`."""
    include_images: bool = False
    """Return figures, cut out of the pages."""
    stream: bool = False
    """Answer with server-sent events instead of one JSON object."""
    include_page_images: bool = False
    """Streams only: send the rendered images of the first twenty pages."""
    page_base: Literal[0, 1] | None = None
    """Number of the first page in `pages`; 1 by default."""
    image_limit: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Most figures of the document."""
    image_min_size: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Shortest side of a figure, in pixels of the page."""
    table_format: Literal["markdown", "html"] | None = None
    """`html` keeps tables as HTML; by default only those whose cells span several rows or columns."""

    def fields(self) -> dict[str, Any]:
        """The options that differ from the service's defaults, by their names in the API."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        # The default of `text_layer` is left out for services that do not know it yet.
        return {
            name: value for name, value in values.items() if not (value is None or value is False or value == "off")
        }
