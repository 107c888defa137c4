import json

import pytest
from tokenizers import Tokenizer

from serving.nano import tokenizer as shipped
from serving.nano.print_tokens import (
    FIRST_CHAR_ID,
    NUM_PHASES,
    PRINTABLE,
    VOCAB_SIZE,
    PlacedChar,
    build_tokenizer_json,
    char_id,
    column_id,
    decode_ids,
    encode_page,
    height_id,
    text_of,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(build_tokenizer_json()))


def test_text_is_encoded_as_by_the_shipped_tokenizer(tokenizer: Tokenizer) -> None:
    text = "\nFree OCR. Über 5 €"
    assert tokenizer.encode(text, add_special_tokens=False).ids == shipped.encode_text(text)
    assert tokenizer.encode("<image>\nFree OCR.").ids == [0, shipped.IMAGE_ID, *shipped.encode_text("\nFree OCR.")]


def test_every_token_has_its_id_and_decodes_to_its_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    for token in range(shipped.FIRST_LINE_ID, VOCAB_SIZE):
        assert tokenizer.decode([token]) == text_of(token).decode() == decode_ids([token])


def test_a_characters_token_says_where_in_a_vision_token_it_stands() -> None:
    for place, char in enumerate(PRINTABLE):
        first = FIRST_CHAR_ID + NUM_PHASES * place
        assert [char_id(char, x) for x in (0, 7.9, 8, 63.9, 64, 511.5)] == [first + n for n in (0, 0, 1, 7, 0, 7)]


def test_whitespace_says_where_it_leads_to_on_a_page_of_any_size() -> None:
    assert column_id(256, 512) == column_id(512, 1024)
    assert height_id(8, 512) == height_id(0, 512) + 1
    assert column_id(600, 512) == column_id(511, 512)
    assert column_id(-3, 512) == column_id(0, 512)
    page = [PlacedChar(*at) for at in (("a", 10, 20), (" ", 18, 20), ("b", 100, 20), ("\n", 108, 20), ("c", 10, 60))]
    ids = encode_page(page, 512)
    assert ids == [char_id("a", 10), column_id(100, 512), char_id("b", 100), height_id(60, 512), char_id("c", 10)]
    assert decode_ids(ids) == "a b\nc"
