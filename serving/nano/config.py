"""Every size of the nano model, and the JSON files that publish them.

`NanoConfig` is the one place where sizes live. The builder, the training model and the tests derive from it; the
serving side reads the JSON that `build_model_config` writes, so a nano and a published checkpoint look alike to it.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of the nano model: an encoder for 512x512 pages and a mixture-of-experts decoder.

    Lengths in pixels for `image_size` and `patch_size`, in patches for `sam_window`, in tokens for `max_positions`.
    """

    image_size: int = 512
    patch_size: int = 16
    sam_width: int = 96
    sam_layers: int = 4
    sam_heads: int = 3
    sam_global_layers: tuple[int, ...] = (1,)
    sam_window: int = 8
    sam_mlp_ratio: int = 4
    neck_channels: int = 64
    downsample_channels: tuple[int, int] = (192, 256)
    clip_width: int = 256
    clip_layers: int = 2
    clip_heads: int = 4
    clip_patch_size: int = 14
    clip_mlp_ratio: int = 4
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    dense_size: int = 640
    num_dense_layers: int = 1
    expert_size: int = 128
    num_experts: int = 8
    num_experts_per_token: int = 2
    num_shared_experts: int = 1
    vocab_size: int = 320
    max_positions: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.downsample_channels[1] != self.clip_width:
            raise ValueError("the compressed SAM features are CLIP's patch embeddings: their widths must agree")
        if self.hidden_size % self.num_heads:
            raise ValueError("the decoder's heads must be equally wide: hidden_size is no multiple of num_heads")

    @property
    def sam_side(self) -> int:
        """Patches along one side of the page."""
        return self.image_size // self.patch_size

    @property
    def grid_side(self) -> int:
        """Vision tokens along one side of the page, after the 4x compression per side."""
        return self.sam_side // 4

    @property
    def cell_size(self) -> int:
        """Pixels along one side of the square that one vision token stands for."""
        return self.patch_size * 4

    @property
    def num_image_tokens(self) -> int:
        """Prompt tokens of one untiled page: each grid row ends in a newline, the page in a separator."""
        return self.grid_side * (self.grid_side + 1) + 1

    @property
    def num_clip_positions(self) -> int:
        """Rows of CLIP's position table: one for the class token, then the grid."""
        return self.grid_side**2 + 1


NANO = NanoConfig()
"""The shipped checkpoint, which reads print on a grid; its tokens are `serving.nano.tokenizer`'s."""

FREE_PRINT = NanoConfig(
    sam_width=128,
    sam_heads=4,
    neck_channels=128,
    downsample_channels=(256, 256),
    clip_layers=3,
    dense_size=768,
    num_dense_layers=2,
    expert_size=160,
    num_experts=16,
    vocab_size=1152,
)
"""The checkpoint in training, which is to read print anywhere on a page; `serving.nano.print_tokens` has its tokens."""


def build_language_config(sizes: NanoConfig) -> dict[str, Any]:
    """Return the decoder's part of `config.json`: a DeepSeek-V2 decoder with plain multi-head attention."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": sizes.num_dense_layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.dense_size,
        "kv_lora_rank": None,
        "lm_head": True,
        "max_position_embeddings": sizes.max_positions,
        "moe_intermediate_size": sizes.expert_size,
        "n_group": 1,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": sizes.num_shared_experts,
        "num_attention_heads": sizes.num_heads,
        "num_experts_per_tok": sizes.num_experts_per_token,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_heads,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "float32",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": sizes.vocab_size,
    }


def build_vision_config(sizes: NanoConfig) -> dict[str, Any]:
    """Return the encoder's part of `config.json`.

    `neck_channels` and `window_size` are this project's additions; without them a reader assumes the published
    256 and 14.
    """
    return {
        "image_size": sizes.image_size,
        "mlp_ratio": float(sizes.sam_mlp_ratio),
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {
            "clip-l-14-224": {
                "heads": sizes.clip_heads,
                "image_size": sizes.clip_patch_size * sizes.grid_side,
                "layers": sizes.clip_layers,
                "patch_size": sizes.clip_patch_size,
                "width": sizes.clip_width,
            },
            "sam_vit_b": {
                "downsample_channels": list(sizes.downsample_channels),
                "global_attn_indexes": list(sizes.sam_global_layers),
                "heads": sizes.sam_heads,
                "layers": sizes.sam_layers,
                "neck_channels": sizes.neck_channels,
                "width": sizes.sam_width,
                "window_size": sizes.sam_window,
            },
        },
    }


def build_model_config(sizes: NanoConfig = NANO) -> dict[str, Any]:
    """Return `config.json`. As in the published one, the decoder's fields stand nested and at the top level."""
    language = build_language_config(sizes)
    return {
        **{key: value for key, value in language.items() if key != "architectures"},
        "_name_or_path": "nano",
        "architectures": ["DeepseekOCRForCausalLM"],
        "candidate_resolutions": [[sizes.image_size, sizes.image_size]],
        "global_view_pos": "head",
        "language_config": language,
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": sizes.clip_width + sizes.downsample_channels[1],
            "model_type": "mlp_projector",
            "n_embed": sizes.hidden_size,
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "vision_config": build_vision_config(sizes),
    }


TINY_SIDE = 512
"""Pixels of the side of the mode called tiny."""


def build_processor_config(sizes: NanoConfig = NANO) -> dict[str, Any]:
    """Return the image processor's settings: the Tiny mode, one untiled view of the whole page."""
    return {
        "add_special_token": False,
        "base_size": sizes.image_size,
        "candidate_resolutions": [[sizes.image_size, sizes.image_size]],
        "crop_mode": False,
        "downsample_ratio": 4,
        "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5],
        "image_size": sizes.image_size,
        "image_std": [0.5, 0.5, 0.5],
        "image_token": "<image>",
        "mask_prompt": False,
        "modes": ["tiny"] if sizes.image_size == TINY_SIDE else [],
        "normalize": True,
        "pad_token": "<｜▁pad▁｜>",
        "patch_size": sizes.patch_size,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
