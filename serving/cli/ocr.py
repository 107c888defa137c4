"""The `serving ocr` command: reads files through the OCR service into a folder."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import typing
from pathlib import Path
from typing import Annotated

import pydantic
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from serving.errors import InvalidRequestError
from serving.ocr_api.options import MODES
from serving.ocr_api.page_ranges import check_selection
from serving.ocr_client.bulk import BulkRun, DiskFullError, FileOutcome, Tally
from serving.ocr_client.bulk_results import REPORT_NAME, OutputFormat, ReportRow, write_report
from serving.ocr_client.bulk_state import BulkState, RunningError
from serving.ocr_client.client import DEFAULT_URL, AsyncOcrClient, ReadOptions, RetryPolicy
from serving.ocr_client.errors import BusyError, ConnectionLostError, KeyRefusedError, OcrError
from serving.ocr_client.file_names import show_name
from serving.ocr_client.file_search import (
    FileSelectionError,
    Found,
    Task,
    find_files,
    ignores_case,
    plan_tasks,
)

_ANY_MODEL = "*"
"""Placeholder for the first model that the service lists."""
_SHOWN_FAILURES = 10
_INTERRUPTED = 130
_LINE_S = 30.0
"""How often progress is printed where there is no terminal, in seconds."""


def read_files(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Documents, folders of them, or quoted patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results and the progress of the run.")],
    mode: Annotated[str | None, typer.Option(help=f"Resolution mode: {', '.join(MODES)}.")] = None,
    output: Annotated[
        OutputFormat,
        typer.Option(
            "--format",
            "-f",
            help="Format of the results: json has blocks with boxes, pdf the pages with the text under them.",
        ),
    ] = OutputFormat.MARKDOWN,
    pages: Annotated[
        str | None, typer.Option(help="Pages of each document, such as 1-3,7 or 5- or -5; all by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to use; by default the first that the service lists.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt for every page, instead of the format's own.")] = None,
    dpi: Annotated[
        int | None, typer.Option(min=18, max=600, help="Resolution in which PDF pages are rendered.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit on the tokens of one page's answer.")] = None,
    text_layer: Annotated[
        str | None,
        typer.Option(help="Text that PDFs contain: off, prefer (take it where it is the whole page) or verify."),
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(envvar="SERVING_PDF_PASSWORD", help="Opens encrypted PDFs; safer in the environment."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=256, help="Documents to read at the same time.")] = 8,
    url: Annotated[
        str, typer.Option(envvar="SERVING_URL", help="Address of the stack or the OCR service.")
    ] = DEFAULT_URL,
    key: Annotated[
        str | None,
        typer.Option(envvar="SERVING_API_KEY", help="API key; safer in the environment than in the process list."),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a service that is unavailable or busy.")
    ] = 600.0,
) -> None:
    """Read documents (PDF, JPEG, PNG, WebP, TIFF, GIF, BMP, JPEG 2000, AVIF, HEIC) and write their text into a folder.

    \b
        serving ocr report.pdf scans/ --out texts
        serving ocr "archive/**/*.pdf" --out texts --mode auto --format json --jobs 16

    Each document is read in a job of the service. The result of box1/scan001.pdf is DIR/box1/scan001.pdf.md (or .txt,
    .json), and DIR/report.csv lists all files. Finished pages are stored in DIR: when the command or the service was
    stopped, the same command resumes. Run again, it reads only files that are new or have changed, and pages that
    failed.

    The exit status is 0 if every page was read; 1 if some pages, documents or folders could not be read (they are
    listed); 2 for an invalid command; 3 if the service or the disk cannot be used; 130 after Ctrl-C.
    """
    if mode is not None and mode not in MODES:
        _fail(2, f"--mode {mode}: must be one of {', '.join(MODES)}")
    fields = {"pages": pages, "prompt": prompt, "dpi": dpi, "max_tokens": max_tokens, "mode": mode}
    fields |= {"password": password} | ({"text_layer": text_layer} if text_layer is not None else {})
    display = _Display(url, wait)
    try:
        options = ReadOptions(model or _ANY_MODEL, **fields)  # type: ignore[arg-type]  # pydantic checks them
        if pages is not None:
            check_selection(pages)
        client = AsyncOcrClient(url, api_key=key, retry=RetryPolicy(max_wait_s=wait, on_wait=display.show_wait))
        found = find_files(files, out)
        state = BulkState(out)
        tasks = plan_tasks(found, out, output.suffix, ignores_case=ignores_case(out))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        _fail(2, f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}")
    except InvalidRequestError as error:
        _fail(2, f"--pages {pages}: {error.message}")
    except (FileSelectionError, ValueError) as error:
        _fail(2, str(error))
    except RunningError:
        _fail(2, f"another `serving ocr` is writing to {show_name(out)}; wait for it, or use another folder")
    except OSError as error:
        _fail(2, f"{show_name(out)}: cannot be written ({error.strerror})")
    display.show_found(found)
    try:
        asyncio.run(_run(client, state, options, output, tasks, jobs, display))
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, "stopped; the service continues its open jobs, and the same command fetches their pages")
    except OcrError as error:
        advice = "; set SERVING_API_KEY to a valid key" if isinstance(error, KeyRefusedError) else ""
        _fail(3, f"{url}: {error}{advice}\nFinished pages are kept; the same command resumes.")
    except DiskFullError:
        _fail(3, f"{show_name(out)}: the disk is full; no further page was sent, and the same command resumes")
    finally:
        state.close()
        display.write_report(out, found)
    if found.unread or not all(outcome.is_good for outcome in display.outcomes):
        raise typer.Exit(1)


async def _run(
    client: AsyncOcrClient,
    state: BulkState,
    options: ReadOptions,
    output: OutputFormat,
    tasks: list[Task],
    jobs: int,
    display: _Display,
) -> None:
    display.num_files = len(tasks)
    async with client:
        with display.progress:
            options, revision = await _choose_model(client, options)
            display.model = options.model
            run = BulkRun(client, state, options, output, display.show, display.note, revision)
            lines = asyncio.create_task(display.print_lines())
            try:
                await run.run(tasks, jobs)
            finally:
                lines.cancel()
    display.summarise()


async def _choose_model(client: AsyncOcrClient, options: ReadOptions) -> tuple[ReadOptions, str | None]:
    """The options with a model that the service has, and the revision of its checkpoint if the service tells it."""
    cards = (await client.model_cards()).data
    if not cards:
        _fail(3, "the service lists no models")
    card = cards[0] if options.model == _ANY_MODEL else next((c for c in cards if c.id == options.model), None)
    if card is None:
        _fail(2, f"--model {options.model}: the service has no such model, only {', '.join(c.id for c in cards)}")
    return dataclasses.replace(options, model=card.id), card.revision


class _Display:
    """What a run shows: a bar on a terminal, lines elsewhere; and the summary and the report at its end."""

    def __init__(self, url: str, wait_s: float) -> None:
        self.console = Console(stderr=True)
        self.progress = _build_progress(self.console)
        self._bar = self.progress.add_task("", total=None, files="", rates="")
        self._url, self._wait_s = url, wait_s
        self._began_s = time.monotonic()
        self._last_line_s = -_LINE_S
        self._tally = Tally()
        self._left_out: dict[str, int] = {}
        self._num_unread = 0
        self.num_files = 0
        self.model = ""
        self.outcomes: list[FileOutcome] = []

    def show_found(self, found: Found) -> None:
        """Say what is left out, and what cannot be read."""
        self._left_out, self._num_unread = dict(found.left_out.most_common()), len(found.unread)
        for name, reason in found.unread.items():
            what = "the folder cannot be searched" if Path(name).is_dir() else "it cannot be read"
            typer.echo(f"{show_name(name)}: {what} ({reason})", err=True)
        if self._left_out:
            kinds = ", ".join(f"{kind}: {number}" for kind, number in self._left_out.items())
            typer.echo(f"left out: {kinds}", err=True)

    def show(self, tally: Tally) -> None:
        self._tally = tally
        rates = _describe(tally, self._seconds)
        self.progress.update(self._bar, total=tally.num_pages or None, completed=tally.num_done, rates=rates)

    def show_wait(self, error: OcrError, since_s: float) -> None:
        """The service is away or busy, and will be asked again."""
        reason = "busy" if isinstance(error, BusyError) else "no answer"
        if isinstance(error, ConnectionLostError) and not error.was_sent:
            reason = "refused"
        text = f"waiting for {self._url} ({reason}), up to {self._wait_s:g} s"
        if self.console.is_terminal:
            self.progress.update(self._bar, rates=f"{text}, {since_s:.0f} s so far")
        elif time.monotonic() - self._last_line_s >= _LINE_S:
            self._print_line(text)

    def note(self, outcome: FileOutcome) -> None:
        """A file has ended."""
        self.outcomes.append(outcome)
        self.progress.update(self._bar, files=f"{len(self.outcomes)}/{self.num_files} files")
        _print_outcome(self.console, outcome)

    async def print_lines(self) -> None:
        """Print progress now and then where no bar can be shown."""
        while not self.console.is_terminal:
            await asyncio.sleep(_LINE_S)
            files = f"{len(self.outcomes)}/{self.num_files} files"
            self._print_line(f"{files}, {self._tally.num_done} pages: {_describe(self._tally, self._seconds)}")

    def summarise(self) -> None:
        """Say how many files were read, failed and left out."""
        num_done = sum(outcome.was_done for outcome in self.outcomes)
        num_read = sum(outcome.is_good for outcome in self.outcomes)
        num_failed = len(self.outcomes) - num_read + self._num_unread
        before = f", {num_done} of them finished before" if num_done else ""
        files = f"{num_read} files read{before}, {num_failed} failed, {sum(self._left_out.values())} left out"
        rates = _describe(self._tally, self._seconds)
        self.console.print(f"{files}; {self._tally.num_done} pages: {rates}", highlight=False, soft_wrap=True)

    def write_report(self, out: Path, found: Found) -> None:
        """Write the report of all files that have ended so far."""
        outcomes = sorted(self.outcomes, key=lambda outcome: outcome.task.file)
        rows = [_build_row(outcome, self.model) for outcome in outcomes]
        rows += [ReportRow(show_name(name), "", "unreadable", error=reason) for name, reason in found.unread.items()]
        if not rows:
            return
        try:
            write_report(out / REPORT_NAME, rows)
        except OSError as error:
            typer.echo(f"{show_name(out / REPORT_NAME)}: cannot be written ({error.strerror})", err=True)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began_s

    def _print_line(self, text: str) -> None:
        self._last_line_s = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _build_row(outcome: FileOutcome, model: str) -> ReportRow:
    reasons = [f"page {number}: {reason}" for number, reason in list(outcome.failed.items())[:_SHOWN_FAILURES]]
    return ReportRow(
        show_name(outcome.task.file),
        show_name(outcome.task.target) if outcome.failure is None else "",
        "read" if outcome.is_good else "failed",
        outcome.num_read,
        len(outcome.failed),
        model,
        " ".join(outcome.modes),
        outcome.num_tokens,
        outcome.dollars,
        outcome.seconds,
        outcome.digest,
        outcome.failure or "; ".join(reasons),
    )


def _build_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[files]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pages"),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _describe(tally: Tally, seconds: float) -> str:
    rates = f"{tally.num_done / seconds:.1f} pages/s, {tally.num_tokens / seconds:.0f} tokens/s"
    failed = f", {tally.num_failed} failed" if tally.num_failed else ""
    return f"{rates}, ${tally.dollars:.6f}{failed}"


def _print_outcome(console: Console, outcome: FileOutcome) -> None:
    name = show_name(outcome.task.file)
    if outcome.failure is not None:
        console.print(f"{name}: {outcome.failure}", markup=False, style="red", soft_wrap=True)
    for number, reason in list(outcome.failed.items())[:_SHOWN_FAILURES]:
        console.print(f"{name}, page {number}: {reason}", markup=False, style="red", soft_wrap=True)
    if len(outcome.failed) > _SHOWN_FAILURES:
        console.print(f"{name}: and {len(outcome.failed) - _SHOWN_FAILURES} more pages", markup=False, style="red")
    if outcome.is_good and not outcome.was_done:
        console.print(f"{name} -> {show_name(outcome.task.target)}", markup=False, soft_wrap=True, highlight=False)


def _fail(status: int, reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(status)
