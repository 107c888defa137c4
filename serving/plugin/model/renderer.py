"""vLLM's renderer, extended to pass pages to the image workers before it queues their request.

vLLM has one thread for all multimodal processors (their cache must see requests in order), which works on one request
at a time, however many image workers there are. The views are therefore created before that thread, where requests
are still concurrent and their modes are already known.
"""

from __future__ import annotations

from typing import Any

from vllm.multimodal.media.base import MediaWithBytes
from vllm.renderers.hf import HfRenderer

from serving.plugin.images import media  # noqa: F401 - registers the connector; vLLM builds a renderer first
from serving.plugin.images.encoded_page import EncodedPage
from serving.plugin.images.pipeline import image_pipeline
from serving.plugin.interfaces.vllm_internals import read_bodies_with_orjson
from serving.plugin.model.processor import DeepseekOCRMultiModalProcessor
from serving.plugin.modes.families import FAMILIES
from serving.plugin.repetition import loop_stop


class PageRenderer(HfRenderer):
    """Behaves like vLLM's own renderer, except for DeepSeek-OCR with image workers."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.has_pages = isinstance(self.mm_processor, DeepseekOCRMultiModalProcessor)
        if self.has_pages:
            # This constructor runs in API processes only.
            read_bodies_with_orjson()
            image_pipeline().start()
        if config.model_config.architecture in FAMILIES:
            loop_stop.count_stops(config.model_config.max_model_len)

    async def _process_tokens_async(self, prompt: Any, **options: Any) -> Any:
        # If vLLM's processor cache is on, only the processor knows which pages need views.
        if self.has_pages and self.mm_processor_cache is None:
            pages = encoded_pages(prompt.get("multi_modal_data"))
            if pages:
                await self.mm_processor.prepare(pages, prompt.get("mm_processor_kwargs") or {})
        return await super()._process_tokens_async(prompt, **options)

    def shutdown(self) -> None:
        if self.has_pages:
            image_pipeline().close()
        super().shutdown()


def encoded_pages(data: Any) -> list[EncodedPage]:
    """Return the images of a request, or none if some are not encoded pages, since modes are chosen for all of them."""
    images = (data or {}).get("image")
    items = images if isinstance(images, list) else [images]
    pages = [item.media if isinstance(item, MediaWithBytes) else item for item in items]
    encoded = [page for page in pages if isinstance(page, EncodedPage)]
    return encoded if len(encoded) == len(pages) else []
