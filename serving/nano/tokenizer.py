"""The nano tokenizer: one token per UTF-8 byte, plus the special tokens that the published prompts use.

Ids are fixed by construction, so training needs no tokenizer library: 0-2 are the sentence markers and padding as in
the published vocabulary, then come the 256 bytes, then the other special tokens.

Newlines and spaces have further tokens that the model writes but text is never encoded to: a newline that leads to line
n of the page's grid, a space in column n. They decode to plain whitespace. A small decoder counts badly over hundreds
of tokens; with these, what it wrote tells it where it is.
"""

from collections.abc import Iterable
from typing import Any, Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
PAD: Final = "<｜▁pad▁｜>"
IMAGE: Final = "<image>"

BOS_ID: Final = 0
EOS_ID: Final = 1
PAD_ID: Final = 2
FIRST_BYTE_ID: Final = 3

_EXTRA_TOKENS: Final = (
    IMAGE,
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<td>",
    "</td>",
    "<tr>",
    "</tr>",
    "<|User|>",
    "<|Assistant|>",
    "<|EOT|>",
)

SPECIAL_IDS: Final[dict[str, int]] = {
    BOS: BOS_ID,
    EOS: EOS_ID,
    PAD: PAD_ID,
    **{token: FIRST_BYTE_ID + 256 + index for index, token in enumerate(_EXTRA_TOKENS)},
}
IMAGE_ID: Final = SPECIAL_IDS[IMAGE]
NUM_LINES: Final = 16
NUM_COLUMNS: Final = 32
FIRST_LINE_ID: Final = FIRST_BYTE_ID + 256 + len(_EXTRA_TOKENS)
FIRST_COLUMN_ID: Final = FIRST_LINE_ID + NUM_LINES
VOCAB_SIZE: Final = FIRST_COLUMN_ID + NUM_COLUMNS

_FIRST_MARK: Final = 0xE000
"""Private-use characters tell the placed whitespace tokens apart inside the vocabulary; decoding drops them."""


def encode_text(text: str) -> list[int]:
    """Return one id per UTF-8 byte of `text`; special tokens in it are not recognised."""
    return [FIRST_BYTE_ID + byte for byte in text.encode()]


def decode_ids(ids: Iterable[int]) -> str:
    """Return the text of `ids`, skipping special tokens and mending broken UTF-8."""
    data = bytearray()
    for token in ids:
        if FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256:
            data.append(token - FIRST_BYTE_ID)
        elif token >= FIRST_LINE_ID:
            data += b"\n" if token < FIRST_COLUMN_ID else b" "
    return data.decode(errors="replace")


def byte_symbols() -> list[str]:
    """Return the printable stand-in of each byte that byte-level tokenizers agree on.

    Printable Latin-1 characters stand for themselves; the rest are numbered upwards from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}
    return [chr(byte) if byte in printable else stand_ins[byte] for byte in range(256)]


def _placed_symbols(symbols: list[str]) -> dict[str, int]:
    """Return the vocabulary entries of the placed newlines and spaces."""
    lines = {symbols[ord("\n")] + chr(_FIRST_MARK + n): FIRST_LINE_ID + n for n in range(NUM_LINES)}
    return lines | {symbols[ord(" ")] + chr(_FIRST_MARK + n): FIRST_COLUMN_ID + n for n in range(NUM_COLUMNS)}


def _bos_template(*sequences: str) -> list[dict[str, Any]]:
    """Return a post-processor template: the start marker, then the sequences."""
    parts: list[dict[str, Any]] = [{"SpecialToken": {"id": BOS, "type_id": 0}}]
    return parts + [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate(sequences)]


def build_tokenizer_json() -> dict[str, Any]:
    """Return `tokenizer.json` for the `tokenizers` library: byte-level, no merges, start marker added."""
    symbols = byte_symbols()
    vocab = {symbol: FIRST_BYTE_ID + byte for byte, symbol in enumerate(symbols)} | _placed_symbols(symbols)
    return tokenizer_json({**SPECIAL_IDS, **vocab}, f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + NUM_COLUMNS - 1)}]")


def tokenizer_json(vocab: dict[str, int], marks: str) -> dict[str, Any]:
    """Return `tokenizer.json` for a vocabulary; decoding drops the characters that the expression `marks` matches."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    drop_marks = {"type": "Replace", "pattern": {"Regex": marks}, "content": ""}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in SPECIAL_IDS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _bos_template("A"),
            "pair": _bos_template("A", "B"),
            "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [drop_marks, byte_level]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def build_tokenizer_config(max_positions: int) -> dict[str, Any]:
    """Return `tokenizer_config.json`; `max_positions` is the context length in tokens."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": list(_EXTRA_TOKENS),
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": max_positions,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def build_special_tokens_map() -> dict[str, Any]:
    """Return `special_tokens_map.json`."""
    return {
        "additional_special_tokens": list(_EXTRA_TOKENS),
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }
