"""Setting text into lines: paragraphs, lists, centred lines, key-value pairs and two-column tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from serving.nano.texts import Random, Split, sample_entry, sample_words
from serving.nano.training.fonts import Font
from serving.nano.training.glyphs import advance, hinted_advance, kerning


@dataclass(frozen=True)
class Setting:
    """How a page's text is set. Lengths in pixels."""

    font: Font
    size_px: int
    pitch_px: float
    """From baseline to baseline."""
    spacing_px: float
    """Added between letters."""
    is_kerned: bool
    is_hinted: bool

    def width(self, char: str) -> float:
        """Return how far a character moves the pen, spacing not counted."""
        if self.is_hinted:
            return hinted_advance(self.font, self.size_px, char)
        return advance(self.font, char) * self.size_px

    @cached_property
    def space_px(self) -> float:
        return self.width(" ") + self.spacing_px


@dataclass(frozen=True)
class Word:
    """A word on a line: every letter's pen and width."""

    text: str
    pens: list[float]
    widths: list[float]

    @property
    def right(self) -> float:
        return self.pens[-1] + self.widths[-1]


@dataclass(frozen=True)
class Line:
    """Words on a baseline."""

    words: list[Word]
    baseline: float

    @property
    def right(self) -> float:
        return self.words[-1].right

    @property
    def num_chars(self) -> int:
        return sum(len(word.text) + 1 for word in self.words)


@dataclass(frozen=True)
class Typeset:
    """All lines of a page, from the top."""

    lines: list[Line]


def set_word(setting: Setting, text: str, left: float) -> Word:
    """Set a word's letters from `left` on."""
    pens, widths, pen = [], [], left
    for index, char in enumerate(text):
        if index:
            pen += setting.spacing_px
            if setting.is_kerned:
                pen += kerning(setting.font, text[index - 1 : index + 1]) * setting.size_px
        pens.append(pen)
        widths.append(setting.width(char))
        pen += widths[-1]
    return Word(text, pens, widths)


def _moved(word: Word, by: float) -> Word:
    return Word(word.text, [pen + by for pen in word.pens], word.widths)


@dataclass
class _Sheet:
    """A page on which lines are set from the top."""

    setting: Setting
    split: Split
    random: Random
    left: float
    right: float
    bottom: float
    baseline: float
    room: int
    """Characters that may still be set."""
    lines: list[Line] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return self.baseline > self.bottom or self.room < 2

    def feed(self, share: float = 0.0) -> None:
        """Leave a part of a line empty."""
        self.baseline += share * self.setting.pitch_px

    def put(self, words: list[Word]) -> None:
        """Set a line and go to the next."""
        line = Line(words, self.baseline)
        self.lines.append(line)
        self.room -= line.num_chars
        self.feed(1.0)

    def words(self, count: int, *, is_prose: bool) -> list[str]:
        return sample_words(self.random, self.split, count, is_prose=is_prose)

    def fill(self, texts: list[str], left: float, right: float, used: int = 0) -> list[Word]:
        """Return the first texts that fit, at least a part of the first; they are taken off the list.

        `used` characters of the line are set already.
        """
        words: list[Word] = []
        pen, room = left, self.room - used
        while texts:
            word = set_word(self.setting, texts[0], pen)
            if words and (word.right > right or room < len(word.text)):
                break
            if not words:
                word = _cut(word, right, max(1, room))
            words.append(word)
            texts.pop(0)
            pen = word.right + self.setting.spacing_px + self.setting.space_px
            room -= len(word.text) + 1
        return words


def _cut(word: Word, right: float, room: int) -> Word:
    """Return the word up to its last letter that ends before `right`, at least its first one."""
    fits = [pen + width <= right for pen, width in zip(word.pens, word.widths, strict=True)]
    count = min(max(1, sum(fits)), room)
    return Word(word.text[:count], word.pens[:count], word.widths[:count])


def _paragraph(sheet: _Sheet, num_lines: int) -> None:
    """Lines filled from margin to margin, the first one sometimes indented, the last one ragged."""
    is_prose = sheet.random.random() < 0.6
    texts = sheet.words(24, is_prose=is_prose)
    indent = float(sheet.random.uniform(0, 50)) if sheet.random.random() < 0.25 else 0.0
    for index in range(num_lines):
        if sheet.is_full:
            return
        if len(texts) < 16:
            texts += sheet.words(16, is_prose=is_prose)
        right = sheet.right
        if index == num_lines - 1:
            right = float(sheet.random.uniform(sheet.left, sheet.right))
        sheet.put(sheet.fill(texts, sheet.left + (0 if index else indent), right))
    sheet.feed(_gap(sheet.random))


def _list(sheet: _Sheet, num_lines: int) -> None:
    """Lines of any length, as in addresses and lists, some with a mark or at an indent."""
    mark = ["", "", "-", "*", "1."][int(sheet.random.integers(5))]
    left = sheet.left + (float(sheet.random.uniform(0, 80)) if sheet.random.random() < 0.3 else 0.0)
    left = min(left, max(sheet.left, sheet.right - 40))
    for index in range(num_lines):
        if sheet.is_full:
            return
        texts = sheet.words(int(sheet.random.integers(1, 8)), is_prose=False)
        if mark:
            texts = [f"{index + 1}." if mark == "1." else mark, *texts]
        sheet.put(sheet.fill(texts, left, float(sheet.random.uniform(left, sheet.right))))
    sheet.feed(_gap(sheet.random))


def _centred(sheet: _Sheet, num_lines: int) -> None:
    """Lines in the middle, as in headings."""
    for _ in range(num_lines):
        if sheet.is_full:
            return
        words = sheet.fill(sheet.words(int(sheet.random.integers(1, 7)), is_prose=False), sheet.left, sheet.right)
        shift = (sheet.right - words[-1].right) / 2
        sheet.put([_moved(word, shift) for word in words])
    sheet.feed(_gap(sheet.random))


def _pairs(sheet: _Sheet, num_lines: int) -> None:
    """Labels with values in a second column, or pushed to the right margin."""
    is_right = sheet.random.random() < 0.5
    column = sheet.left + float(sheet.random.uniform(0.35, 0.65)) * (sheet.right - sheet.left)
    for _ in range(num_lines):
        if sheet.is_full:
            return
        label, value = sample_entry(sheet.random, sheet.split)
        words = sheet.fill([label], sheet.left, sheet.right)
        _push(sheet, words, value.split(), column, is_right=is_right)
        sheet.put(words)
    sheet.feed(_gap(sheet.random))


def _table(sheet: _Sheet, num_lines: int) -> None:
    """Two columns: words, then words or numbers."""
    column = sheet.left + float(sheet.random.uniform(0.3, 0.6)) * (sheet.right - sheet.left)
    is_right = sheet.random.random() < 0.4
    for _ in range(num_lines):
        if sheet.is_full:
            return
        texts = sheet.words(int(sheet.random.integers(1, 4)), is_prose=False)
        words = sheet.fill(texts, sheet.left, max(sheet.left + 20, column - 8))
        if sheet.random.random() < 0.9:
            texts = sheet.words(int(sheet.random.integers(1, 4)), is_prose=False)
            _push(sheet, words, texts, column, is_right=is_right)
        sheet.put(words)
    sheet.feed(_gap(sheet.random))


def _push(sheet: _Sheet, words: list[Word], texts: list[str], column: float, *, is_right: bool) -> None:
    """Add a second column to a line, from `column` on or up to the right margin, if there is room."""
    used = sum(len(word.text) + 1 for word in words)
    least = words[-1].right + sheet.setting.spacing_px + sheet.setting.space_px
    left = max(column, least)
    if left > sheet.right - 2 * sheet.setting.size_px or sheet.room < used + 2:
        return
    second = sheet.fill(texts, left, sheet.right, used)
    shift = sheet.right - second[-1].right if is_right else 0.0
    words += [_moved(word, max(shift, 0.0)) for word in second]


def _gap(random: Random) -> float:
    """Return what is left empty behind a block, in lines."""
    return float(random.uniform(0.2, 1.3)) if random.random() < 0.7 else 0.0


_BLOCKS: tuple[Callable[[_Sheet, int], None], ...] = (_paragraph, _list, _centred, _pairs, _table)
_SHARES = (0.4, 0.25, 0.1, 0.13, 0.12)
_PLAIN_SHARES = (0.6, 0.4, 0.0, 0.0, 0.0)


def sample_typeset(
    setting: Setting, split: Split, random: Random, size_px: int, num_chars: tuple[int, int], *, is_plain: bool
) -> Typeset:
    """Return lines that number between `num_chars` characters as nearly as the page has room for."""
    low, high = num_chars
    # Every second page is as full as it may be; the others have any number of characters.
    room = max(2, high if random.random() < 0.5 else int(random.integers(low, high + 1)))
    shares = _PLAIN_SHARES if is_plain else _SHARES
    best: list[Line] = []
    for _ in range(20):
        left = 1 + size_px * float(random.uniform(0, 0.18 if random.random() < 0.5 else 0.06))
        right = size_px - 1 - size_px * float(random.uniform(0, 0.23 if random.random() < 0.4 else 0.06))
        top = size_px * float(random.uniform(0, 0.12 if random.random() < 0.7 else 0.6)) + 0.95 * setting.size_px
        bottom = size_px - 0.25 * setting.size_px
        sheet = _Sheet(setting, split, random, left, right, bottom, min(top, bottom), room)
        is_mixed = random.random() < 0.5
        block = _BLOCKS[int(random.choice(5, p=shares))]
        while not sheet.is_full:
            block(sheet, int(random.integers(1, 9)))
            if is_mixed:
                block = _BLOCKS[int(random.choice(5, p=shares))]
        if sum(line.num_chars for line in sheet.lines) > sum(line.num_chars for line in best):
            best = sheet.lines
        if sum(line.num_chars for line in best) >= low:
            break
    return Typeset(best)
