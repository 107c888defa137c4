"""What of special tokens reaches a client, by vLLM's own detokenizer and a tokenizer whose cells are such."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from serving.nano.build import build_checkpoint
from serving.nano.tokenizer import EOS_ID, SPECIAL_IDS, encode_text

CELLS = [SPECIAL_IDS["<td>"], *encode_text("12"), SPECIAL_IDS["</td>"], SPECIAL_IDS["<td>"], *encode_text("345")]
CELLS.append(SPECIAL_IDS["</td>"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(build_checkpoint(tmp_path_factory.mktemp("nano"), random=True)))


@pytest.mark.parametrize(("skips", "text"), [(True, "12345"), (False, "<td>12</td><td>345</td>")])
@pytest.mark.parametrize("at_once", [True, False])
def test_cells_stay_and_the_end_does_not(
    tokenizer: PreTrainedTokenizerFast, skips: bool, text: str, at_once: bool
) -> None:
    request = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=encode_text("Free OCR."),
        mm_features=None,
        sampling_params=SamplingParams(skip_special_tokens=skips),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    tokens = [*CELLS, EOS_ID]
    for piece in [tokens] if at_once else [[token] for token in tokens]:
        detokenizer.update(piece, stop_terminated=piece[-1] == EOS_ID)
    assert detokenizer.get_next_output_text(finished=True, delta=False) == text
