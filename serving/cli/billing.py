"""The commands `serving billing ...`: reports and checks of the ledger for operators."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from serving.billing.database import Database
from serving.billing.engine_counters import CountersError, Readings, fetch_readings, load_readings, save_readings
from serving.billing.periods import Window, month_of, month_window, parse_time_ns
from serving.billing.prices import PriceBook, format_dollars
from serving.billing.queries import read_uptimes, sum_by_replica, sum_usage, sum_work
from serving.billing.reconcile import Comparison, compare
from serving.billing.reports import (
    UsageReport,
    costs_to_csv,
    costs_to_json,
    parse_groups,
    usage_to_csv,
    usage_to_json,
)
from serving.billing.spool import read_spools
from serving.billing.stack_costs import CostLine, report_costs
from serving.errors import SettingsError
from serving.settings.stack import Settings, load_settings
from serving.stack.run_file import read_engine_key

app = typer.Typer(
    help="Cost accounting: usage, what the stack itself costs, and whether both are right.",
    no_args_is_help=True,
    add_completion=False,
)

_EVER = Window(0, 2**63 - 1)
_ROWS_AT_ONCE = 256

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Settings file; see configs/ for examples.")]
MonthOption = Annotated[str | None, typer.Option(help="A month like 2026-11, UTC; this one by default.")]
SinceOption = Annotated[str | None, typer.Option(help="In the place of a month: a date or a time, UTC.")]
UntilOption = Annotated[str | None, typer.Option(help="With --since: the end, not included; now by default.")]


class TableFormat(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


FormatOption = Annotated[TableFormat, typer.Option("--format", "-f", help="How to print it.")]


@app.command()
def migrate(config: ConfigOption) -> None:
    """Migrate the ledger's database to this version's schema, and store the prices in the settings."""
    settings = _load(config)

    async def work(database: Database) -> None:
        await database.migrate()
        prices = {name: model.price for name, model in settings.models.items()}
        await database.insert_prices(PriceBook.from_settings(prices).rows())

    _with_database(settings, work)
    typer.echo("the ledger is up to date")


@app.command()
def report(
    config: ConfigOption,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    by: Annotated[str, typer.Option(help="day, model, mode, key, tenant, outcome; several between commas.")] = "model",
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    output: FormatOption = TableFormat.TABLE,
) -> None:
    """Print requests, pages, tokens and cost by day, model, mode, key, tenant or outcome."""
    settings = _load(config)
    try:
        window, groups = _window(month, since, until), parse_groups(by)
    except ValueError as error:
        _refuse(str(error))

    async def work(database: Database) -> UsageReport:
        await _catch_up(database, settings)
        async with database.reading() as connection:
            rows = await sum_usage(connection, window, groups, tenant_id=tenant)
        return UsageReport(window, groups, tuple(rows))

    _print_usage(_with_database(settings, work), output)


@app.command()
def costs(
    config: ConfigOption,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    output: FormatOption = TableFormat.TABLE,
) -> None:
    """Print what the stack itself costs by model and tenant: spend, idle time, margin, per page and per token."""
    settings = _load(config)
    try:
        window = _window(month, since, until)
    except ValueError as error:
        _refuse(str(error))

    async def work(database: Database) -> list[CostLine]:
        await _catch_up(database, settings)
        async with database.reading() as connection:
            return report_costs(await read_uptimes(connection, window), await sum_work(connection, window))

    _print_costs(_with_database(settings, work), window, output)


@app.command()
def reconcile(
    config: ConfigOption,
    replica: Annotated[list[str] | None, typer.Option(help="A replica as ID=URL; may be given again.")] = None,
    counters: Annotated[Path | None, typer.Option(help="Readings from a file in the place of replicas.")] = None,
    since_reading: Annotated[
        Path | None, typer.Option(help="An earlier reading (see --save): compare what came since.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Where to keep this reading.")] = None,
) -> None:
    """Compare the ledger with the engines' own counters. The exit status is 1 if they differ.

    No requests may be running: a request that only one side has counted is a difference.
    """
    settings = _load(config)
    try:
        base_urls = _parse_replicas(replica or [])
        earlier = load_readings(since_reading) if since_reading is not None else None
        comparison, readings = run_reconcile(settings, base_urls, counters=counters, earlier=earlier)
        if save is not None:
            save_readings(save, readings)
    except (CountersError, ValueError) as error:
        _refuse(str(error))
    _print_comparison(comparison)
    raise typer.Exit(0 if comparison.is_equal else 1)


def run_reconcile(
    settings: Settings, base_urls: Mapping[str, str], *, counters: Path | None = None, earlier: Readings | None = None
) -> tuple[Comparison, Readings]:
    """Read the engines' counters, from replicas by id or from a file, and compare the ledger with them.

    Raises:
        CountersError: there is no replica, or a replica does not answer.
    """
    if counters is None and not base_urls:
        raise CountersError("no replicas are given to compare the ledger with: use --replica ID=URL")

    async def work(database: Database) -> tuple[Comparison, Readings]:
        if counters is not None:
            readings = load_readings(counters)
        else:
            readings = await fetch_readings(base_urls, time_ns=time.time_ns(), api_key=read_engine_key(settings))
        await _catch_up(database, settings)
        window = Window(earlier.time_ns, _EVER.end_ns) if earlier is not None else _EVER
        async with database.reading() as connection:
            booked = await sum_by_replica(connection, window)
        return compare(booked, readings.replicas, earlier.replicas if earlier is not None else None), readings

    return _with_database(settings, work)


async def _catch_up(database: Database, settings: Settings) -> None:
    """Write the records in this machine's journals to the database, so that a report is complete."""
    if settings.billing.migrate_on_start:
        await database.migrate()
    for records in read_spools(settings.billing.directory / "spool", _ROWS_AT_ONCE):
        await database.insert(records)


_Result = typing.TypeVar("_Result")


def _with_database(settings: Settings, work: Callable[[Database], Awaitable[_Result]]) -> _Result:
    async def run() -> _Result:
        database = Database(settings.billing)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except (SQLAlchemyError, OSError) as error:
        _refuse(f"the ledger's database cannot be used: {error}")


def _window(month: str | None, since: str | None, until: str | None) -> Window:
    if since is None:
        if until is not None:
            raise ValueError("--until needs --since")
        return month_window(month or month_of(time.time_ns()))
    if month is not None:
        raise ValueError("--month and --since exclude each other")
    window = Window(parse_time_ns(since), parse_time_ns(until) if until is not None else time.time_ns())
    if window.end_ns <= window.begin_ns:
        raise ValueError("--until must be later than --since")
    return window


def _parse_replicas(given: Sequence[str]) -> dict[str, str]:
    replicas = {}
    for text in given:
        replica_id, separator, url = text.partition("=")
        if not separator or not url.startswith(("http://", "https://")):
            raise ValueError(f"--replica {text!r} is not ID=URL")
        replicas[replica_id] = url
    return replicas


def _print_usage(usage: UsageReport, output: TableFormat) -> None:
    if output is TableFormat.JSON:
        typer.echo(json.dumps(usage_to_json(usage), indent=2))
    elif output is TableFormat.CSV:
        typer.echo(usage_to_csv(usage), nl=False)
    else:
        columns = ("requests", "pages", "prompt", "image", "cached", "completion", "wasted", "cost $")
        table = _table([group.value for group in usage.group_by], columns)
        for row in (*usage.rows, usage.total):
            groups = [getattr(row, group.value) for group in usage.group_by]
            counts = (row.num_requests, row.num_pages, row.prompt_tokens, row.image_tokens, row.cached_tokens)
            numbers = [f"{count:,}" for count in (*counts, row.completion_tokens, row.wasted_tokens)]
            names = ["total" if group is None else group or "-" for group in groups]
            table.add_row(*names, *numbers, format_dollars(row.cost_nanodollars))
        _console().print(table)


def _print_costs(lines: Sequence[CostLine], window: Window, output: TableFormat) -> None:
    if output is TableFormat.JSON:
        typer.echo(json.dumps(costs_to_json(window, lines), indent=2))
    elif output is TableFormat.CSV:
        typer.echo(costs_to_csv(lines), nl=False)
    else:
        columns = ("requests", "revenue $", "spend $", "of it idle $", "margin $", "$/M tokens", "$/1000 pages")
        table = _table(["model", "tenant"], columns)
        for line in lines:
            amounts = (line.revenue_nanodollars, line.spend_nanodollars, line.idle_nanodollars, line.margin_nanodollars)
            ratios = (line.per_million_tokens_nanodollars, line.per_thousand_pages_nanodollars)
            texts = ["-" if amount is None else format_dollars(amount) for amount in (*amounts, *ratios)]
            table.add_row(line.model, line.tenant_id or "all", f"{line.num_requests:,}", *texts)
        _console().print(table)


def _print_comparison(comparison: Comparison) -> None:
    table = _table(
        ["replica", "finding"], ("prompt", "difference", "completion", "difference", "requests", "difference")
    )
    for line in comparison.lines:
        cells: list[str] = []
        for name in ("prompt_tokens", "completion_tokens", "requests"):
            cells.append(f"{getattr(line.ledger, name):,}")
            cells.append("-" if line.engine is None else f"{getattr(line.difference, name):+,}")
        note = f", {line.num_estimated} estimated" if line.num_estimated else ""
        table.add_row(line.replica_id, f"{line.finding}{note}", *cells)
    _console().print(table)


def _table(names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _console() -> Console:
    # A pipe has no width, so nothing may be truncated.
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


def _load(file: Path) -> Settings:
    try:
        return load_settings(file)
    except SettingsError as error:
        _refuse(str(error))


def _refuse(reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(2)
