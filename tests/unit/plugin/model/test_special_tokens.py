"""What of special tokens reaches a client in every way out, by vLLM's own detokenizer and the published token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.request_pictures import encode_image, image_part, to_url
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from benchmarks.stand_in import CELLS, PUBLISHED, Choices, token_ids, write_documents
from serving.ocr.text.layout import parse_layout
from serving.ocr.text.markdown import render_markdown, render_text
from serving.router.request.parsing import parse_request
from serving.settings.stack import ModelSettings, Settings

IDS = token_ids(PUBLISHED.vocab_size)
EOS_ID = 1
ROW = "<tr><td>12</td><td>345</td></tr>"
MARKDOWN = "| 12 | 345 |\n| --- | --- |"


@pytest.fixture(scope="module", params=[True, False], ids=["cells are special", "cells are ordinary"])
def tokenizer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    choices = Choices(sizes=PUBLISHED, cells_are_special=request.param)
    loaded: Any = get_tokenizer(str(write_documents(tmp_path_factory.mktemp("tokenizer"), choices)))
    assert (IDS["<td>"] in loaded.all_special_ids) is request.param
    return loaded


def detokenize(tokenizer: PreTrainedTokenizerFast, tokens: list[int], skips: bool, at_once: bool = True) -> str:
    request = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=tokenizer.encode("Free OCR."),
        mm_features=None,
        sampling_params=SamplingParams(skip_special_tokens=skips),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    for piece in [tokens] if at_once else [[token] for token in tokens]:
        detokenizer.update(piece, stop_terminated=piece[-1] == EOS_ID)
    return detokenizer.get_next_output_text(finished=True, delta=False)


def answer_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False), EOS_ID]


def test_cells_have_the_published_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = answer_ids(tokenizer, ROW)
    assert (ids[1], ids[4]) == (128_821, 128_822)
    assert {IDS[cell] for cell in CELLS} < {*ids}
    assert tokenizer.convert_tokens_to_ids("<image>") == 128_815


@pytest.mark.parametrize("at_once", [True, False])
def test_cells_stay_and_the_end_does_not(tokenizer: PreTrainedTokenizerFast, at_once: bool) -> None:
    assert detokenize(tokenizer, answer_ids(tokenizer, ROW), skips=False, at_once=at_once) == ROW


def test_skipping_loses_cells_where_they_are_special(tokenizer: PreTrainedTokenizerFast) -> None:
    """Which is why requests with images do not skip, unless their client says so."""
    is_special = IDS["<td>"] in tokenizer.all_special_ids
    assert detokenize(tokenizer, answer_ids(tokenizer, ROW), skips=True) == ("12345" if is_special else ROW)


def ask(**fields: Any) -> bool:
    """Whether the engine is asked to skip special tokens in the answer to a page."""
    page = image_part(to_url(encode_image("PNG")))
    body = {"model": "nano", "messages": [{"role": "user", "content": [page]}], **fields}
    settings = Settings(models={"nano": ModelSettings(checkpoint="nano")})
    sent = json.loads(parse_request("/v1/chat/completions", json.dumps(body).encode(), settings).body)
    return bool(sent.get("skip_special_tokens", True))


def test_tables_keep_their_cells_in_every_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    grounded = f"<|ref|>table<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>\n<table>{ROW}</table>"
    assert ask() is False
    assert ask(skip_special_tokens=True) is True
    for wanted in (grounded, f"<table>{ROW}</table>"):
        text = detokenize(tokenizer, answer_ids(tokenizer, wanted), skips=ask())
        assert text == wanted
        blocks = parse_layout(text, 1000, 1000)
        assert MARKDOWN in render_markdown(blocks)
        assert render_text(blocks).split() == ["12", "345"]
        assert MARKDOWN in render_markdown(blocks[:1]), "the block of the layout as well"


def test_a_stand_in_is_made_of_the_files_that_it_names(tmp_path: Path) -> None:
    write_documents(tmp_path)
    names = {"config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json"}
    assert {file.name for file in tmp_path.iterdir()} == {*names, "tokenizer_config.json"}
