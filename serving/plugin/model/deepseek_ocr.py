"""DeepSeek-OCR for vLLM, with all sizes from the checkpoint, and pixels normalised on the model's device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from serving.plugin.interfaces.vllm_internals import mark_image_tower, mark_language_model
from serving.plugin.model.processor import (
    IMAGE_TOKEN,
    DeepseekOCRDummyInputsBuilder,
    DeepseekOCRMultiModalProcessor,
    DeepseekOCRProcessingInfo,
)
from serving.plugin.model.sam_cpu import turn_weights
from serving.plugin.model.view_threads import ViewThreads
from serving.plugin.model.vision import (
    MlpProjector,
    SamEncoder,
    VisionSizes,
    build_clip,
    project_views,
    views_per_batch,
)
from serving.plugin.modes.image_config import read_image_config
from serving.plugin.modes.resolution import TileGrid

_HALF = (0.5, 0.5, 0.5)


@MULTIMODAL_REGISTRY.register_processor(
    DeepseekOCRMultiModalProcessor,
    info=DeepseekOCRProcessingInfo,
    dummy_inputs=DeepseekOCRDummyInputsBuilder,
)
class DeepseekOCRForCausalLM(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """DeepEncoder and a DeepSeek mixture-of-experts decoder (vLLM's own), under the published weight names."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.embed_tokens.": "language_model.model.embed_tokens.",
            "model.layers.": "language_model.model.layers.",
            "model.norm.": "language_model.model.norm.",
            "lm_head.": "language_model.lm_head.",
            "model.": "",
        },
        # CLIP's buffer of 0, 1, 2, ...: older libraries saved it, and vLLM would refuse a file that has it.
        orig_to_new_suffix={".embeddings.position_ids": None},
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return IMAGE_TOKEN
        raise ValueError("Only images are supported")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.tile_tag != "2D":
            raise ValueError(f"config.json: tile_tag {config.tile_tag!r} is not supported, only '2D' is")
        processor_config = read_image_config(vllm_config.model_config)
        self.config = config
        mean, std = (tuple(processor_config.get(key, _HALF)) for key in ("image_mean", "image_std"))
        with mark_image_tower(self, vllm_config):
            self.vision_sizes = VisionSizes.from_config(config.vision_config)
            self.sam_model = SamEncoder(self.vision_sizes, mean, std)
            self.vision_model = build_clip(
                self.vision_sizes, vllm_config.quant_config, maybe_prefix(prefix, "vision_model")
            )
            self.projector = MlpProjector(config.projector_config)
            num_hidden = config.projector_config.n_embed
            self.image_newline = nn.Parameter(torch.empty(num_hidden))
            self.view_seperator = nn.Parameter(torch.empty(num_hidden))  # spelled as in the published weights
        with mark_language_model(self, vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self._threads = ViewThreads.from_environ()
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings | None:
        """Return the features of every page: a tuple of (num_tokens, hidden), tiles first, then the global view.

        The arguments are the processor's output, as tensors or (if sizes differ) as lists with one item per page:
        `pixel_values` uint8 (3, b, b), `images_crop` uint8 (num_tiles, 3, s, s), `images_spatial_crop` columns, rows.
        """
        if kwargs.get("pixel_values") is None:
            return None
        grids = [TileGrid(*map(int, grid)) for grid in kwargs["images_spatial_crop"]]
        stacks = [stack for views in zip(kwargs["pixel_values"], kwargs["images_crop"], strict=True) for stack in views]
        features = self._encode([stack if stack.dim() == 4 else stack[None] for stack in stacks])
        pages, tiles = features[::2], features[1::2]
        return tuple(self._assemble(*parts) for parts in zip(pages, tiles, grids, strict=True))

    def _encode(self, stacks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the features of stacks of views, each (n, 3, s, s) uint8 -> (n, (s/64)^2, hidden).

        Views of the same size are encoded together, across pages and requests, as far as the memory bound allows.
        """
        places: dict[int, list[int]] = {}  # by size of view: the indices of the stacks with that size
        for place, stack in enumerate(stacks):
            if len(stack):
                places.setdefault(stack.shape[-1], []).append(place)
        batches = {
            size: self._split([stacks[place] for place in having], self._views_per_batch(size))
            for size, having in places.items()
        }
        in_order = [*itertools.chain.from_iterable(batches.values())]
        # Only on a CPU: a device has its streams per thread, so there the calling thread encodes everything.
        each = self._threads.map if self.sam_model.is_ours(self.image_newline.device) else map
        compressed = iter(each(self.sam_model, in_order))
        features: list[torch.Tensor] = [self.image_newline.new_empty((0, 0, 0))] * len(stacks)
        for size, having in places.items():
            parts = self._project([*itertools.islice(compressed, len(batches[size]))])
            for place, part in zip(having, parts.split([len(stacks[place]) for place in having]), strict=True):
                features[place] = part
        return features

    def _project(self, compressed: list[torch.Tensor]) -> torch.Tensor:
        """Return the features of all views of a size: one batch on a device, which a few views do not fill; SAM's
        batches on a CPU, whose caches hold no more."""
        batches = compressed if compressed[0].device.type == "cpu" else [torch.cat(compressed)]
        return torch.cat([project_views(self.vision_model, self.projector, batch) for batch in batches])

    @staticmethod
    def _split(stacks: list[torch.Tensor], size: int) -> tuple[torch.Tensor, ...]:
        """Return batches of this many views from all stacks. With only one stack pixels are not copied."""
        return (stacks[0] if len(stacks) == 1 else torch.cat(stacks)).split(size)

    def _views_per_batch(self, view_size: int) -> int:
        return views_per_batch(self.vision_sizes, view_size, self.image_newline.dtype, self.image_newline.device)

    def _assemble(self, page: torch.Tensor, tiles: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        """Return a page's features in the order of its placeholders: (num_tokens, hidden)."""
        parts = [self._with_newlines(tiles, grid)] if grid.is_tiled else []
        parts += [self._with_newlines(page, TileGrid(1, 1)), self.view_seperator[None]]
        return torch.cat(parts)

    def _with_newlines(self, views: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        """Arrange (num_views, side^2, hidden) as one image of the grid and end each of its rows with a newline."""
        hidden, side = views.shape[-1], int(views.shape[1] ** 0.5)
        rows = grid.rows * side
        picture = views.view(grid.rows, grid.columns, side, side, hidden).permute(0, 2, 1, 3, 4)
        picture = picture.reshape(rows, grid.columns * side, hidden)
        newline = self.image_newline.expand(rows, 1, hidden)
        return torch.cat([picture, newline], dim=1).view(-1, hidden)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        if isinstance(self.sam_model, SamEncoder) and self.sam_model.is_ours(self.image_newline.device):
            turn_weights(self.sam_model)
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector", tower_model=["sam_model", "vision_model"]
        )
