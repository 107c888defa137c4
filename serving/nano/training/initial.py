"""Where training starts: weights that already pass the page through, so that learning to read begins at once.

A patch becomes its 128 lowest cosine coefficients, heads of the SAM-style blocks look at neighbouring patches, and
each vision token keeps the same sixteen features of each of its sixteen patches, in sixteen channels for each. The
projector hands these on unchanged, beside the token's place on the page.
"""

import math

import torch
from torch import Tensor, nn

from serving.nano.training.encoder import SamAttention
from serving.nano.training.families import start_tokens
from serving.nano.training.model import NanoOcr

NUM_PLACES = 16
"""Patches of a vision token."""
_SHIFT_RATE = 2.5
"""How quickly a head's attention falls with the square of the distance, in patches, from where it looks."""
_QUERY = 4.0
_PLACE_SHARE = 0.3
"""Of a vision token's energy, that which says where it is."""
_SHIFTS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
)
"""Rows and columns away that the heads of every block look at."""


def _cosines(count: int, side: int) -> Tensor:
    """Return the `count` lowest cosine waves of a square of `side` pixels, orthonormal, [count, side, side]."""
    at = (torch.arange(side) + 0.5) * math.pi / side
    waves = torch.stack([(k * at).cos() * math.sqrt((2 if k else 1) / side) for k in range(side)])
    order = sorted((i + j, i, j) for i in range(side) for j in range(side))[:count]
    return torch.stack([waves[i][:, None] * waves[j] for _, i, j in order])


def _start_shifts(attention: SamAttention, shifts: tuple[tuple[int, int], ...]) -> None:
    """Let every head look at the patch that is its shift away, whatever the patch shows."""
    width = attention.qkv.weight.shape[1]
    size = width // attention.heads
    side = (attention.rel_pos_h.shape[0] + 1) // 2
    # Row r of a table is for a key that is side - 1 - r patches further on than the query. All heads share the tables,
    # so every head has a channel of its own, which only its queries have.
    steps = side - 1 - torch.arange(2 * side - 1)
    for head in range(attention.heads):
        attention.qkv.weight[head * size : head * size + attention.heads] = 0
        attention.qkv.bias[head * size + head] = _QUERY
        for table, shift in zip((attention.rel_pos_h, attention.rel_pos_w), shifts[head % len(shifts)], strict=True):
            table[:, head] = (-_SHIFT_RATE * (steps - shift) ** 2).clamp(min=-20) / _QUERY
    nn.init.orthogonal_(attention.qkv.weight[2 * width :])
    nn.init.orthogonal_(attention.proj.weight, gain=0.5)


def _start_as_space_to_depth(conv: nn.Conv2d, share: Tensor) -> None:
    """Let each 2x2 block's four places fill a quarter of the channels each, through the map `share`.

    The usual start of a stride-2 convolution mixes the places, and telling them apart again costs most of the training.
    """
    rows = conv.weight.shape[0] // 4
    conv.weight.normal_(std=0.002)
    for place in range(4):
        conv.weight[place * rows : (place + 1) * rows, :, 1 + place // 2, 1 + place % 2] += share


def _keep_places(first: nn.Conv2d, second: nn.Conv2d) -> None:
    """Let the compressor give every patch of a vision token a sixteenth of the channels, with the same map for each."""
    _start_as_space_to_depth(first, nn.init.orthogonal_(torch.empty(first.weight.shape[0] // 4, first.weight.shape[1])))
    inner = first.weight.shape[0] // 4
    kept = second.weight.shape[0] // NUM_PLACES
    share = torch.zeros(second.weight.shape[0] // 4, second.weight.shape[1])
    for place in range(4):
        share[place * kept : (place + 1) * kept, place * inner : place * inner + kept] = torch.eye(kept)
    _start_as_space_to_depth(second, share)


def place_channels(place_row: int, place_column: int, width: int) -> slice:
    """Return the channels of a vision token that the start gives to a patch of its four by four."""
    outer, inner = 2 * (place_row // 2) + place_column // 2, 2 * (place_row % 2) + place_column % 2
    kept = width // NUM_PLACES
    first = (outer * 4 + inner) * kept
    return slice(first, first + kept)


def _axis_waves(side: int) -> Tensor:
    """Return what tells the places along an axis apart: a ramp and three waves, [side, 7], of unit variance."""
    at = (torch.arange(side) + 0.5) / side
    waves = [at * 2 - 1, *(wave(math.pi * rate * at) for rate in (1, 2, 4) for wave in (torch.sin, torch.cos))]
    table = torch.stack(waves, 1)
    return (table - table.mean(0)) / table.std(0).clamp(min=1e-3)


@torch.no_grad()
def _tell_places(model: NanoOcr, pages: Tensor) -> None:
    """Put every vision token's place into the position table, as strong as what it shows, and through the projector."""
    trunk, sizes = model.model, model.sizes
    compressed = trunk.sam_model(model.pixels_of(pages))[1]
    strength = float(compressed.square().sum(1).mean().sqrt())
    side, width = sizes.grid_side, sizes.clip_width
    axis = _axis_waves(side)
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], -1).flatten(0, 1)
    count = grid.shape[1]
    inner, outer = (nn.init.orthogonal_(torch.empty(count, n)) for n in (width, sizes.hidden_size))
    positions = trunk.vision_model.embeddings.position_embedding.weight
    positions.zero_()
    positions[1:] = grid @ inner * (strength / math.sqrt(count))
    projector = trunk.projector.layers
    projector.bias.zero_()
    projector.weight.zero_()
    projector.weight[:, width:] = torch.eye(sizes.hidden_size, sizes.downsample_channels[1])
    # What CLIP makes of a token has the norm sqrt(width), half of its energy being the place.
    gain = strength * math.sqrt(_PLACE_SHARE / (1 - _PLACE_SHARE)) / math.sqrt(width / 2)
    nn.init.orthogonal_(projector.weight[:, :width], gain=0.2)
    projector.weight[:, :width] += gain * outer.T @ inner


@torch.no_grad()
def start_weights(model: NanoOcr, pages: Tensor) -> None:
    """Draw the model's weights in place from PyTorch's global generator; `pages` are some to measure it on."""
    trunk, sizes = model.model, model.sizes
    nn.init.normal_(trunk.embed_tokens.weight, std=0.5)
    start_tokens(trunk.embed_tokens.weight, model.lm_head.weight)
    for tensor in (trunk.image_newline, trunk.view_seperator):
        nn.init.normal_(tensor, std=0.5)
    for layer in trunk.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
    sam, clip = trunk.sam_model, trunk.vision_model
    embed = sam.patch_embed.proj
    # White paper is 1 and comes to nothing; a pixel of ink is up to two less.
    waves = _cosines(sizes.sam_width, sizes.patch_size)
    embed.weight.copy_((-waves / 3)[:, None].expand_as(embed.weight))
    embed.bias.copy_(waves.sum((1, 2)))
    nn.init.normal_(sam.pos_embed, std=0.02)
    for index, block in enumerate(sam.blocks):
        _start_shifts(block.attn, _SHIFTS[index % len(_SHIFTS)])
        block.mlp.lin2.weight.mul_(0.5)
    first, second = sam.neck[0], sam.neck[2]
    first.weight[:, :, 0, 0] = nn.init.orthogonal_(torch.empty(first.weight.shape[:2]))
    second.weight.normal_(std=0.01)
    second.weight[:, :, 1, 1] += torch.eye(sizes.neck_channels)
    _keep_places(sam.net_2, sam.net_3)
    clip.embeddings.patch_embedding.weight.zero_()
    for layer in clip.transformer.layers:
        layer.self_attn.out_proj.weight.mul_(0.5)
        layer.mlp.fc2.weight.mul_(0.5)
    _tell_places(model, pages)


def _place_index(patch_row: int, patch_column: int) -> int:
    return 4 * patch_row + patch_column


@torch.no_grad()
def start_reading(model: NanoOcr, patch_maps: Tensor, slot_map: Tensor) -> None:
    """Let the heads of the last two layers bring what the read-outs have learnt to bring.

    Head h of the layer before the last takes from a vision token what it says of the two upper patches of column h,
    head h of the last layer of the lower two, all into the same 64 dimensions.

    Args:
        model: the decoder to start; the encoder in it is trained.
        patch_maps: [16, features, hidden], what is read of each patch of a vision token.
        slot_map: [slots * c, features], what is made of the features.
    """
    size = model.sizes.hidden_size // model.sizes.num_heads
    directions = torch.linalg.svd(slot_map)[2][: size // 2]
    for half, layer in enumerate(model.model.layers[-2:]):
        attention = layer.self_attn
        values = attention.v_proj.weight.view(model.sizes.num_heads, size, -1)
        for head in range(model.sizes.num_heads):
            rows = [directions @ patch_maps[_place_index(2 * half + row, head)] for row in range(2)]
            maps = torch.cat(rows)
            values[head] = maps / maps.norm(dim=1, keepdim=True)
        nn.init.normal_(attention.o_proj.weight, std=0.01)
        outputs = attention.o_proj.weight.view(-1, model.sizes.num_heads, size)
        first = model.sizes.hidden_size - 2 * size
        outputs[first : first + size] += torch.eye(size)[:, None]
