"""Draws pages of PDFs, and reads their text layer. Forms appear as filled in; scripts never run.

PDFium draws. qpdf (through pikepdf) is asked where PDFium gives up or has no answer: it rebuilds files whose
cross-reference table or header is missing, and knows the pages' UserUnit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import math
import mmap
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from serving.ocr.rendering.drawing import WHITE, Drawing, PageError, WarningKind, fit_scale
from serving.plugin.images.picture import to_rgb

POINTS_PER_INCH = 72
_LEAST_DPI = 4
"""Below this no page is read: an ordinary letter would be smaller than a pixel."""
_MAX_UNIT = 75_000.0
"""The largest UserUnit of a valid PDF (ISO 32000-2, annex C)."""
_TAIL_BYTES = 2048
_MAX_OBJECTS = 20_000
"""How many objects of a page are looked at for their fonts: pages may have millions."""
_MAX_NAMES = 3
_BUILT_IN = re.compile(
    r"(courier|couriernew|helvetica|arial|times|timesnewroman|timesroman|symbol|zapfdingbats)"
    r"(ps|mt|psmt|bold|italic|oblique|roman|regular|[,\-])*",
    re.IGNORECASE,
)
"""Fonts for which PDFium has substitutes with the same widths."""
_INVISIBLE = 3
"""Text render mode."""


@contextlib.contextmanager
def open_pdf(file: Path, password: str | None = None) -> Iterator[tuple[Any, bool]]:
    """Open a PDF; also tells whether it is damaged.

    Raises:
        PageError: the PDF is damaged beyond repair, needs a password, or is a dynamic form.
    """
    import pypdfium2

    is_damaged = not is_intact(file)
    try:
        document = _open(file, password)
    except pypdfium2.PdfiumError as error:
        is_locked = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
        is_damaged = is_damaged or not is_locked
        _check_encryption(error)
        # Of locked files qpdf opens those with an empty owner's password.
        document = _open_mended(file, password)
    with contextlib.closing(document):
        if document.get_formtype() == pypdfium2.raw.FORMTYPE_XFA_FULL:
            raise PageError(
                "dynamic_form",
                "The PDF is a dynamic XFA form, whose pages are made by Adobe's programs only; open it in Adobe Reader,"
                " print it to a PDF, and send that.",
            )
        yield document, is_damaged


def _open(file: Path, password: str | None) -> Any:
    """Open a PDF. A password that it does not need, since it has an empty one, is no obstacle."""
    import pypdfium2

    try:
        return pypdfium2.PdfDocument(file, password=password)
    except pypdfium2.PdfiumError as error:
        if password is not None and error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            with contextlib.suppress(pypdfium2.PdfiumError):
                return pypdfium2.PdfDocument(file)
        raise


def _check_encryption(error: Any) -> None:
    from pypdfium2 import raw

    if error.err_code == raw.FPDF_ERR_SECURITY:
        raise PageError(
            "encrypted_document", "The PDF is encrypted in a way that is not supported; send a copy without encryption."
        ) from error


def _open_mended(file: Path, password: str | None) -> Any:
    import pypdfium2

    facts = file.stat()
    mended = _mend(file, password, facts.st_mtime_ns, facts.st_size)
    try:
        return pypdfium2.PdfDocument(mended)
    except pypdfium2.PdfiumError as error:
        raise PageError("damaged_document", "The PDF is damaged.") from error


@functools.lru_cache(maxsize=1)
def _mend(file: Path, password: str | None, mtime_ns: int, size_bytes: int) -> bytes:
    """The file as qpdf rewrites it. The last one is kept, since each page opens its document again."""
    import pikepdf

    data = file.read_bytes()
    if b"%PDF-" not in data[:_TAIL_BYTES]:
        start = data.find(b"%PDF-")
        data = data[start:] if start >= 0 else b"%PDF-1.7\n" + data
    mended = io.BytesIO()
    try:
        with _open_with_qpdf(io.BytesIO(data), password) as document:
            if not len(document.pages):
                raise PageError("damaged_document", "The PDF is damaged, and no page of it can be found.")
            document.save(mended, encryption=False)
    except pikepdf.PasswordError as error:
        if password is not None:
            raise PageError("wrong_password", "The password does not open the PDF.") from error
        raise PageError(
            "encrypted_document", "The PDF is encrypted; send its password as password, or a copy without one."
        ) from error
    except pikepdf.PdfError as error:
        raise PageError("damaged_document", "The PDF is damaged.") from error
    return mended.getvalue()


def _open_with_qpdf(source: Path | io.BytesIO, password: str | None) -> Any:
    import pikepdf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a password that is not needed
        return pikepdf.open(source, password=password or "")


def is_intact(file: Path) -> bool:
    """Whether a PDF has its header, its end, and a cross-reference table where the end says."""
    with file.open("rb") as stream:
        head = stream.read(5)
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read().rstrip(b"\0\r\n\t ")
        found = re.findall(rb"startxref\s+(\d{1,12})\s+%%EOF", tail)
        if head != b"%PDF-" or not found:
            return False
        stream.seek(min(int(found[-1]), size))
        return re.match(rb"\s*(xref|\d+\s+\d+\s+obj)", stream.read(64)) is not None


def count_pages(file: Path, password: str | None) -> int:
    """The number of pages; raises PageError as `open_pdf` does."""
    with open_pdf(file, password) as (document, _):
        return len(document)


def draw(file: Path, page: int, dpi: int, max_pixels: int, password: str | None) -> Drawing:
    """Draw a page, at a lower resolution if it would have more than `max_pixels`.

    Raises:
        PageError: the page has no valid size, or is too large for any useful resolution.
    """
    import pypdfium2

    with open_pdf(file, password) as (document, is_damaged):
        width, height = document.get_page_size(page)  # in points, or in the page's own unit
        if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
            raise PageError("damaged_page", "The page has no valid size.")
        unit = _find_units(file, password).get(page, 1.0)
        scale = dpi * unit / POINTS_PER_INCH
        fit = fit_scale(width * scale, height * scale, max_pixels)
        shown_dpi = dpi * fit
        if shown_dpi < _LEAST_DPI:
            raise PageError(
                "page_too_large",
                f"The page measures {width * unit / POINTS_PER_INCH:.0f} x {height * unit / POINTS_PER_INCH:.0f} inches"
                f" and would be drawn at less than {_LEAST_DPI} dpi; crop it, or cut it into several pages.",
            )
        document.init_forms()
        opened = document[page]
        drawing = Drawing(to_rgb(opened.render(scale=scale * fit).to_pil(), WHITE), dpi=max(1, int(shown_dpi)))
        if fit < 1:
            drawing.warn(
                WarningKind.RESOLUTION_REDUCED,
                f"At {dpi} dpi the page would have more than {max_pixels} pixels; it was drawn at {drawing.dpi} dpi.",
            )
        if is_damaged:
            drawing.warn(WarningKind.DAMAGED, "The PDF is damaged; it was read as far as it could be repaired.")
        with contextlib.suppress(pypdfium2.PdfiumError):  # a page that was drawn does not fail for its fonts' names
            _check_fonts(opened, drawing)
        return drawing


def _find_units(file: Path, password: str | None) -> Mapping[int, float]:
    facts = file.stat()
    return _read_units(file, password, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=4)
def _read_units(file: Path, password: str | None, mtime_ns: int, size_bytes: int) -> Mapping[int, float]:
    """The pages' UserUnit where it is not one. PDFium ignores it."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Pages are often in compressed object streams; other files need not be parsed a second time.
        if data.find(b"/UserUnit") < 0 and data.find(b"/ObjStm") < 0:
            return {}
    import pikepdf

    units: dict[int, float] = {}
    try:
        with _open_with_qpdf(file, password) as document:
            for index, page in enumerate(document.pages):
                unit = page.obj.get("/UserUnit")
                if unit is not None and 0 < float(unit) <= _MAX_UNIT:
                    units[index] = float(unit)
    except (pikepdf.PdfError, pikepdf.PasswordError, ValueError, TypeError, ArithmeticError):
        return {}
    return units


def find_texts(page: Any) -> Iterator[Any]:
    """The text objects among the first objects of a page, those of forms in it included."""
    from pypdfium2 import PdfiumError, raw

    with contextlib.suppress(PdfiumError):
        for each in islice(page.get_objects(max_depth=3), _MAX_OBJECTS):
            if each.type == raw.FPDF_PAGEOBJ_TEXT:
                yield each


def _check_fonts(page: Any, drawing: Drawing) -> None:
    """Warn of text that was drawn in another font than the document's, or not at all."""
    from pypdfium2 import raw

    substituted, blank = dict[str, None](), dict[str, None]()
    textpage = None
    for text in find_texts(page):
        font = raw.FPDFTextObj_GetFont(text)
        if not font or raw.FPDFFont_GetIsEmbedded(font) or raw.FPDFTextObj_GetTextRenderMode(text) == _INVISIBLE:
            continue
        left, bottom, right, top = text.get_bounds()
        name = _read_font_name(font)
        if top - bottom <= 0 or right - left <= 0:
            # Without a glyph the text has no height. So have spaces.
            textpage = textpage or page.get_textpage()
            if _read_text(text, textpage).strip():
                blank[name] = None
        elif not _BUILT_IN.fullmatch(name.replace(" ", "")):
            substituted[name] = None
    if blank:
        drawing.warn(
            WarningKind.FONT_MISSING,
            f"Text was left blank: the PDF does not contain its fonts ({_join(blank)}), and no font of the service's"
            " machine has its characters. Send a PDF with embedded fonts, or images.",
        )
    if substituted:
        drawing.warn(
            WarningKind.FONT_SUBSTITUTED,
            f"Text was drawn in other fonts: the PDF does not contain its own ({_join(substituted)}).",
        )


def _join(names: Mapping[str, None]) -> str:
    shown = ", ".join(list(names)[:_MAX_NAMES])
    return shown + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def _read_font_name(font: Any) -> str:
    from pypdfium2 import raw

    buffer = ctypes.create_string_buffer(128)
    raw.FPDFFont_GetBaseFontName(font, buffer, len(buffer))
    name = "".join(letter for letter in buffer.value.decode("utf-8", "replace") if letter.isprintable())
    return re.sub(r"^[A-Z]{6}\+", "", name)[:64] or "unnamed"


def _read_text(text: Any, textpage: Any) -> str:
    from pypdfium2 import raw

    num_bytes = raw.FPDFTextObj_GetText(text, textpage, None, 0)
    buffer = (ctypes.c_ushort * (num_bytes // 2))()
    raw.FPDFTextObj_GetText(text, textpage, buffer, num_bytes)
    return bytes(buffer).decode("utf-16-le", "ignore").rstrip("\0")
