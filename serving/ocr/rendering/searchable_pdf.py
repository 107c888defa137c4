"""Builds a PDF of one page: its picture, and under it the words, which can be searched, selected and copied."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pikepdf
from PIL import Image

from serving.ocr.rendering.words import PlacedBlock, PlacedWord

_QUALITY = 85
_COLOURFUL = 12
"""Difference of red, green and blue from which a page is not grey."""
_FONT = "/F1"
_LETTER_EM = 0.5
"""Width of every letter of the invisible font, in relation to its size."""


def build_pdf(image: Image.Image, blocks: Sequence[PlacedBlock], dpi: int) -> bytes:
    """A PDF with the picture at its size in inches."""
    points = 72 / dpi
    width, height = image.width * points, image.height * points
    document = pikepdf.new()
    picture = io.BytesIO()
    shown = image.convert("L") if _is_grey(image) else image.convert("RGB")
    shown.save(picture, "JPEG", quality=_QUALITY)
    drawn = pikepdf.Stream(
        document,
        picture.getvalue(),
        Type=pikepdf.Name.XObject,
        Subtype=pikepdf.Name.Image,
        Width=image.width,
        Height=image.height,
        ColorSpace=pikepdf.Name.DeviceGray if shown.mode == "L" else pikepdf.Name.DeviceRGB,
        BitsPerComponent=8,
        Filter=pikepdf.Name.DCTDecode,
    )
    commands = [f"q {width:.2f} 0 0 {height:.2f} 0 0 cm /Im Do Q", "BT 3 Tr"]
    commands += _write_words(blocks, image.height, points)
    content = "\n".join([*commands, "ET"]).encode()
    document.add_blank_page(page_size=(width, height))
    page = document.pages[0]
    page.Contents = document.make_stream(content)
    page.Resources = pikepdf.Dictionary(
        XObject=pikepdf.Dictionary(Im=document.make_indirect(drawn)),
        Font=pikepdf.Dictionary(F1=_build_font(document)),
    )
    out = io.BytesIO()
    document.save(out, deterministic_id=True)
    return out.getvalue()


def _is_grey(image: Image.Image) -> bool:
    small = image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    pixels = small.tobytes()
    return all(
        abs(pixels[at] - pixels[at + 1]) + abs(pixels[at] - pixels[at + 2]) < 12 for at in range(0, len(pixels), 3)
    )


def _write_words(blocks: Sequence[PlacedBlock], height: int, points: float) -> Iterator[str]:
    for block in blocks:
        for line in block.lines:
            yield from (_write_word(word, height, points) for word in line)


def _write_word(word: PlacedWord, height: int, points: float) -> str:
    """The command that shows a word in its box: the font's size is the box's height, and the word is stretched."""
    left, top, right, bottom = word.box
    size = max(1.0, (bottom - top) * points)
    text = word.text + " "
    stretch = 100 * (right - left) * points / (len(word.text) * _LETTER_EM * size)
    codes = text.encode("utf-16-be", "replace").hex()
    x, y = left * points, (height - bottom) * points
    return f"{_FONT} {size:.2f} Tf {stretch:.1f} Tz 1 0 0 1 {x:.2f} {y:.2f} Tm <{codes}> Tj"


def _build_font(document: pikepdf.Pdf) -> pikepdf.Object:
    """A font without glyphs, whose codes are UTF-16: nothing of it is ever drawn."""
    ranges = [f"<{high:02x}00> <{high:02x}ff> <{high:02x}00>" for high in range(256)]
    blocks = "\n".join(
        f"{len(part)} beginbfrange\n" + "\n".join(part) + "\nendbfrange"
        for part in (ranges[start : start + 100] for start in range(0, 256, 100))
    )
    mapping = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /Words def /CMapType 2 def\n"
        "1 begincodespacerange <0000> <ffff> endcodespacerange\n"
        f"{blocks}\nendcmap end end"
    )
    descriptor = pikepdf.Dictionary(
        Type=pikepdf.Name.FontDescriptor,
        FontName=pikepdf.Name.Words,
        Flags=4,
        FontBBox=[0, -200, 500, 800],
        ItalicAngle=0,
        Ascent=800,
        Descent=-200,
        CapHeight=700,
        StemV=80,
    )
    letters = pikepdf.Dictionary(
        Type=pikepdf.Name.Font,
        Subtype=pikepdf.Name.CIDFontType2,
        BaseFont=pikepdf.Name.Words,
        CIDSystemInfo=pikepdf.Dictionary(
            Registry=pikepdf.String("Adobe"), Ordering=pikepdf.String("Identity"), Supplement=0
        ),
        FontDescriptor=descriptor,
        DW=int(_LETTER_EM * 1000),
        CIDToGIDMap=pikepdf.Name.Identity,
    )
    return document.make_indirect(
        pikepdf.Dictionary(
            Type=pikepdf.Name.Font,
            Subtype=pikepdf.Name.Type0,
            BaseFont=pikepdf.Name.Words,
            Encoding=pikepdf.Name("/Identity-H"),
            DescendantFonts=[letters],
            ToUnicode=document.make_stream(mapping.encode()),
        )
    )
