"""Pages of free print that a checkpoint is judged by, drawn by Pillow's own text drawing, or by whatever renders a PDF.

Nothing here is shared with the renderer that training draws its pages with (`serving.nano.training`): whole lines go
through `ImageDraw.text` with the layout that Pillow has by default, kerning and ligatures included. Words are of the
split that training never saw. A page is a pure function of set, seed and index.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from serving.nano.pages import CORE, WIDE, sample_page, with_chars
from serving.nano.texts import sample_entry, sample_words, word_list

SIDE_PX = 512
_DEBIAN = Path("/usr/share/fonts")
_GYRE = Path("/usr/share/texmf/fonts/opentype/public/tex-gyre")
_MAX_CHARS = 350

Random = np.random.Generator


@dataclass(frozen=True)
class Sheet:
    """A page as it is sent, and what it says: lines joined by newlines, a gap of any width being one space."""

    text: str
    data: bytes
    """A PNG picture, or a PDF of one page."""
    media_type: str


@cache
def _matplotlib() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the pages are printed in matplotlib's fonts, and it is not installed")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def _mono() -> list[Path]:
    return [_matplotlib() / "DejaVuSansMono.ttf"]


def _monos() -> list[Path]:
    return [_matplotlib() / "DejaVuSansMono.ttf", _matplotlib() / "DejaVuSansMono-Bold.ttf"]


def _seen() -> list[Path]:
    liberation = _DEBIAN / "truetype" / "liberation2"
    return [
        _matplotlib() / "DejaVuSans.ttf",
        _matplotlib() / "DejaVuSerif.ttf",
        liberation / "LiberationSans-Regular.ttf",
        liberation / "LiberationSans-Bold.ttf",
        liberation / "LiberationSerif-Regular.ttf",
        _GYRE / "texgyreheros-regular.otf",
        _GYRE / "texgyretermes-regular.otf",
        _GYRE / "texgyrepagella-regular.otf",
    ]


def _unseen() -> list[Path]:
    return [
        _DEBIAN / "truetype" / "noto" / "NotoSans-Regular.ttf",
        _DEBIAN / "truetype" / "noto" / "NotoSerif-Regular.ttf",
        _DEBIAN / "opentype" / "urw-base35" / "URWGothic-Book.otf",
        _DEBIAN / "opentype" / "urw-base35" / "C059-Roman.otf",
    ]


class _Paper:
    """A page that is written on line by line, from the top."""

    def __init__(self, random: Random, font: Path, size_px: int) -> None:
        self.random = random
        self.font = ImageFont.truetype(str(font), size_px)
        self.size_px = size_px
        self.image = Image.new("L", (SIDE_PX, SIDE_PX), 255)
        self.draw = ImageDraw.Draw(self.image)
        self.lines: list[str] = []
        self.left = int(random.integers(4, 60))
        self.right = SIDE_PX - int(random.integers(4, 60))
        self.pitch_px = size_px * float(random.uniform(1.2, 1.6))
        self.y = float(random.uniform(4, 50)) + size_px

    @property
    def is_full(self) -> bool:
        return self.y + 0.3 * self.size_px > SIDE_PX or sum(map(len, self.lines)) > _MAX_CHARS

    def fitting(self, words: list[str], width: float) -> str:
        """Take the first words that fit off the list, one at least if it does."""
        line = ""
        while words and self.font.getlength(f"{line} {words[0]}".strip()) <= width:
            line = f"{line} {words.pop(0)}".strip()
        return line

    def write(self, *pieces: tuple[float, str]) -> None:
        """Write pieces of text from where they begin on, as one line."""
        shown = [(x, text) for x, text in pieces if text]
        if shown and not self.is_full:
            for x, text in shown:
                self.draw.text((x, self.y), text, fill=0, font=self.font, anchor="ls")
            self.lines.append(" ".join(text for _, text in shown))
            self.y += self.pitch_px

    def prose(self, num_lines: int, *, is_prose: bool = True) -> None:
        """Write lines filled from margin to margin, or shorter ones."""
        words: list[str] = []
        for _ in range(num_lines):
            words += sample_words(self.random, "test", 12, is_prose=is_prose)
            room = self.right - self.left
            self.write(
                (self.left, self.fitting(words, room if is_prose else float(self.random.uniform(0.4, 1) * room)))
            )
            words = words if is_prose else []

    def skip(self, share: float = 0.6) -> None:
        self.y += share * self.pitch_px

    def rule(self) -> None:
        y = int(self.y - 0.75 * self.size_px)
        if y < SIDE_PX:
            self.draw.line((self.left, y, self.right, y), fill=0)
        self.y += 0.4 * self.size_px

    def finish(self, noise: float) -> Sheet:
        """Return the page with noise of that deviation, in grey levels."""
        pixels = np.asarray(self.image, np.float32)
        if noise:
            pixels = pixels + self.random.standard_normal(pixels.shape, np.float32) * np.float32(noise)
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8)).save(file, "PNG")
        return Sheet("\n".join(self.lines), file.getvalue(), "image/png")


def _pick(random: Random, fonts: list[Path]) -> Path:
    return fonts[int(random.integers(len(fonts)))]


def _name(random: Random) -> str:
    return sample_words(random, "test", 1, is_prose=True)[0].strip(".,;:!?()\"'").capitalize()


def _plain(random: Random, fonts: list[Path], sizes: tuple[int, int], noise: float) -> Sheet:
    paper = _Paper(random, _pick(random, fonts), int(random.integers(sizes[0], sizes[1] + 1)))
    while not paper.is_full:
        paper.prose(int(random.integers(2, 9)), is_prose=random.random() < 0.6)
        paper.skip(float(random.choice([0.0, 0.6])))
    return paper.finish(noise)


def _letter(random: Random, fonts: list[Path]) -> Sheet:
    """Sender, addressee, date, salutation, paragraphs and a name."""
    paper = _Paper(random, _pick(random, fonts), int(random.integers(16, 24)))
    left, year = paper.left, int(random.integers(1990, 2040))
    paper.write((left, f"{_name(random)} {_name(random)} Ltd."))
    paper.write((left, f"{int(random.integers(1, 200))} {_name(random)} Street"))
    paper.skip()
    date = f"{int(random.integers(1, 29))} March {year}"
    paper.write((paper.right - paper.font.getlength(date), date))
    paper.skip()
    paper.write((left, f"Dear {_name(random)},"))
    paper.skip(0.3)
    paper.prose(int(random.integers(3, 6)))
    paper.skip(0.3)
    paper.prose(int(random.integers(1, 4)))
    paper.skip(0.3)
    paper.write((left, "Yours sincerely,"))
    paper.write((left, _name(random)))
    return paper.finish(0.0)


def _invoice(random: Random, fonts: list[Path]) -> Sheet:
    """A title, pairs of labels and values, a table between rules and a total."""
    paper = _Paper(random, _pick(random, fonts), int(random.integers(16, 24)))
    column = paper.left + 0.45 * (paper.right - paper.left)

    def number(value: float) -> tuple[float, str]:
        text = f"{value:,.2f}"
        return paper.right - paper.font.getlength(text), text

    paper.write((paper.left, f"INVOICE {int(random.integers(1000, 99999))}"))
    paper.skip(0.4)
    for _ in range(int(random.integers(2, 5))):
        label, value = sample_entry(random, "test")
        paper.write((paper.left, label[:16]), (column, value[:16]))
    paper.rule()
    prices = random.integers(100, 90000, int(random.integers(2, 6))) / 100
    for price in prices.tolist():
        paper.write((paper.left, " ".join(_name(random) for _ in range(2))[:22]), number(price))
    paper.rule()
    paper.write((paper.left, "Total EUR"), number(float(prices.sum())))
    paper.skip(0.4)
    paper.prose(2)
    return paper.finish(0.0)


def _business(random: Random, fonts: list[Path]) -> Sheet:
    return (_letter if random.random() < 0.5 else _invoice)(random, fonts)


def _a4(random: Random) -> Sheet:
    """A letter on A4 in 11 or 12 pt, as a PDF with fonts of its own."""
    from fpdf import FPDF

    pdf = FPDF(unit="pt", format="A4")
    pdf.set_auto_page_break(auto=False)
    pdf.add_font("text", fname=_pick(random, _seen()))
    size = int(random.integers(11, 13))
    pdf.set_font("text", size=size)
    pdf.add_page()
    left, right, y, pitch = 70.0, 525.0, 80.0, size * float(random.uniform(1.2, 1.5))
    lines: list[str] = []
    for _ in range(int(random.integers(2, 5))):
        words: list[str] = []
        for _ in range(int(random.integers(2, 6))):
            words += [word for word in sample_words(random, "test", 16, is_prose=True) if word.isascii()]
            line = ""
            while words and pdf.get_string_width(f"{line} {words[0]}".strip()) <= right - left:
                line = f"{line} {words.pop(0)}".strip()
            pdf.text(left, y, line)
            lines.append(line)
            y += pitch
        y += 0.7 * pitch
    return Sheet("\n".join(lines), bytes(pdf.output()), "application/pdf")


def _grid(random: Random, *, is_wide: bool) -> Sheet:
    spec = with_chars(WIDE if is_wide else CORE, 100, 350)
    page = sample_page(spec, "test", int(random.integers(2**31)), 0)
    file = io.BytesIO()
    Image.fromarray(page.pixels).save(file, "PNG")
    return Sheet("\n".join(" ".join(line.split()) for line in page.text.split("\n")), file.getvalue(), "image/png")


SETS: dict[str, tuple[str, Callable[[Random], Sheet]]] = {
    "A": ("DejaVu Sans Mono 26 px, any offset", lambda random: _plain(random, _mono(), (26, 26), 0.0)),
    "B": ("monospaced, bold, 18-28 px, noise", lambda random: _plain(random, _monos(), (18, 28), random.uniform(0, 8))),
    "C": ("letters and invoices in fonts seen", lambda random: _business(random, _seen())),
    "D": ("letters and invoices in fonts unseen", lambda random: _business(random, _unseen())),
    "E": ("A4 PDFs, 11-12 pt at 144 dpi", _a4),
    "core": ("the old core set", lambda random: _grid(random, is_wide=False)),
    "wide": ("the old wide set", lambda random: _grid(random, is_wide=True)),
}
"""What a checkpoint is judged by: of each set what it is, and how a page is drawn."""


def draw(name: str, seed: int, index: int) -> Sheet:
    """Return page `index` of a set.

    Raises:
        FileNotFoundError: a font is not installed.
    """
    random = np.random.default_rng((seed, sorted(SETS).index(name), index))
    try:
        return SETS[name][1](random)
    except OSError as error:
        raise FileNotFoundError(
            f"set {name}: a font of it is not installed ({error}); see serving.nano.training.fonts for the packages"
        ) from error


def held_out_share(text: str) -> float:
    """Return which share of the words that dictionaries have is of the split that training never saw."""
    words = [word.strip(".,;:!?()\"'").lower() for word in text.split()]
    test, train = set(word_list("test")), set(word_list("train"))
    known = [word for word in words if word in test or word in train]
    return sum(word in test for word in known) / max(1, len(known))
