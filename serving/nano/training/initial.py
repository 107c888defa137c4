"""Where training starts: weights that already pass the page through, so that learning to read begins at once."""

import torch
from torch import Tensor, nn

from serving.nano.training.model import NanoOcr


def _start_as_space_to_depth(conv: nn.Conv2d) -> None:
    """Let each 2x2 block's four places fill a quarter of the channels each, through one orthonormal map.

    The usual start of a stride-2 convolution mixes the places, and telling them apart again costs most of the training.
    """
    outputs, inputs = conv.weight.shape[:2]
    share = torch.nn.init.orthogonal_(torch.empty(outputs // 4, inputs))
    conv.weight.zero_()
    for place in range(4):
        rows = slice(place * outputs // 4, (place + 1) * outputs // 4)
        conv.weight[rows, :, 1 + place // 2, 1 + place % 2] = share


def _wave_table(side: int, width: int) -> Tensor:
    """Return sines and cosines of a grid's columns and rows, [side * side, width]."""
    rates = torch.pi / side * 2.0 ** torch.linspace(-1, 3, width // 4)
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    grid = torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], -1)
    return grid.reshape(side * side, width)


@torch.no_grad()
def start_weights(model: NanoOcr) -> None:
    """Draw the model's weights in place from PyTorch's global generator."""
    trunk, sizes = model.model, model.sizes
    for tensor in (trunk.image_newline, trunk.view_seperator, trunk.embed_tokens.weight):
        nn.init.normal_(tensor, std=0.2)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    for layer in trunk.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
    sam, clip = trunk.sam_model, trunk.vision_model
    sam.pos_embed.copy_(0.1 * _wave_table(sizes.sam_side, sizes.sam_width).view_as(sam.pos_embed))
    _start_as_space_to_depth(sam.net_2)
    _start_as_space_to_depth(sam.net_3)
    clip.embeddings.patch_embedding.weight.zero_()
    positions = clip.embeddings.position_embedding.weight
    positions[0].zero_()
    positions[1:] = 0.5 * _wave_table(sizes.grid_side, sizes.clip_width)
    projector = trunk.projector.layers.weight
    nn.init.orthogonal_(projector[:, : sizes.clip_width], gain=0.5)
    nn.init.orthogonal_(projector[:, sizes.clip_width :])
