"""A media connector for vLLM that does not decode: images stay encoded until the image pipeline creates their views.

Chosen by the environment variable VLLM_MEDIA_CONNECTOR, set to `NAME`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vllm.envs as envs
from PIL import Image
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from serving.plugin.images.decoding import read_header
from serving.plugin.images.encoded_page import EncodedPage
from serving.plugin.images.pipeline import image_pipeline
from serving.plugin.interfaces import vllm_internals

NAME = "serving"


class EncodedImageIO(ImageMediaIO):
    """Loads images as `EncodedPage`, with vLLM's own checks."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Any]:
        """Check an image and wrap it.

        Raises:
            ValueError: the image has no allowed format, is too large, or is visibly damaged.
        """
        formats = vllm_internals.allowed_image_formats()
        header = read_header(data, formats)
        width, height = header.size
        limit = envs.VLLM_MAX_IMAGE_PIXELS
        if limit > 0 and width * height > limit:
            raise ValueError(
                f"Image dimensions {width}x{height} ({width * height} pixels) exceed the maximum of {limit} pixels. "
                "Set VLLM_MAX_IMAGE_PIXELS to increase this limit."
            )
        page = EncodedPage(data, header, formats, self.rgba_background_color)
        if not image_pipeline().has_workers:
            page.decoded()  # in this thread, of which vLLM has several, and not in the single thread of its processor
        converted = {"image_mode": self.image_mode, "rgba_background_color": self.rgba_background_color}
        # If the size is only known after decoding, it is treated like any other image.
        media: Image.Image = page if header.is_lazy else page.copy()
        return MediaWithBytes(media, data, None if header.mode == "RGB" else converted)

    def load_file(self, filepath: Path) -> MediaWithBytes[Any]:
        return self.load_bytes(filepath.read_bytes())


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class EncodedMediaConnector(MediaConnector):
    """vLLM's connector, except for the way RGB images are loaded."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        image_io = self._image_io(image_mode)
        if image_io is None:
            return super().fetch_image(image_url, image_mode=image_mode)
        return self.load_from_url(image_url, image_io, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        image_io = self._image_io(image_mode)
        if image_io is None:
            return await super().fetch_image_async(image_url, image_mode=image_mode)
        return await self.load_from_url_async(image_url, image_io, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    def _image_io(self, image_mode: str | None) -> EncodedImageIO | None:
        """Return the loader of images, or None if a pixel format other than RGB is requested."""
        options = {"image_mode": image_mode, **self.media_io_kwargs.get("image", {})}
        return EncodedImageIO(**options) if options["image_mode"] == "RGB" else None
