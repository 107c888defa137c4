import numpy as np
import pytest
import torch

from serving.nano.build import build_checkpoint, weight_shapes
from serving.nano.config import NANO, NanoConfig
from serving.nano.pages import CORE, sample_page
from serving.nano.training.batches import OCR_PROMPT
from serving.nano.training.decoder import KVCache, MixtureOfExperts, run_cached
from serving.nano.training.encoder import SamAttention
from serving.nano.training.model import NanoOcr, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NanoOcr:
    return load_model(build_checkpoint(tmp_path_factory.mktemp("nano"), random=True))


@pytest.fixture(scope="module")
def pages() -> torch.Tensor:
    return torch.from_numpy(np.stack([sample_page(CORE, "train", 0, index).pixels for index in range(2)]))


def test_its_weights_are_the_checkpoints(model: NanoOcr) -> None:
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == weight_shapes()


@torch.no_grad()
def test_a_tiny_page_takes_73_tokens(model: NanoOcr, pages: torch.Tensor) -> None:
    encoded = model.encode(pages)
    assert encoded.patches.shape == (2, 32, 32, NANO.sam_width)
    assert encoded.cells.shape == (2, 64, NANO.hidden_size)
    prompt = model.embed_prompt(encoded.cells, OCR_PROMPT)
    assert prompt.shape == (2, 1 + NANO.num_image_tokens + len(OCR_PROMPT), NANO.hidden_size)
    assert NANO.num_image_tokens == 73
    assert torch.equal(prompt[:, 9], model.model.image_newline.expand(2, -1))
    assert torch.equal(prompt[:, 73], model.model.view_seperator.expand(2, -1))


@torch.no_grad()
def test_other_sizes_are_encoded_with_resampled_positions(model: NanoOcr) -> None:
    assert model.encode(torch.zeros(1, 256, 256, dtype=torch.uint8)).cells.shape == (1, 16, NANO.hidden_size)


@torch.no_grad()
def test_a_grey_page_is_a_colour_page_of_equal_channels(model: NanoOcr, pages: torch.Tensor) -> None:
    colour = pages[:, None].expand(-1, 3, -1, -1)
    # Close, not equal: of a grey page the three channels' weights are added up before the product.
    torch.testing.assert_close(model.encode(pages).cells, model.encode(colour).cells, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [16, 32, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_attend_gives_the_plain_result_and_gradients(side: int, dtype: torch.dtype) -> None:
    """16 patches a side have a matrix of biases; more go in chunks, or in bfloat16 with the bias folded in."""
    torch.manual_seed(0)
    attention = SamAttention(32, 2, 8)
    torch.nn.init.normal_(attention.rel_pos_h)
    torch.nn.init.normal_(attention.rel_pos_w)
    x, weights = torch.randn(2, side, side, 32), torch.randn(2, side, side, 32)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        attention.zero_grad()
        (out.float() * weights).sum().backward()
        return [parameter.grad.clone() for parameter in attention.parameters()]

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = attention(x)
    plain = attend_plainly(attention, x)
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(ours.float(), plain, **tolerance)
    for mine, wanted in zip(gradients(ours), gradients(plain), strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(mine / scale, wanted / scale, **tolerance)


def attend_plainly(attention: SamAttention, x: torch.Tensor) -> torch.Tensor:
    side = x.shape[1]
    q, k, v = attention.qkv(x).reshape(2, side * side, 3, 2, 16).permute(2, 0, 3, 1, 4)
    steps = torch.arange(side)
    rows = [
        torch.nn.functional.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T[
            steps[:, None] - steps[None, :] + side - 1
        ]
        for table in (attention.rel_pos_h, attention.rel_pos_w)
    ]
    grid = q.reshape(2, 2, side, side, 16)
    by_row, by_column = (
        torch.einsum(f"bnhwc,{axis}kc->bnhwk", grid, table) for axis, table in zip("hw", rows, strict=True)
    )
    bias = by_row[..., None] + by_column.unsqueeze(-2)
    scores = (q @ k.transpose(-1, -2)) / 4 + bias.reshape(2, 2, side * side, side * side)
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, side, side, 32))


@torch.no_grad()
def test_every_token_gets_its_own_experts() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(NanoConfig())
    x = torch.randn(5, NANO.hidden_size)
    grouped, logits = layer(x)
    for row, token in enumerate(x):
        scores = logits[row].softmax(-1)
        best = scores.topk(2)
        routed = layer.shared_experts(token)[0]
        for weight, index in zip(best.values, best.indices.tolist(), strict=True):
            routed = routed + weight * layer.experts[index](token)[0]
        torch.testing.assert_close(grouped[row], routed, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_at_once(model: NanoOcr) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, NANO.hidden_size)
    whole = model.decode(x).hidden
    cache: KVCache = []
    layers, norm = model.model.layers, model.model.norm
    parts = [run_cached(layers, norm, x[:, :8], model._rotary(0, 8), cache)]
    parts += [run_cached(layers, norm, x[:, i : i + 1], model._rotary(i, i + 1), cache) for i in range(8, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_reading_alone_and_in_a_batch_agree(model: NanoOcr, pages: torch.Tensor) -> None:
    together = model.generate(pages, OCR_PROMPT, 6)
    assert [model.generate(page[None], OCR_PROMPT, 6)[0] for page in pages] == together
