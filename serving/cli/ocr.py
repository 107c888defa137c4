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

from serving.ocr_api.options import MODES
from serving.ocr_client.bulk import (
    BulkRun,
    FileOutcome,
    FileSelectionError,
    OutputFormat,
    Tally,
    Task,
    find_files,
    plan_tasks,
)
from serving.ocr_client.bulk_state import BulkState, RunningError
from serving.ocr_client.client import DEFAULT_URL, AsyncOcrClient, ReadOptions, RetryPolicy
from serving.ocr_client.errors import KeyRefusedError, OcrError
from serving.ocr_client.file_names import show_name

_ANY_MODEL = "*"
"""Placeholder for the first model that the service lists."""
_SHOWN_FAILURES = 10
_INTERRUPTED = 130


def read_files(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Documents, folders of them, or quoted patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results and the progress of the run.")],
    mode: Annotated[str | None, typer.Option(help=f"Resolution mode: {', '.join(MODES)}.")] = None,
    output: Annotated[
        OutputFormat,
        typer.Option("--format", "-f", help="Format of the result files; json includes blocks with their boxes."),
    ] = OutputFormat.MARKDOWN,
    pages: Annotated[str | None, typer.Option(help="Pages of each document, such as 1-3,7; all by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to use; by default the first that the service lists.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt for every page, instead of the format's own.")] = None,
    dpi: Annotated[
        int | None, typer.Option(min=18, max=600, help="Resolution in which PDF pages are rendered.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit on the tokens of one page's answer.")] = None,
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
    """Read documents (PDF, JPEG, PNG, WebP, TIFF, GIF, BMP) and write their text into a folder.

    \b
        serving ocr report.pdf scans/ --out texts
        serving ocr "archive/**/*.pdf" --out texts --mode auto --format json --jobs 16

    Each document is read in a job of the service and written to DIR/NAME.md (or .txt, .json). Finished pages are stored
    in DIR: when the command or the service was stopped, the same command resumes. Run again, it reads only files that
    are new or have changed, and pages that failed.

    The exit status is 0 if every page was read; 1 if some pages, documents or folders could not be read (they are
    listed); 2 for an invalid command; 3 if the service cannot be used; 130 after Ctrl-C.
    """
    if mode is not None and mode not in MODES:
        _fail(2, f"--mode {mode}: must be one of {', '.join(MODES)}")
    fields = {"pages": pages, "prompt": prompt, "dpi": dpi, "max_tokens": max_tokens, "mode": mode}
    try:
        options = ReadOptions(model or _ANY_MODEL, **fields)  # type: ignore[arg-type]  # pydantic checks them
        found = find_files(files, out)
        tasks = plan_tasks(found.files, out, output)
        state = BulkState(out)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        _fail(2, f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}")
    except FileSelectionError as error:
        _fail(2, str(error))
    except RunningError:
        _fail(2, f"another `serving ocr` is writing to {show_name(out)}; wait for it, or use another folder")
    except OSError as error:
        _fail(2, f"{show_name(out)}: cannot be written ({error.strerror})")
    try:
        client = AsyncOcrClient(url, api_key=key, retry=RetryPolicy(max_wait_s=wait))
        outcomes = asyncio.run(_run(client, state, options, output, tasks, jobs))
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, "stopped; the service continues its open jobs, and the same command fetches their pages")
    except OcrError as error:
        advice = "; set SERVING_API_KEY to a valid key" if isinstance(error, KeyRefusedError) else ""
        _fail(3, f"{url}: {error}{advice}\nFinished pages are kept; the same command resumes.")
    finally:
        state.close()
    for folder, reason in found.unread.items():
        typer.echo(f"{show_name(folder)}: the folder cannot be searched ({reason})", err=True)
    if found.unread or not all(outcome.is_good for outcome in outcomes):
        raise typer.Exit(1)


async def _run(
    client: AsyncOcrClient, state: BulkState, options: ReadOptions, output: OutputFormat, tasks: list[Task], jobs: int
) -> list[FileOutcome]:
    console = Console(stderr=True)
    began_s = time.monotonic()
    async with client:
        if options.model == _ANY_MODEL:
            options = await _choose_model(client, options)
        with _build_progress(console) as progress:
            bar = progress.add_task("", total=None, files=f"0/{len(tasks)} files", rates="")
            num_over = 0

            def show(tally: Tally) -> None:
                rates = _describe(tally, time.monotonic() - began_s)
                progress.update(bar, total=tally.num_pages or None, completed=tally.num_done, rates=rates)

            def note(outcome: FileOutcome) -> None:
                nonlocal num_over
                num_over += 1
                progress.update(bar, files=f"{num_over}/{len(tasks)} files")
                _print_outcome(console, outcome)

            run = BulkRun(client, state, options, output, show, note)
            outcomes = await run.run(tasks, jobs)
    num_done = sum(outcome.was_done for outcome in outcomes)
    before = f", {num_done} of them finished before" if num_done else ""
    rates = _describe(run.tally, time.monotonic() - began_s)
    console.print(f"{len(outcomes)} files{before}; {run.tally.num_done} pages: {rates}", highlight=False)
    return outcomes


async def _choose_model(client: AsyncOcrClient, options: ReadOptions) -> ReadOptions:
    names = await client.models()
    if not names:
        _fail(3, "the service lists no models")
    return dataclasses.replace(options, model=names[0])


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
