"""A page image that is decoded lazily."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from PIL import Image

from serving.plugin.images.decoding import Header, Pixels, decode
from serving.plugin.images.page_views import PageViews
from serving.plugin.images.picture import Colour
from serving.plugin.modes.resolution import ResolutionMode


class EncodedPage(Image.Image):
    """An image file whose size comes from its header; to other code it is a Pillow image in RGB.

    Accessing the pixels decodes them in the calling thread and raises DecodeError (a ValueError) if the file is
    damaged.

    data: the file.
    formats: Pillow's names of the allowed formats.
    background: shown behind transparent pixels.
    order: the views that were requested from the image pipeline, and their mode.
    """

    def __init__(self, data: bytes, header: Header, formats: tuple[str, ...], background: Colour) -> None:
        super().__init__()
        self._mode = "RGB"
        self._size = header.size
        self.data = data
        self.formats = formats
        self.background = background
        self.order: tuple[ResolutionMode, Future[PageViews]] | None = None
        self._decoded: Pixels | Image.Image | None = None

    @property
    def is_decoded(self) -> bool:
        return self._decoded is not None

    def decoded(self) -> Pixels | Image.Image:
        """Return the pixels, uint8 of shape (height, width, 3) or a Pillow image, decoding them once."""
        if self._decoded is None:
            self._decoded = decode(self.data, self.formats, self.background)
        return self._decoded

    @property
    def im(self) -> Any:
        self._fill()
        return super().im

    @im.setter
    def im(self, im: Any) -> None:
        self._im = im

    def load(self) -> Any:
        """Decode if necessary. Pillow's methods that need pixels call this first."""
        self._fill()
        return super().load()

    def _fill(self) -> None:
        if self._im is None:
            page = self.decoded()
            image = page if isinstance(page, Image.Image) else Image.fromarray(page)
            self._im = image.im
            self._size = image.size
