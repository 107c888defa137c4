"""What the OCR service answers, as its clients see it. Fields that a newer service adds are ignored.

Amounts are US dollars, boxes are (left, top, right, bottom) in pixels of the page as it was drawn, pages are counted
from 0 by `index` and from 1 by `number`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Dimensions(_Answer):
    width: int
    height: int
    dpi: int | None = None
    """None for images, which have pixels of their own."""


class Block(_Answer):
    label: str
    text: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()


class PageFigure(_Answer):
    """A picture that was cut out of a page."""

    id: str
    box: tuple[int, int, int, int]
    image_base64: str


class OcrPageUsage(_Answer):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    estimated_cost: float = 0.0


class ErrorDetail(_Answer):
    """Why a page or a job failed, in the shape of OpenAI's errors."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


class OcrPage(_Answer):
    index: int
    number: int
    status: Literal["completed", "failed"]
    dimensions: Dimensions | None = None
    markdown: str | None = None
    text: str | None = None
    blocks: tuple[Block, ...] | None = None
    images: tuple[PageFigure, ...] | None = None
    mode: str | None = None
    finish_reason: str | None = None
    retries: int = 0
    usage: OcrPageUsage = OcrPageUsage()
    error: ErrorDetail | None = None
    seq: int | None = None
    """Of a job's page: its place in the order of finishing."""

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def content(self) -> str:
        """The page in the format that was asked for."""
        return (self.text if self.markdown is None else self.markdown) or ""


class ImageTokens(_Answer):
    image_tokens: int = 0


class OcrUsage(_Answer):
    """Of a document, or of as much of it as is done."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: ImageTokens = ImageTokens()
    estimated_cost: float = 0.0
    pages_processed: int = 0
    pages_failed: int = 0


class DocumentFacts(_Answer):
    format: str | None = None
    num_pages: int | None = None
    size_bytes: int | None = None


class OcrResult(_Answer):
    id: str
    model: str
    document: DocumentFacts
    pages: tuple[OcrPage, ...]
    usage: OcrUsage

    @property
    def content(self) -> str:
        """All pages that could be read, in the format that was asked for."""
        return "\n\n".join(page.content for page in self.pages if page.is_completed)


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class OcrJob(_Answer):
    id: str
    status: JobStatus
    created_at: float
    finished_at: float | None = None
    expires_at: float | None = None
    """When the service forgets the job and its results, seconds since 1970."""
    model: str
    document: DocumentFacts | None = None
    pages_total: int | None = None
    pages_done: int = 0
    """Pages that are finished, the failed ones included."""
    pages_failed: int = 0
    usage: OcrUsage = OcrUsage()
    error: ErrorDetail | None = None


class JobPages(_Answer):
    """Pages of a job that have finished since the one that was asked after."""

    data: tuple[OcrPage, ...]
    has_more: bool = False


class JobList(_Answer):
    data: tuple[OcrJob, ...]
    has_more: bool = False


class ModelName(_Answer):
    id: str


class ModelList(_Answer):
    data: tuple[ModelName, ...]

    @property
    def names(self) -> list[str]:
        return [model.id for model in self.data]


class DocumentStarted(_Answer):
    type: Literal["document"]
    id: str
    model: str
    document: DocumentFacts
    pages: tuple[int, ...]
    """Indices of the pages that will be read."""


class PageStarted(_Answer):
    type: Literal["page.started"]
    index: int
    number_of_try: Annotated[int, Field(alias="try")] = 1
    """A second try makes the page's earlier deltas void."""
    mode: str | None = None
    dimensions: Dimensions | None = None


class PageImage(_Answer):
    """The page as it was drawn, when the pictures were asked for."""

    type: Literal["page.image"]
    index: int
    image_url: str
    width: int
    height: int


class PageDelta(_Answer):
    type: Literal["page.delta"]
    index: int
    text: str
    """As the model writes it, markup of boxes included."""


class PageFinished(_Answer):
    type: Literal["page.completed", "page.failed"]
    index: int
    page: OcrPage


class ResultFinished(_Answer):
    type: Literal["result"]
    usage: OcrUsage


StreamEvent = DocumentStarted | PageStarted | PageImage | PageDelta | PageFinished | ResultFinished

_EVENT: TypeAdapter[StreamEvent] = TypeAdapter(Annotated[StreamEvent, Field(discriminator="type")])
_KNOWN = frozenset(("document", "page.started", "page.image", "page.delta", "page.completed", "page.failed", "result"))


def read_event(frame: dict[str, Any]) -> StreamEvent | None:
    """An event of a stream; None for one that this client doesn't know.

    Raises:
        pydantic.ValidationError: a known event with other fields.
    """
    return _EVENT.validate_python(frame) if frame.get("type") in _KNOWN else None
