"""The fonts that free print is trained and measured in: files of the matplotlib package and of Debian packages.

| source | families | licence |
| --- | --- | --- |
| matplotlib (pinned) | DejaVu, Computer Modern Typewriter, STIX | Bitstream Vera / public domain, BaKoMa, OFL-1.1 |
| fonts-dejavu-extra | DejaVu Sans Condensed | Bitstream Vera / public domain |
| fonts-liberation2 | Liberation Sans, Serif, Mono | OFL-1.1 |
| fonts-noto-core, fonts-noto-mono | Noto Sans, Serif, Mono | OFL-1.1 |
| fonts-texgyre | TeX Gyre | GUST Font License |
| fonts-urw-base35 | URW Gothic, C059 | AGPL-3.0 with the exception for fonts |

Families in `UNSEEN` are measured and never trained on; no trained family has their design.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont

_FOLDERS = {
    "dejavu": "/usr/share/fonts/truetype/dejavu",
    "liberation": "/usr/share/fonts/truetype/liberation2",
    "noto": "/usr/share/fonts/truetype/noto",
    "gyre": "/usr/share/texmf/fonts/opentype/public/tex-gyre",
    "urw": "/usr/share/fonts/opentype/urw-base35",
}
PACKAGES = (
    "fonts-dejavu-extra",
    "fonts-liberation2",
    "fonts-noto-core",
    "fonts-noto-mono",
    "fonts-texgyre",
    "fonts-urw-base35",
)
"""The Debian packages that hold what the matplotlib package does not."""


@dataclass(frozen=True)
class Font:
    """A font file: the source it is from (`matplotlib` or a folder of Debian's), its name there."""

    source: str
    file: str

    @property
    def path(self) -> Path:
        return _find_matplotlib() / self.file if self.source == "matplotlib" else Path(_FOLDERS[self.source], self.file)

    @property
    def is_mono(self) -> bool:
        return any(part in self.file.lower() for part in ("mono", "cmtt", "cursor"))


@cache
def _find_matplotlib() -> Path:
    """Return the folder of matplotlib's fonts without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("training takes fonts from the matplotlib package, which is not installed")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def _fonts(source: str, pattern: str, names: str) -> tuple[Font, ...]:
    return tuple(Font(source, pattern.format(name)) for name in names.split())


MONO_CORE = Font("matplotlib", "DejaVuSansMono.ttf")
MONO = (
    MONO_CORE,
    *_fonts("matplotlib", "DejaVuSansMono-{}.ttf", "Bold Oblique"),
    Font("matplotlib", "cmtt10.ttf"),
    *_fonts("liberation", "LiberationMono-{}.ttf", "Regular Bold Italic"),
    *_fonts("gyre", "texgyrecursor-{}.otf", "regular bold"),
    Font("noto", "NotoMono-Regular.ttf"),
)
PROPORTIONAL = (
    *_fonts("matplotlib", "DejaVuSans{}.ttf", "-Bold -Oblique"),
    Font("matplotlib", "DejaVuSans.ttf"),
    *_fonts("matplotlib", "DejaVuSerif{}.ttf", "-Bold -Italic"),
    Font("matplotlib", "DejaVuSerif.ttf"),
    *_fonts("matplotlib", "STIXGeneral{}.ttf", "Bol Italic BolIta"),
    Font("matplotlib", "STIXGeneral.ttf"),
    Font("dejavu", "DejaVuSansCondensed.ttf"),
    *_fonts("liberation", "LiberationSans-{}.ttf", "Regular Bold Italic"),
    *_fonts("liberation", "LiberationSerif-{}.ttf", "Regular Bold Italic"),
    *_fonts("gyre", "texgyre{}-regular.otf", "heros termes pagella bonum heroscn"),
    *_fonts("gyre", "texgyre{}-bold.otf", "heros termes"),
    *_fonts("gyre", "texgyre{}-italic.otf", "pagella termes"),
)
UNSEEN = (
    *_fonts("noto", "Noto{}-Regular.ttf", "Sans Serif"),
    Font("urw", "URWGothic-Book.otf"),
    Font("urw", "C059-Roman.otf"),
)


def check_fonts(fonts: Iterable[Font] = (*MONO, *PROPORTIONAL, *UNSEEN)) -> None:
    """Check that the fonts are installed.

    Raises:
        FileNotFoundError: one is not; the message says what to install.
    """
    missing = sorted(str(font.path) for font in fonts if not font.path.is_file())
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} fonts of the training are missing, such as {missing[0]}: "
            f"install Debian's {' '.join(PACKAGES)}"
        )


@cache
def load(font: Font, size_px: int) -> ImageFont.FreeTypeFont:
    """Return a font at a size."""
    return ImageFont.truetype(str(font.path), size_px, layout_engine=ImageFont.Layout.BASIC)
