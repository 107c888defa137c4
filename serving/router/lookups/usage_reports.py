"""The ledger over HTTP: usage for tenants, costs for the operator, quotes for everyone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs

from sqlalchemy.exc import SQLAlchemyError

from serving.billing.ledger import Ledger
from serving.billing.periods import NS_PER_S, Window, month_of, month_window, parse_time_ns
from serving.billing.queries import read_uptimes, sum_usage, sum_work
from serving.billing.quotes import quote, quote_to_json
from serving.billing.reports import (
    GroupBy,
    UsageReport,
    costs_to_json,
    openai_groups,
    parse_groups,
    usage_to_csv,
    usage_to_json,
    usage_to_openai,
    whole_days,
)
from serving.billing.stack_costs import report_costs
from serving.errors import InvalidRequestError, NoReplicaError, OverloadedError, PermissionDeniedError
from serving.router.accounting.accounts import Accounts
from serving.router.accounting.token_bounds import bound_tokens
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.work_estimate import ImageReading
from serving.settings.tenants import Identity

T = TypeVar("T")
Query = dict[str, list[str]]
_MAX_DAYS = 400


def parse_query(query_string: bytes) -> Query:
    """A URL's query parameters, each with all of its values."""
    return parse_qs(query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=50)


async def answer_usage(ledger: Ledger | None, identity: Identity, query: Query) -> tuple[bytes | dict[str, Any], str]:
    """Answer `GET /v1/usage`: the tenant's own usage, for admins that of all tenants or of `tenant`. Returns the answer
    and its content type.

    Raises:
        InvalidRequestError: a parameter is invalid.
        OverloadedError: the database cannot be reached.
    """
    groups = _parse(lambda: parse_groups(_one(query, "group_by") or "day,model"), "group_by")
    tenant = _one(query, "tenant")
    if not identity.is_admin:
        if tenant not in (None, identity.tenant_id):
            raise PermissionDeniedError("The usage of other tenants requires an admin key.")
        tenant = identity.tenant_id
    report = await _read_usage(ledger, _window(query), groups, tenant)
    if _one(query, "format") == "csv":
        return usage_to_csv(report).encode(), "text/csv; charset=utf-8"
    return usage_to_json(report), "application/json"


async def answer_openai_usage(ledger: Ledger | None, query: Query) -> dict[str, Any]:
    """Answer `GET /v1/organization/usage/completions` in OpenAI's format: daily buckets from `start_time`, in
    seconds."""
    start_s, end_s = _number(query, "start_time"), _number(query, "end_time")
    if start_s is None:
        raise InvalidRequestError("start_time is required: seconds since the epoch.", param="start_time")
    end_ns = time.time_ns() if end_s is None else end_s * NS_PER_S
    window = _bounded(whole_days(_ordered(start_s * NS_PER_S, end_ns)))
    names = [name for key in ("group_by", "group_by[]") for name in query.get(key, ())]
    groups = _parse(lambda: openai_groups(names), "group_by")
    return usage_to_openai(await _read_usage(ledger, window, (GroupBy.DAY, *groups), None))


async def answer_costs(ledger: Ledger | None, query: Query) -> dict[str, Any]:
    """Answer `GET /admin/costs`: what the stack itself cost, and what it earned."""
    window = _window(query)
    try:
        async with _require_ledger(ledger).database.reading() as connection:
            uptimes, work = await read_uptimes(connection, window), await sum_work(connection, window)
    except (SQLAlchemyError, OSError) as error:
        raise _unavailable() from error
    return costs_to_json(window, report_costs(uptimes, work))


def answer_quote(
    accounts: Accounts, identity: Identity, request: RoutedRequest, reading: ImageReading, max_model_len: int
) -> dict[str, Any]:
    """Answer `POST /v1/quote`: what a request would cost. Image tokens are exact; the router has no tokenizer, so text
    is bounded by a token per byte.

    Raises:
        NoReplicaError: no replica of the model has reported how long an answer may be.
    """
    if not max_model_len:
        raise NoReplicaError("No replica of this model is ready; try again shortly.")
    bounds = bound_tokens(request, reading, max_model_len)
    found = quote(
        accounts.find_price(request.model, identity.tenant_id, time.time_ns()),
        prompt_tokens=bounds.prompt,
        num_image_tokens=bounds.num_image_tokens or 0,
        max_tokens=bounds.longest_answer or 0,
        num_choices=bounds.num_choices,
    )
    return quote_to_json(request.model, found)


async def _read_usage(
    ledger: Ledger | None, window: Window, groups: tuple[GroupBy, ...], tenant: str | None
) -> UsageReport:
    try:
        async with _require_ledger(ledger).database.reading() as connection:
            rows = await sum_usage(connection, window, groups, tenant_id=tenant)
    except (SQLAlchemyError, OSError) as error:
        raise _unavailable() from error
    return UsageReport(window, groups, tuple(rows))


def _require_ledger(ledger: Ledger | None) -> Ledger:
    if ledger is None:
        raise _unavailable()
    return ledger


def _unavailable() -> OverloadedError:
    return OverloadedError("The ledger's database cannot be reached; nothing is lost.", 5.0, code="ledger_unavailable")


def _window(query: Query) -> Window:
    """The window of a report: a `month` such as 2026-11, the current one by default; or `since` and `until`, dates or
    times."""
    since, until = _one(query, "since"), _one(query, "until")
    if since is None:
        return _parse(lambda: month_window(_one(query, "month") or month_of(time.time_ns())), "month")
    begin_ns = _parse(lambda: parse_time_ns(since), "since")
    end_ns = time.time_ns() if until is None else _parse(lambda: parse_time_ns(until), "until")
    return _bounded(_ordered(begin_ns, end_ns))


def _ordered(begin_ns: int, end_ns: int) -> Window:
    if begin_ns >= end_ns:
        raise InvalidRequestError("The window must begin before it ends.", param="since")
    return Window(begin_ns, end_ns)


def _bounded(window: Window) -> Window:
    if window.end_ns - window.begin_ns > _MAX_DAYS * 86_400 * NS_PER_S:
        raise InvalidRequestError(f"A report may cover {_MAX_DAYS} days at most.", param="since")
    return window


def _one(query: Query, name: str) -> str | None:
    values = query.get(name)
    return values[0] if values else None


def _number(query: Query, name: str) -> int | None:
    text = _one(query, name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise InvalidRequestError(f"{name} must be seconds since the epoch.", param=name)
    return int(text)


def _parse(read: Callable[[], T], param: str) -> T:
    try:
        return read()
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param) from error
