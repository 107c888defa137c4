"""`python -m benchmarks.nano_accuracy`: what a checkpoint reads of anybody's print, over HTTP.

Sets A to E of `benchmarks.nano_pages` and the old grid's go through a running stack as a client's pages would: pictures
as chat requests in Tiny, PDFs through the OCR service in Base. Per set: character error rates, pages over 10%, endless
answers, tokens of noise on a page that was not read; and as in the paper's table precision by length with the
compression. Runs of spaces count as one, and empty lines for nothing.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.load.__main__ import find_stack
from benchmarks.nano_pages import SETS, Sheet, draw
from serving.nano.training.metrics import character_error_rate
from serving.ocr_client.client import DEFAULT_URL, Mode, OcrClient, ReadOptions

_VISION_TOKENS = {"tiny": 64, "small": 100, "base": 256, "large": 400, "gundam": 256}
"""Of a page that is not tiled."""
_MAX_TOKENS = 480
"""More than any page of the sets has; an answer of that length has not found its end."""
_UNREAD = 0.5
"""Character error rate from which on a page counts as not read."""
_STEP = 50
"""Characters, in the table by length."""


@dataclass(frozen=True)
class Reading:
    """What was read of a page, and in how many tokens."""

    sheet: Sheet
    text: str
    tokens: int

    @property
    def rate(self) -> float:
        return character_error_rate(tidy(self.text), tidy(self.sheet.text))


@dataclass(frozen=True)
class Measured:
    """One set in one mode."""

    name: str
    mode: str
    readings: list[Reading]
    seconds: float

    @property
    def rates(self) -> np.ndarray:
        return np.array([reading.rate for reading in self.readings])

    @property
    def noise_tokens(self) -> float | None:
        """Median tokens of the answers about pages that were not read; None if all were."""
        noise = [reading.tokens for reading in self.readings if reading.rate >= _UNREAD]
        return float(np.median(noise)) if noise else None

    def to_json(self) -> dict[str, Any]:
        rates, counts = self.rates, [len(reading.sheet.text) for reading in self.readings]
        return {
            "set": self.name,
            "about": SETS[self.name][0],
            "mode": self.mode,
            "pages": len(self.readings),
            "cer_percent": 100 * float(rates.mean()),
            "median_percent": 100 * float(np.median(rates)),
            "worst_percent": 100 * float(rates.max()),
            "num_exact": int((rates == 0).sum()),
            "num_over_10_percent": int((rates > 0.1).sum()),
            "num_endless": sum(reading.tokens >= _MAX_TOKENS for reading in self.readings),
            "noise_tokens": self.noise_tokens,
            "compression": float(np.mean(counts)) / _VISION_TOKENS[self.mode],
            "pages_per_s": len(self.readings) / self.seconds,
        }


def tidy(text: str) -> str:
    """Return the text with single spaces and without empty lines."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


class Reader:
    """Reads pages through a stack."""

    def __init__(self, url: str, key: str | None, model: str) -> None:
        self._model = model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=600)
        self._documents = OcrClient(url, api_key=key, timeout_s=600)

    def close(self) -> None:
        self._http.close()
        self._documents.close()

    def read(self, sheet: Sheet, mode: str) -> tuple[str, int]:
        """Return what a page says and how many tokens that was."""
        return self._read_pdf(sheet, mode) if sheet.media_type == "application/pdf" else self._read_picture(sheet, mode)

    def _read_picture(self, sheet: Sheet, mode: str) -> tuple[str, int]:
        url = f"data:{sheet.media_type};base64,{base64.b64encode(sheet.data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Free OCR."}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
            "mm_processor_kwargs": {"mode": mode},
        }
        answer = self._http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        found = answer.json()
        return found["choices"][0]["message"]["content"] or "", found["usage"]["completion_tokens"]

    def _read_pdf(self, sheet: Sheet, mode: str) -> tuple[str, int]:
        options = ReadOptions(self._model, mode=cast(Mode, mode), format="text", max_tokens=_MAX_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "page.pdf"
            file.write_bytes(sheet.data)
            (page,) = self._documents.read(file, options).pages
        return page.content if page.is_completed else "", page.usage.completion_tokens


Read = Callable[[Sheet, str], tuple[str, int]]


def measure(read: Read, name: str, mode: str, sheets: Sequence[Sheet], at_once: int, console: Console) -> Measured:
    """Read a set's pages, `at_once` at the same time."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda sheet: read(sheet, mode), sheets)
        shown = track(answers, f"{name}, {mode}", len(sheets), console=console, transient=True)
        readings = [Reading(sheet, *answer) for sheet, answer in zip(sheets, shown, strict=True)]
    return Measured(name, mode, readings, time.monotonic() - began_s)


def count_changes(read: Read, mode: str, sheets: Sequence[Sheet], at_once: int) -> int:
    """Return how many pages give another answer alone than among `at_once`."""
    alone = [read(sheet, mode) for sheet in sheets]
    with ThreadPoolExecutor(at_once) as pool:
        together = list(pool.map(lambda sheet: read(sheet, mode), sheets))
    return sum(one != other for one, other in zip(alone, together, strict=True))


def build_tables(found: Sequence[Measured]) -> list[Table]:
    """By set, and by length of text."""
    by_set = Table(title="character error rate by set")
    columns = ("set", "pages of", "mode", "pages", "CER", "median", "worst", "exact", "> 10%", "endless", "noise")
    for index, column in enumerate((*columns, "per token", "pages/s")):
        by_set.add_column(column, justify="left" if index < 3 else "right")
    for one in found:
        row = one.to_json()
        shares = (f"{row[key]:.2f}%" for key in ("cer_percent", "median_percent", "worst_percent"))
        counts = (str(row[key]) for key in ("num_exact", "num_over_10_percent", "num_endless"))
        noise = "-" if row["noise_tokens"] is None else f"{row['noise_tokens']:.0f}"
        speed = (f"{row['compression']:.1f}", f"{row['pages_per_s']:.2f}")
        by_set.add_row(one.name, str(row["about"]), one.mode, str(row["pages"]), *shares, *counts, noise, *speed)
    by_length = Table(title="precision and characters per vision token, by length of text")
    for index, column in enumerate(("set", "characters", "pages", "precision", "per token")):
        by_length.add_column(column, justify="left" if not index else "right")
    for one in found:
        steps = np.array([len(reading.sheet.text) // _STEP for reading in one.readings])
        for step in sorted(set(steps.tolist())):
            group = one.rates[steps == step]
            chars = np.mean([len(r.sheet.text) for r, s in zip(one.readings, steps, strict=True) if s == step])
            precision = 100 * (1 - float(np.minimum(group, 1).mean()))
            per_token = float(chars) / _VISION_TOKENS[one.mode]
            lengths = f"{step * _STEP}-{(step + 1) * _STEP - 1}"
            by_length.add_row(one.name, lengths, str(len(group)), f"{precision:.1f}%", f"{per_token:.1f}")
    return [by_set, by_length]


def main(
    url: Annotated[
        str, typer.Option(help="Of a running stack; without one at the default address it is started and stopped.")
    ] = DEFAULT_URL,
    key: Annotated[str | None, typer.Option(envvar="SERVING_API_KEY", help="Its API key.")] = None,
    model: Annotated[str, typer.Option(help="The model to measure.")] = "nano",
    only: Annotated[list[str] | None, typer.Option("--set", help="Sets; all of them if none is given.")] = None,
    mode: Annotated[str, typer.Option(help="For pictures; PDFs are read in base.")] = "tiny",
    pages: Annotated[int, typer.Option(min=1, help="Pages of each set.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the pages.")] = 100,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 8,
    alone: Annotated[int, typer.Option(min=0, help="Pages of the first set to read alone as well.")] = 8,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure what a checkpoint reads of free print."""
    names = only or list(SETS)
    for name in names:
        if name not in SETS:
            raise typer.BadParameter(f"{name}: there are {', '.join(SETS)}", param_hint="--set")
    if mode not in _VISION_TOKENS:
        raise typer.BadParameter(f"{mode}: there are {', '.join(_VISION_TOKENS)}", param_hint="--mode")
    console = Console(width=150)
    books = {name: [draw(name, seed, index) for index in range(pages)] for name in names}
    with find_stack(url, console) as address:
        reader = Reader(address, key, model)
        found = [
            measure(reader.read, name, "base" if name == "E" else mode, sheets, at_once, console)
            for name, sheets in books.items()
        ]
        first = found[0]
        num_changed = count_changes(reader.read, first.mode, books[first.name][:alone], at_once)
        reader.close()
    for table in build_tables(found):
        console.print(table)
    console.print(f"{min(alone, pages)} pages of set {first.name}, alone and among {at_once}: {num_changed} differ")
    if output is not None:
        about = {"pages": pages, "seed": seed, "num_alone": min(alone, pages), "num_changed": num_changed}
        output.write_text(json.dumps(about | {"sets": [one.to_json() for one in found]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
