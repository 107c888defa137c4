"""Queries of the ledger. The database computes sums exactly; times are arrival times unless stated otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, case, cast, func, literal_column, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from serving.billing.periods import NS_PER_DAY, Window
from serving.billing.reconcile import LedgerTotals, Totals
from serving.billing.reports import GroupBy, UsageRow
from serving.billing.schema import LOST_TRIES, MONTHS, REPLICAS, REQUESTS
from serving.billing.stack_costs import TenantWork, Uptime, clip_lives

_GROUPS: dict[GroupBy, ColumnElement[Any]] = {
    GroupBy.DAY: REQUESTS.c.arrived_ns.op("/")(literal_column(str(NS_PER_DAY))),
    GroupBy.MODEL: REQUESTS.c.model,
    GroupBy.MODE: REQUESTS.c.mode,
    GroupBy.KEY: REQUESTS.c.key_id,
    GroupBy.TENANT: REQUESTS.c.tenant_id,
    GroupBy.OUTCOME: REQUESTS.c.outcome,
}


def _within(window: Window, column: ColumnElement[int]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return column >= window.begin_ns, column < window.end_ns


async def sum_month_by_tenant(
    connection: AsyncConnection, month: str, *, except_router_id: str = ""
) -> Mapping[str, int]:
    """Nanodollars that each tenant has spent in a month such as `2026-11`, except through one router."""
    query = (
        select(MONTHS.c.tenant_id, func.sum(MONTHS.c.cost_nanodollars))
        .where(MONTHS.c.month == month, MONTHS.c.router_id != except_router_id)
        .group_by(MONTHS.c.tenant_id)
    )
    return {tenant_id: int(cost) for tenant_id, cost in await connection.execute(query)}


async def sum_usage(
    connection: AsyncConnection,
    window: Window,
    group_by: Sequence[GroupBy] = (),
    *,
    tenant_id: str | None = None,
    models: Sequence[str] | None = None,
    key_ids: Sequence[str] | None = None,
) -> list[UsageRow]:
    """The window's requests summed up by the given groups, in order; of one tenant, or of all."""
    columns = REQUESTS.c
    groups = [_GROUPS[group] for group in group_by]
    sums = [
        func.count(),
        *(
            func.coalesce(func.sum(column), 0)
            for column in (
                columns.num_pages,
                columns.prompt_tokens,
                columns.image_tokens,
                columns.cached_tokens,
                columns.completion_tokens,
                columns.wasted_tokens,
                columns.cost_nanodollars,
            )
        ),
    ]
    query = select(*groups, *sums).where(*_within(window, columns.arrived_ns))
    for given, column in ((models, columns.model), (key_ids, columns.key_id)):
        if given is not None:
            query = query.where(column.in_(given))
    if tenant_id is not None:
        query = query.where(columns.tenant_id == tenant_id)
    if groups:
        query = query.group_by(*groups).order_by(*groups)
    rows = []
    for given_row in await connection.execute(query):
        values, numbers = given_row[: len(groups)], [int(number) for number in given_row[len(groups) :]]
        rows.append(UsageRow.of(group_by, values, numbers))
    return rows


async def sum_by_replica(connection: AsyncConnection, window: Window) -> dict[str, LedgerTotals]:
    """The ledger's totals for every replica, of requests that ended within the window: to be compared with its
    counters."""
    found: dict[str, LedgerTotals] = {}
    requests, lost = REQUESTS.c, LOST_TRIES.c
    queries = (
        select(
            requests.replica_id,
            func.sum(requests.prompt_tokens),
            func.sum(requests.completion_tokens),
            func.sum(case((requests.prompt_tokens > 0, 1), else_=0)),
            func.sum(cast(requests.is_estimated, Integer)),
        )
        .where(requests.replica_id != "", *_within(window, requests.ended_ns))
        .group_by(requests.replica_id),
        select(
            lost.replica_id,
            func.sum(lost.prompt_tokens),
            func.sum(lost.completion_tokens),
            func.sum(case((lost.prompt_tokens > 0, 1), else_=0)),
            literal_column("0"),
        )
        .where(*_within(window, lost.ended_ns))
        .group_by(lost.replica_id),
    )
    for query in queries:
        for replica_id, *sums in await connection.execute(query):
            prompt, completion, count, estimated = (int(number) for number in sums)
            known = found.get(replica_id, LedgerTotals())
            totals = known.totals + Totals(prompt, completion, count)
            found[replica_id] = LedgerTotals(totals, known.num_estimated + estimated)
    return found


async def sum_work(connection: AsyncConnection, window: Window) -> list[TenantWork]:
    """The work done for each tenant by each model."""
    rows = await sum_usage(connection, window, (GroupBy.MODEL, GroupBy.TENANT))
    return [
        TenantWork(
            model=row.model or "",
            tenant_id=row.tenant or "",
            num_requests=row.num_requests,
            num_pages=row.num_pages,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
            completion_tokens=row.completion_tokens,
            wasted_tokens=row.wasted_tokens,
            revenue_nanodollars=row.cost_nanodollars,
        )
        for row in rows
        if row.model
    ]


async def read_uptimes(connection: AsyncConnection, window: Window) -> list[Uptime]:
    """Every replica's lifetime within the window, and how much of it the replica was busy."""
    columns = REPLICAS.c
    query = (
        select(columns.replica_id, columns.model, columns.started_ns, columns.seen_ns, columns.nanodollars_per_hour)
        .where(columns.started_ns < window.end_ns, columns.seen_ns > window.begin_ns)
        .order_by(columns.replica_id)
    )
    lives = [
        (str(row[0]), str(row[1]), int(row[2]), int(row[3]), int(row[4])) for row in await connection.execute(query)
    ]
    return clip_lives(lives, await _sum_busy(connection, window), window)


async def _sum_busy(connection: AsyncConnection, window: Window) -> dict[str, int]:
    """Nanoseconds of the window during which each replica had at least one request, from arrival to end.

    In order of arrival, each request adds the time after the latest end of all requests before it.
    """
    columns = REQUESTS.c
    begin = case((columns.arrived_ns > window.begin_ns, columns.arrived_ns), else_=window.begin_ns)
    end = case((columns.ended_ns < window.end_ns, columns.ended_ns), else_=window.end_ns)
    inner = (
        select(columns.replica_id, columns.request_id, begin.label("begin_ns"), end.label("end_ns"))
        .where(columns.replica_id != "", columns.arrived_ns < window.end_ns, columns.ended_ns > window.begin_ns)
        .subquery()
    )
    earlier = func.max(inner.c.end_ns).over(
        partition_by=inner.c.replica_id, order_by=(inner.c.begin_ns, inner.c.request_id), rows=(None, -1)
    )
    spans = select(inner.c.replica_id, inner.c.begin_ns, inner.c.end_ns, earlier.label("earlier_ns")).subquery()
    since = case(
        (or_(spans.c.earlier_ns.is_(None), spans.c.earlier_ns < spans.c.begin_ns), spans.c.begin_ns),
        else_=spans.c.earlier_ns,
    )
    added = case((spans.c.end_ns > since, spans.c.end_ns - since), else_=0)
    query = select(spans.c.replica_id, func.sum(added)).group_by(spans.c.replica_id)
    return {replica_id: int(busy_ns) for replica_id, busy_ns in await connection.execute(query)}
