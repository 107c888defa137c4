"""What is told of missing fonts, against what PDFium draws with those of this machine."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pypdfium2
import pytest

from serving.ocr.rendering.fonts import FOLDERS, find_scripts, read_scripts, warn_of_missing_fonts

SCRIPTS = {
    # script: encoding of the PDF, its collection of characters, text in that encoding
    "Japanese": ("90ms-RKSJ-H", "Japan1", "日本語の文字".encode("cp932")),
    "simplified Chinese": ("GBK-EUC-H", "GB1", "简体中文".encode("gbk")),
    "Korean": ("KSCms-UHC-H", "Korea1", "한국어".encode("cp949")),
    "traditional Chinese": ("ETen-B5-H", "CNS1", "繁體中文".encode("big5")),
}
BITS = {"Japanese": 17, "simplified Chinese": 18, "Korean": 19, "traditional Chinese": 20}


def build_pdf(encoding: str, ordering: str, text: bytes) -> bytes:
    """A page of text in a font that is only named."""
    content = f"BT /F1 30 Tf 10 40 Td <{text.hex()}> Tj ET"
    system = f"<</Registry(Adobe)/Ordering({ordering})/Supplement 2>>"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 100]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(content)}>>stream\n{content}\nendstream",
        f"<</Type/Font/Subtype/Type0/BaseFont/Named/Encoding/{encoding}/DescendantFonts[6 0 R]>>",
        f"<</Type/Font/Subtype/CIDFontType2/BaseFont/Named/CIDSystemInfo{system}/FontDescriptor 7 0 R/DW 1000>>",
        "<</Type/FontDescriptor/FontName/Named/Flags 6/FontBBox[0 -200 1000 900]/ItalicAngle 0/Ascent 800"
        "/Descent -200/StemV 80/CapHeight 700>>",
    ]
    body, places = "%PDF-1.4\n", []
    for number, written in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{written}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    head = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    return f"{body}{head}trailer<</Size {len(places) + 1}/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF".encode()


def build_font(*scripts: str) -> bytes:
    """As much of a font as says what scripts it has."""
    os2 = bytes(78) + struct.pack(">I", sum(1 << BITS[script] for script in scripts)) + bytes(14)
    tables = struct.pack(">4sIII4sIII", b"GSUB", 0, 0, 0, b"OS/2", 0, 44, len(os2))
    return b"OTTO" + struct.pack(">HHHH", 2, 0, 0, 0) + tables + os2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_told_to_be_missing_exactly_when_it_is_not_drawn(script: str) -> None:
    document = pypdfium2.PdfDocument(build_pdf(*SCRIPTS[script]))
    darkest, _ = document[0].render().to_pil().convert("L").getextrema()
    document.close()
    assert (darkest < 128) == (script in (find_scripts(FOLDERS) or set()))


def test_fonts_and_collections_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.otf").write_bytes(build_font("Korean", "Japanese"))
    assert read_scripts(tmp_path / "a.otf") == {"Korean", "Japanese"}
    (tmp_path / "plain.ttf").write_bytes(build_font())
    assert read_scripts(tmp_path / "plain.ttf") == set()
    # In a collection the tables' places are counted from the file's beginning, as here from the font's.
    one = build_font("simplified Chinese")
    collection = struct.pack(">4sIII", b"ttcf", 0x00010000, 1, 16) + one.replace(
        struct.pack(">I", 44), struct.pack(">I", 60), 1
    )
    (tmp_path / "c.ttc").write_bytes(collection)
    assert read_scripts(tmp_path / "c.ttc") == {"simplified Chinese"}


@pytest.mark.parametrize("length", [0, 3, 11, 12, 20, 40, 100])
def test_a_damaged_font_has_nothing(length: int, tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_bytes(build_font("Korean")[:length])
    assert read_scripts(tmp_path / "x.ttf") == set()


@pytest.mark.parametrize(
    ("fonts", "told"),
    [
        ({}, "no fonts are installed: "),
        ({"latin": ()}, "no fonts are installed for Japanese, simplified Chinese, Korean, traditional Chinese: "),
        (
            {"ja": ("Japanese",), "ko": ("Korean",)},
            "no fonts are installed for simplified Chinese, traditional Chinese: ",
        ),
        ({"all": tuple(SCRIPTS)}, None),
    ],
)
def test_what_is_missing_is_logged_with_what_to_install(
    fonts: dict[str, tuple[str, ...]], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/notes.txt").write_text("no font")
    for name, scripts in fonts.items():
        (tmp_path / f"deep/{name}.TTF").write_bytes(build_font(*scripts))
    with caplog.at_level(logging.WARNING):
        warn_of_missing_fonts([str(tmp_path), str(tmp_path / "none")])
    if told is None:
        assert caplog.messages == []
        return
    (message,) = caplog.messages
    assert message.startswith(told)
    assert "apt-get install fonts-noto-cjk" in message
