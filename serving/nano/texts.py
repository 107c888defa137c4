"""Seeded text for pages: words, amounts, dates, codes and punctuation, wrapped into lines.

Words come from the help texts inside Python's own standard library. A checksum keeps a tenth of them for measuring, so
that what a model is measured on holds words it never saw.
"""

import calendar
import re
import string
import zlib
from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np

Split = Literal["train", "test"]
Random = np.random.Generator

_MONTHS = tuple(calendar.month_name)[1:]
_CURRENCIES = ("$", "EUR ", "USD ", "GBP ", "")
_LABELS = ("Total", "Date", "Invoice", "Order", "Item", "Tax", "Due", "Ref", "Name", "Net", "Qty", "Price", "Account")
_PRINTABLE = string.ascii_letters + string.digits + string.punctuation
_ENDINGS = (".", ",", ";", ":", "!", "?")


@cache
def word_list(split: Split) -> tuple[str, ...]:
    """Return the lower-case words of a split, sorted."""
    from pydoc_data.topics import topics

    words = set(re.findall(r"\b[a-z]{2,12}\b", " ".join(topics.values()).lower()))
    return tuple(sorted(word for word in words if (zlib.crc32(word.encode()) % 10 == 0) == (split == "test")))


def _choose(random: Random, options: tuple[str, ...] | list[str] | str) -> str:
    return options[int(random.integers(len(options)))]


def _digits(random: Random, low: int, high: int) -> str:
    return "".join(_choose(random, string.digits) for _ in range(int(random.integers(low, high + 1))))


def _word(random: Random, split: Split) -> str:
    word = _choose(random, word_list(split))
    style = random.random()
    return word.upper() if style < 0.08 else word.capitalize() if style < 0.3 else word


def _sentence_word(random: Random, split: Split) -> str:
    word = _word(random, split)
    style = random.random()
    if style < 0.12:
        return word + _choose(random, _ENDINGS)
    if style < 0.16:
        return _choose(random, [f"({word})", f'"{word}"', f"'{word}'", f"{word}-{_word(random, split)}", f"{word}'s"])
    return word


def _letters(random: Random, split: Split) -> str:
    """A word-like run of letters that no dictionary helps with."""
    letters = "".join(_choose(random, string.ascii_lowercase) for _ in range(int(random.integers(2, 10))))
    return letters.capitalize() if random.random() < 0.3 else letters


def _amount(random: Random, split: Split) -> str:
    value = int(random.integers(0, 10 ** int(random.integers(2, 8)))) / 100
    return f"{_choose(random, _CURRENCIES)}{value:,.2f}" + ("%" if random.random() < 0.1 else "")


def _date(random: Random, split: Split) -> str:
    year, month, day = (int(random.integers(low, high)) for low, high in ((1950, 2050), (1, 13), (1, 29)))
    return _choose(
        random,
        [
            f"{year}-{month:02}-{day:02}",
            f"{day:02}/{month:02}/{year}",
            f"{day:02}.{month:02}.{year}",
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{_MONTHS[month - 1][:3]} {day}, {year}",
            f"{int(random.integers(24)):02}:{int(random.integers(60)):02}",
        ],
    )


def _code(random: Random, split: Split) -> str:
    letters = "".join(_choose(random, string.ascii_uppercase) for _ in range(int(random.integers(1, 4))))
    mark = _choose(random, ["-", "/", "", "#", "_", "."])
    return letters + mark + _digits(random, 2, 6)


def _number(random: Random, split: Split) -> str:
    return _digits(random, 1, 7)


def _noise(random: Random, split: Split) -> str:
    return "".join(_choose(random, _PRINTABLE) for _ in range(int(random.integers(1, 9))))


def _address(random: Random, split: Split) -> str:
    words = [_choose(random, word_list(split)) for _ in range(3)]
    return _choose(random, [f"{words[0]}@{words[1]}.com", f"www.{words[0]}.org", f"{words[0]}/{words[1]}_{words[2]}"])


Token = Callable[[Random, Split], str]
_TOKENS: tuple[tuple[Token, float], ...] = (
    (_sentence_word, 0.52),
    (_letters, 0.12),
    (_amount, 0.08),
    (_date, 0.06),
    (_code, 0.07),
    (_number, 0.06),
    (_noise, 0.06),
    (_address, 0.03),
)
_TOKEN_STEPS = np.cumsum([share for _, share in _TOKENS])


def _token(random: Random, split: Split, is_prose: bool) -> str:
    if is_prose and random.random() < 0.85:
        return _sentence_word(random, split)
    index = int(np.searchsorted(_TOKEN_STEPS, random.random() * _TOKEN_STEPS[-1]))
    return _TOKENS[index][0](random, split)


def _fill_line(random: Random, split: Split, length: int, is_prose: bool) -> str:
    """Return tokens with single spaces between them, at most `length` characters and at least one."""
    line = _token(random, split, is_prose)[:length]
    for _ in range(length):
        token = _token(random, split, is_prose)
        if len(line) + 1 + len(token) > length:
            break
        line = f"{line} {token}"
    return line


def _form_line(random: Random, split: Split, length: int, pushed_share: float = 0.3) -> str:
    """Return a label with a value behind it, in a share of the cases pushed to the right edge."""
    label = _choose(random, _LABELS) if random.random() < 0.3 else _word(random, split).capitalize()
    value = _choose(random, [f(random, split) for f in (_amount, _date, _code, _number, _sentence_word)])
    gap = max(1, length - len(label) - 1 - len(value)) if random.random() < pushed_share else 1
    return f"{label}:{' ' * gap}{value}"[:length].rstrip()


def sample_prose(random: Random, split: Split, num_lines: int, width: int) -> list[str]:
    """Return `num_lines` lines of running words with some amounts, dates and codes between them, without long gaps."""
    return [_fill_line(random, split, width, is_prose=True) for _ in range(num_lines)]


def _spaced_line(random: Random, split: Split, length: int) -> str:
    """Return two to four columns with gaps of any width between them, the whole often as long as the line."""
    widths = random.integers(1, 13, int(random.integers(2, 5))).tolist()
    columns = [_fill_line(random, split, width, is_prose=False).rstrip() for width in widths]
    while len(columns) > 1 and sum(map(len, columns)) + len(columns) - 1 > length:
        columns.pop()
    room = length - sum(map(len, columns))
    if random.random() < 0.4:
        room = int(random.integers(len(columns) - 1, max(room, len(columns) - 1) + 1))
    cuts = np.sort(random.integers(0, max(1, room - len(columns) + 2), len(columns) - 1))
    gaps = np.diff(cuts, prepend=0) + 1
    return "".join(f"{column}{' ' * gap}" for column, gap in zip(columns, [*gaps, 0], strict=True))[:length].rstrip()


def sample_spaced_lines(random: Random, split: Split, num_lines: int, width: int) -> list[str]:
    """Return `num_lines` lines of at most `width` characters: forms and tables in which wide gaps are common.

    No line is empty or ends in a space.
    """
    kind, share = random.random(), random.uniform(0.3, 1.0)
    lines = []
    for _ in range(num_lines):
        style = random.random()
        if kind < 0.5:
            lines.append(_form_line(random, split, max(width, 6), share))
        elif kind < 0.8 or style < share:
            lines.append(_spaced_line(random, split, width))
        else:
            lines.append(_fill_line(random, split, width, is_prose=False).rstrip())
    return lines


def sample_full_line(random: Random, split: Split, length: int) -> str:
    """Return words of exactly `length` characters, the last one cut, that neither begin nor end in a space."""
    line = _sentence_word(random, split)
    while len(line) < length:
        line = f"{line} {_token(random, split, is_prose=False)}"
    line = line[:length]
    return line if not line.endswith(" ") else line[:-1] + _choose(random, string.ascii_lowercase)


def sample_lines(random: Random, split: Split, num_lines: int, width: int) -> list[str]:
    """Return `num_lines` lines of at most `width` characters: a paragraph, a list or a form, chosen at random.

    No line is empty or ends in a space.
    """
    kind = random.random()
    lines = []
    for _ in range(num_lines):
        if kind < 0.5:
            lines.append(_fill_line(random, split, width, is_prose=kind < 0.3))
        elif kind < 0.8:
            lines.append(_fill_line(random, split, int(random.integers(1, width + 1)), is_prose=kind < 0.6))
        else:
            lines.append(_form_line(random, split, max(width, 6)))
    return lines


def sample_words(random: Random, split: Split, count: int, *, is_prose: bool) -> list[str]:
    """Return `count` words without spaces in them, as `sample_lines` sets them: sentences, dates, amounts, codes."""
    words: list[str] = []
    while len(words) < count:
        words += _token(random, split, is_prose).split()
    return words[:count]


def sample_entry(random: Random, split: Split) -> tuple[str, str]:
    """Return a label and a value, as on a form or an invoice."""
    label = _choose(random, _LABELS) if random.random() < 0.4 else _word(random, split).capitalize()
    value = _choose(random, [f(random, split) for f in (_amount, _date, _code, _number, _sentence_word)])
    return label + _choose(random, ["", ":", ":"]), value
