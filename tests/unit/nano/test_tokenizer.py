import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serving.nano.config import NANO
from serving.nano.tokenizer import (
    BOS_ID,
    FIRST_COLUMN_ID,
    FIRST_LINE_ID,
    IMAGE_ID,
    SPECIAL_IDS,
    VOCAB_SIZE,
    build_tokenizer_json,
    decode_ids,
    encode_text,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(build_tokenizer_json()))


@given(text=st.text(max_size=200))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_IDS):
        assert ids == encode_text(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert decode_ids(encode_text(text)) == text


def test_an_ascii_character_is_one_token(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(128)))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 128


def test_the_start_marker_is_added_and_special_tokens_are_found(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<image>\n<|grounding|>OCR").ids
    assert ids == [BOS_ID, IMAGE_ID, *encode_text("\n"), SPECIAL_IDS["<|grounding|>"], *encode_text("OCR")]


def test_every_special_token_is_skippable(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIAL_IDS)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == list(SPECIAL_IDS.values())
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_ids_fill_the_models_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == NANO.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_transformers_loads_it_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    from serving.nano.build import build_checkpoint

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = PreTrainedTokenizerFast.from_pretrained(str(build_checkpoint(tmp_path, random=True)))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.encode("a")[0] == BOS_ID


def test_placed_whitespace_reads_as_whitespace(tokenizer: Tokenizer) -> None:
    ids = [*encode_text("a"), FIRST_COLUMN_ID + 3, *encode_text("b"), FIRST_LINE_ID + 9, *encode_text("é")]
    assert tokenizer.decode(ids) == decode_ids(ids) == "a b\né"
    stream = DecodeStream(skip_special_tokens=True)
    assert "".join(stream.step(tokenizer, token) or "" for token in ids) == "a b\né"
