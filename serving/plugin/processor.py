"""vLLM's multimodal processing for DeepSeek-OCR: pages to views, placeholders in the prompt, and their count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from serving.plugin.images import build_views
from serving.plugin.modes import ResolutionMode

IMAGE_TOKEN = "<image>"
_DEFAULT_MEAN = (0.5, 0.5, 0.5)


class DeepseekOCRProcessingInfo(BaseProcessingInfo):
    """What the processor and the dummy inputs need to know about the checkpoint."""

    @cached_property
    def mode(self) -> ResolutionMode:
        return ResolutionMode.from_config(self.ctx.get_hf_image_processor_config())

    @cached_property
    def image_mean(self) -> tuple[float, ...]:
        return tuple(self.ctx.get_hf_image_processor_config().get("image_mean", _DEFAULT_MEAN))

    @cached_property
    def image_token_id(self) -> int:
        """Id of the placeholder.

        Raises:
            ValueError: the checkpoint's tokenizer does not have it.
        """
        token_id = self.get_tokenizer().get_vocab().get(IMAGE_TOKEN)
        if token_id is None:
            raise ValueError(f"the tokenizer of {self.model_id} has no token {IMAGE_TOKEN}")
        return token_id

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # Said outright, so that vLLM does not process a dummy page of the largest size to find out.
        return {"image": self.mode.num_tokens(*self.mode.largest_page())}


class DeepseekOCRDummyInputsBuilder(BaseDummyInputsBuilder[DeepseekOCRProcessingInfo]):
    """The largest page there can be, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        width, height = self.info.mode.largest_page()
        images = self._get_dummy_images(width=width, height=height, num_images=mm_counts.get("image", 0))
        return {"image": images}


class DeepseekOCRMultiModalProcessor(BaseMultiModalProcessor[DeepseekOCRProcessingInfo]):
    """Turns the images of a request into uint8 views and puts as many placeholders as there will be features."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        if hf_kwargs:
            raise ValueError(f"mm_processor_kwargs: {', '.join(sorted(hf_kwargs))} cannot be set for this model")
        mode = self.info.mode
        red, green, blue = (int(value * 255) for value in self.info.image_mean)
        pages = [build_views(page, mode, (red, green, blue)) for page in cast(list[Image.Image], hf_data["images"])]
        return BatchFeature(
            {
                "pixel_values": torch.stack([page.global_view for page in pages]),
                "images_crop": torch.cat([page.tiles for page in pages]),
                "images_spatial_crop": torch.tensor([[page.grid.columns, page.grid.rows] for page in pages]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        grids = hf_inputs.get("images_spatial_crop", torch.empty((0, 2), dtype=torch.long))
        num_tiles = torch.where((grids > 1).any(dim=-1), grids.prod(dim=-1), 0)
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "images_crop": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "images_spatial_crop": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token_id = self.info.image_token_id

        def placeholders(item: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                return [token_id] * images.get_feature_size(item)
            size = images.get_image_size(item)
            return [token_id] * self.info.mode.num_tokens(size.width, size.height)

        return [PromptReplacement(modality="image", target=[token_id], replacement=placeholders)]
