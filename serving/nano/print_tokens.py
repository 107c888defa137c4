"""The tokens of free print: the bytes of `serving.nano.tokenizer`, and tokens that say where on the page they stand.

The checkpoint in training writes these; the shipped one has the tokenizer of `serving.nano.tokenizer`. Text is encoded
to bytes in both. What the model writes, and what decodes to plain text:

- a newline for each of 64 heights of the line that it leads to,
- a space for each of 64 columns of the word that it leads to,
- every printable character eight times: for each place of its centre within the width of a vision token.

Heights and columns are 64ths of the page's side; a vision token is 64 pixels wide whatever the page's size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from serving.nano.tokenizer import FIRST_BYTE_ID, FIRST_LINE_ID, SPECIAL_IDS, byte_symbols, tokenizer_json

NUM_BINS: Final = 64
NUM_PHASES: Final = 8
PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F)))

FIRST_HEIGHT_ID: Final = FIRST_LINE_ID
FIRST_COLUMN_ID: Final = FIRST_HEIGHT_ID + NUM_BINS
FIRST_CHAR_ID: Final = FIRST_COLUMN_ID + NUM_BINS
VOCAB_SIZE: Final = FIRST_CHAR_ID + NUM_PHASES * len(PRINTABLE)

_FIRST_MARK: Final = 0xE000
"""Private-use characters tell the tokens of one text apart inside the vocabulary; decoding drops them."""


def height_id(y: float, side_px: float) -> int:
    """Return the newline that leads to a line whose centre is at `y` pixels of a page of `side_px`."""
    return FIRST_HEIGHT_ID + _bin(y, side_px)


def column_id(x: float, side_px: float) -> int:
    """Return the space that leads to a word whose first letter's centre is at `x` pixels of a page of `side_px`."""
    return FIRST_COLUMN_ID + _bin(x, side_px)


def char_id(char: str, x: float) -> int:
    """Return the token of a printable character whose centre is at `x` pixels."""
    return FIRST_CHAR_ID + NUM_PHASES * PRINTABLE.index(char) + int(x // 8) % NUM_PHASES


def _bin(at: float, side_px: float) -> int:
    return min(NUM_BINS - 1, max(0, int(at * NUM_BINS // side_px)))


@dataclass(frozen=True)
class PlacedChar:
    """A character of a page and where its centre is, in pixels."""

    char: str
    x: float
    y: float


def encode_page(chars: Iterable[PlacedChar], side_px: float) -> list[int]:
    """Return the tokens of a page's printable characters, single spaces and newlines.

    Whitespace must have a printable character behind it.
    """
    placed = list(chars)
    ids = []
    for index, at in enumerate(placed):
        if at.char == "\n":
            ids.append(height_id(placed[index + 1].y, side_px))
        elif at.char == " ":
            ids.append(column_id(placed[index + 1].x, side_px))
        else:
            ids.append(char_id(at.char, at.x))
    return ids


def text_of(token: int) -> bytes:
    """Return the bytes that a token stands for; none for special tokens."""
    if FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256:
        return bytes([token - FIRST_BYTE_ID])
    if FIRST_HEIGHT_ID <= token < FIRST_COLUMN_ID:
        return b"\n"
    if FIRST_COLUMN_ID <= token < FIRST_CHAR_ID:
        return b" "
    if FIRST_CHAR_ID <= token < VOCAB_SIZE:
        return PRINTABLE[(token - FIRST_CHAR_ID) // NUM_PHASES].encode()
    return b""


def decode_ids(ids: Iterable[int]) -> str:
    """Return the text of `ids`, skipping special tokens and mending broken UTF-8."""
    return b"".join(map(text_of, ids)).decode(errors="replace")


def build_tokenizer_json() -> dict[str, Any]:
    """Return `tokenizer.json` for the `tokenizers` library: byte-level, no merges, start marker added."""
    symbols = byte_symbols()
    vocab = {symbol: FIRST_BYTE_ID + byte for byte, symbol in enumerate(symbols)}
    for token in range(FIRST_HEIGHT_ID, VOCAB_SIZE):
        first, count = (FIRST_HEIGHT_ID, NUM_BINS) if token < FIRST_CHAR_ID else (FIRST_CHAR_ID, NUM_PHASES)
        mark = (token - first) % count
        vocab[symbols[text_of(token)[0]] + chr(_FIRST_MARK + mark)] = token
    return tokenizer_json({**SPECIAL_IDS, **vocab}, f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + NUM_BINS - 1)}]")
