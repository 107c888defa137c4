"""The OCR API's answers, as the service builds them, clients parse them and `/openapi.json` describes them.

Amounts are US dollars, boxes are (left, top, right, bottom) in pixels of the page as it was rendered. Pages are counted
from 0 by `index` and from 1 by `number`. Clients ignore fields that they do not know, and a field that an older service
does not send needs a default here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, computed_field

Value = TypeVar("Value")
Absent = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]
"""A field that is left out of the JSON, rather than null, when it has no value."""


class Shape(BaseModel):
    """Base of everything that the API sends."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", validate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )

    def to_json(self) -> bytes:
        """As `model_dump_json`, but without a string in between: streams send many small events."""
        return self.__pydantic_serializer__.to_json(self, by_alias=True)


class Dimensions(Shape):
    """Size of a page as it was read, in pixels."""

    width: int
    height: int
    dpi: int | None = None
    """None for images, which have pixels of their own. Below what was asked for if the page would be too large."""


class Block(Shape):
    """A part of a page with the label that the model gave it."""

    label: str
    text: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()


class PageFigure(Shape):
    """A picture that was cut out of a page."""

    id: str
    box: tuple[int, int, int, int]
    image_base64: str

    # Mistral's names for the box
    @computed_field  # type: ignore[prop-decorator]
    @property
    def top_left_x(self) -> int:
        return self.box[0]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def top_left_y(self) -> int:
        return self.box[1]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bottom_right_x(self) -> int:
        return self.box[2]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bottom_right_y(self) -> int:
        return self.box[3]


class OcrPageUsage(Shape):
    """Tokens and cost of one page, all attempts included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    estimated_cost: float = 0.0


class ErrorDetail(Shape):
    """Why a page or a job failed, in the shape of OpenAI's errors."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


class PageWarning(Shape):
    """What may be wrong with a page that was read: its text may be incomplete."""

    code: str
    """`damaged`, `font_missing`, `font_substituted`, `resolution_reduced`, `cut_into_parts`, `text_layer_unused` or
    `text_layer_differs`; later versions may add others."""
    message: str


class TextDifference(Shape):
    """Words that the text layer has and the reading has not, or the other way round."""

    layer: str
    read: str


class TextLayerCheck(Shape):
    """How a page's text layer compares with what the model read."""

    agreement: float
    """The part of the words that both have, from 0 to 1."""
    differences: tuple[TextDifference, ...] = ()
    """The first twenty."""


class OcrPage(Shape):
    """A page that was read, or that failed."""

    index: int
    number: int
    status: Literal["completed", "failed"]
    dimensions: Dimensions | None = None
    text: Absent[str] = None
    """Only with the format `text`."""
    markdown: Absent[str] = None
    """Only with the formats `markdown` and `layout`."""
    blocks: Absent[tuple[Block, ...]] = None
    """Only with the format `layout`."""
    html: Absent[str] = None
    hocr: Absent[str] = None
    alto: Absent[str] = None
    pdf_base64: Absent[str] = None
    """These four only with the format of the name: a whole document of one page."""
    images: Absent[tuple[PageFigure, ...]] = None
    """Only with `include_images`."""
    mode: str | None = None
    """Resolution mode of the last attempt."""
    finish_reason: str | None = None
    """`stop`; `length` when the answer reached its limit; `repetition` when the model kept repeating itself."""
    retries: int = 0
    usage: OcrPageUsage = OcrPageUsage()
    error: ErrorDetail | None = None
    source: Absent[Literal["text_layer"]] = None
    """`text_layer` when the text was taken from the PDF and no model was asked."""
    text_layer: Absent[TextLayerCheck] = None
    """Only with `text_layer: verify`."""
    warnings: Absent[tuple[PageWarning, ...]] = None
    seq: Absent[int] = None
    """Only for a job's page: its place in the order of finishing."""

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def content(self) -> str:
        """The page in the format that was asked for."""
        return self.markdown or self.text or self.html or self.hocr or self.alto or ""


class ImageTokens(Shape):
    """The part of the prompt tokens that images take."""

    image_tokens: int = 0


class OcrUsage(Shape):
    """Totals of a document, or of as much of it as is done."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: ImageTokens = ImageTokens()
    estimated_cost: float = 0.0
    pages_processed: int = 0
    """Pages that were read."""
    pages_failed: int = 0


class DocumentFacts(Shape):
    """What the service found a document to be."""

    format: str | None = None
    num_pages: int | None = None
    size_bytes: int | None = None


class JoinedPart(Shape):
    """A paragraph, heading or table of the whole document."""

    text: str
    pages: tuple[int, ...]
    """Numbers of the pages that it came from: several where page breaks cut it."""


class UsageInfo(Shape):
    """Usage under Mistral's names."""

    pages_processed: int
    doc_size_bytes: int | None


class OcrResult(Shape):
    """The answer to a document that was read in one request."""

    id: str
    object: Literal["ocr.result"] = "ocr.result"
    created: int = 0
    """Seconds since 1970."""
    model: str
    document: DocumentFacts
    pages: tuple[OcrPage, ...]
    joined: Absent[tuple[JoinedPart, ...]] = None
    """Only with `join`: the document as one text, without what repeats on its pages."""
    page_base: Absent[int] = None
    """Number of the first page as the request's `pages` counted."""
    usage: OcrUsage

    @computed_field  # type: ignore[prop-decorator]
    @property
    def usage_info(self) -> UsageInfo:
        """For clients of Mistral's API."""
        return UsageInfo(pages_processed=self.usage.pages_processed, doc_size_bytes=self.document.size_bytes)

    @property
    def content(self) -> str:
        """All pages that could be read, in the format that was asked for."""
        return "\n\n".join(page.content for page in self.pages if page.is_completed)


class JobStatus(StrEnum):
    """States of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class OcrJob(Shape):
    """A document that is read in the background. Times are seconds since 1970."""

    id: str
    object: Literal["ocr.job"] = "ocr.job"
    status: JobStatus
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    expires_at: int | None = None
    """When the service deletes the job and its results."""
    model: str
    document: DocumentFacts | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """As they were submitted, without the model."""
    pages_total: int | None = None
    pages_done: int = 0
    """Pages that are finished, the failed ones included."""
    pages_failed: int = 0
    usage: OcrUsage = OcrUsage()
    error: ErrorDetail | None = None


class JobPages(Shape):
    """Pages of a job that finished after the one that was asked for, in the order of finishing."""

    object: Literal["list"] = "list"
    data: tuple[OcrPage, ...]
    has_more: bool = False


class JobList(Shape):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: tuple[OcrJob, ...]
    has_more: bool = False


class CountRange(Shape):
    """A number of tokens between two bounds."""

    least: int
    most: int


class DollarRange(Shape):
    """An amount between two bounds, in decimal notation."""

    least: str
    most: str


class QuotedPage(Shape):
    """What one page would cost, or why it would fail."""

    index: int
    number: int
    status: Literal["quoted", "failed"]
    dimensions: Dimensions | None = None
    prompt_tokens: CountRange
    image_tokens: int
    completion_tokens: CountRange
    cost_dollars: DollarRange
    price_version: str
    error: ErrorDetail | None = None


class DocumentQuote(Shape):
    """What reading a document would cost, each page once."""

    object: Literal["quote"] = "quote"
    model: str
    prompt_tokens: CountRange
    image_tokens: int
    completion_tokens: CountRange
    cost_dollars: DollarRange
    price_version: str
    pages_quoted: int
    pages_failed: int
    pages: tuple[QuotedPage, ...]
    document: DocumentFacts


class ModelName(Shape):
    """A model's card, of which clients need the name."""

    id: str
    revision: str | None = None
    """Of the checkpoint; routers may not tell it."""


class ModelList(Shape):
    """The answer to `GET /v1/models`."""

    data: tuple[ModelName, ...]

    @property
    def names(self) -> list[str]:
        return [model.id for model in self.data]


class DocumentStarted(Shape):
    """A stream's first event."""

    type: Literal["document"] = "document"
    id: str
    model: str
    document: DocumentFacts
    pages: tuple[int, ...]
    """Indices of the pages that will be read."""


class PageStarted(Shape):
    """An attempt at a page begins. A second attempt invalidates the page's earlier deltas."""

    type: Literal["page.started"] = "page.started"
    index: int
    attempt: Annotated[int, Field(alias="try")] = 1
    """Counted from 1."""
    mode: str | None = None
    dimensions: Dimensions | None = None


class PageImage(Shape):
    """The page as it was rendered, with `include_page_images`."""

    type: Literal["page.image"] = "page.image"
    index: int
    image_url: str
    width: int
    height: int


class PageDelta(Shape):
    """A piece of a page's answer, as the model writes it: markup of boxes included."""

    type: Literal["page.delta"] = "page.delta"
    index: int
    text: str


class PageFinished(Shape):
    """The end of a page."""

    type: Literal["page.completed", "page.failed"]
    index: int
    page: OcrPage


class ResultFinished(Shape):
    """A stream's last event."""

    type: Literal["result"] = "result"
    usage: OcrUsage
    joined: Absent[tuple[JoinedPart, ...]] = None
    """As in `OcrResult`."""


StreamEvent = DocumentStarted | PageStarted | PageImage | PageDelta | PageFinished | ResultFinished

_EVENT: TypeAdapter[StreamEvent] = TypeAdapter(Annotated[StreamEvent, Field(discriminator="type")])
_EVENT_TYPES = frozenset(
    ("document", "page.started", "page.image", "page.delta", "page.completed", "page.failed", "result")
)


def read_event(frame: dict[str, Any]) -> StreamEvent | None:
    """Parse one event of a stream; None for an event type that this version does not know.

    Raises:
        pydantic.ValidationError: a known event with other fields.
    """
    return _EVENT.validate_python(frame) if frame.get("type") in _EVENT_TYPES else None
