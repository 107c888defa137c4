"""vLLM's multimodal processing for DeepSeek-OCR: converts pages to views and puts placeholders into the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from serving.plugin.images.encoded_page import EncodedPage
from serving.plugin.images.picture import Colour
from serving.plugin.images.pipeline import image_pipeline
from serving.plugin.modes.image_config import read_image_config
from serving.plugin.modes.resolution import ResolutionMode
from serving.plugin.modes.selection import ChosenMode, ModeRules, ModeSelectionError, Size

IMAGE_TOKEN = "<image>"
_DEFAULT_MEAN = (0.5, 0.5, 0.5)


class DeepseekOCRProcessingInfo(BaseProcessingInfo):
    """The facts about the checkpoint that the processor and the dummy inputs need."""

    @cached_property
    def image_config(self) -> Mapping[str, Any]:
        return read_image_config(self.ctx.model_config)

    @cached_property
    def rules(self) -> ModeRules:
        return ModeRules.from_config(self.image_config)

    def choose_modes(self, options: Mapping[str, object], sizes: Sequence[Size]) -> list[ChosenMode]:
        """Return the mode of every image; the request's options take precedence over the server's.

        Raises:
            VLLMValidationError: the options are invalid (vLLM answers 400).
        """
        try:
            return self.rules.choose(options, self.ctx.get_merged_mm_kwargs({}), sizes)
        except ModeSelectionError as error:
            raise VLLMValidationError(f"mm_processor_kwargs: {error}.", parameter="mm_processor_kwargs") from error

    @cached_property
    def largest_mode(self) -> tuple[str, ResolutionMode]:
        return self.rules.largest(self.ctx.get_merged_mm_kwargs({}))

    @cached_property
    def image_mean(self) -> tuple[float, ...]:
        return tuple(self.image_config.get("image_mean", _DEFAULT_MEAN))

    @cached_property
    def padding(self) -> Colour:
        """The colour of the borders around a page."""
        red, green, blue = (int(value * 255) for value in self.image_mean)
        return red, green, blue

    @cached_property
    def image_token_id(self) -> int:
        """The id of the placeholder token.

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
        # Given explicitly: otherwise vLLM processes a dummy page of the largest size to determine it.
        _, mode = self.largest_mode
        return {"image": mode.num_tokens(*mode.largest_page())}


class DeepseekOCRDummyInputsBuilder(BaseDummyInputsBuilder[DeepseekOCRProcessingInfo]):
    """Builds the largest possible page, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        _, mode = self.info.largest_mode
        width, height = mode.largest_page()
        images = self._get_dummy_images(width=width, height=height, num_images=mm_counts.get("image", 0))
        return {"image": images}


class DeepseekOCRMultiModalProcessor(BaseMultiModalProcessor[DeepseekOCRProcessingInfo]):
    """Converts the images of a request to uint8 views and inserts one placeholder for each feature."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        # The memory profile must use the largest mode, whatever the default is.
        inputs.hf_processor_mm_kwargs = {"mode": self.info.largest_mode[0]}
        return inputs

    async def prepare(self, pages: Sequence[EncodedPage], options: Mapping[str, object]) -> None:
        """Have the image workers create the views of a request's pages before vLLM's processor handles the request.

        Args:
            pages: all images of the request.
            options: the request's `mm_processor_kwargs`.

        Raises:
            VLLMValidationError: the options are invalid (vLLM answers 400).
            ValueError: a page is damaged (400).
            RetryableRequestError: no worker was available for a page (503).
        """
        chosen = self.info.choose_modes(options, [page.size for page in pages])
        await image_pipeline().prepare(pages, chosen, self.info.padding)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        pages = cast(list[Image.Image], hf_data["images"])
        chosen = self.info.choose_modes(hf_kwargs, [page.size for page in pages])
        views = image_pipeline().views(pages, chosen, self.info.padding)
        # Lists with one tensor per image, because images of one request may have different sizes.
        return BatchFeature(
            {
                "pixel_values": [page.global_view for page in views],
                "images_crop": [page.tiles for page in views],
                "images_spatial_crop": torch.tensor([[page.grid.columns, page.grid.rows] for page in views]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "images_crop": MultiModalFieldConfig.batched("image"),
            "images_spatial_crop": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        """Return the options for the images that are not in vLLM's processor cache: only those are processed."""
        options = inputs.hf_processor_mm_kwargs
        modes = options.get("mode")
        is_cached = mm_is_cached.get("image", ())
        if not isinstance(modes, list) or len(modes) != len(is_cached):
            return options
        return {**options, "mode": [mode for mode, cached in zip(modes, is_cached, strict=True) if not cached]}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token_id = self.info.image_token_id
        images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
        if isinstance(images, ImageEmbeddingItems):
            counts = [images.get_feature_size(item) for item in range(len(images))]
        else:
            sizes = [images.get_image_size(item) for item in range(len(images))]
            pages = [(size.width, size.height) for size in sizes]
            chosen = self.info.choose_modes(hf_processor_mm_kwargs, pages)
            counts = [choice.mode.num_tokens(*page) for choice, page in zip(chosen, pages, strict=True)]
        return [
            PromptReplacement(modality="image", target=[token_id], replacement=lambda item: [token_id] * counts[item])
        ]
