from __future__ import annotations

import asyncio
import csv
import io
import json
from collections import defaultdict
from dataclasses import fields
from decimal import Decimal

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.admin.organization.usage_completions_response import (
    DataResultOrganizationUsageCompletionsResult,
    UsageCompletionsResponse,
)
from support.billing_samples import NOON_NS, RECORDS, make_record

from serving.billing.database import Database
from serving.billing.periods import NS_PER_DAY, Window, day_of, month_window, parse_time_ns
from serving.billing.queries import sum_usage
from serving.billing.records import Outcome, RequestRecord
from serving.billing.reports import (
    GroupBy,
    UsageReport,
    UsageRow,
    costs_to_csv,
    costs_to_json,
    openai_groups,
    parse_groups,
    usage_to_csv,
    usage_to_json,
    usage_to_openai,
    whole_days,
)
from serving.billing.schema import REQUESTS, row_of
from serving.billing.stack_costs import CostLine
from serving.settings.billing import BillingSettings

NOVEMBER = month_window("2026-11")
DAY_NS = NS_PER_DAY


async def fill(database: Database) -> None:
    await database.insert(
        [
            make_record(1),
            make_record(2, arrived_ns=NOON_NS + DAY_NS, modes=("tiny",), key_id="=key"),
            make_record(3, tenant_id="beta", cost_nanodollars=1, modes=()),
            make_record(4, tenant_id="beta", outcome=Outcome.REFUSED, cost_nanodollars=0, modes=("tiny", "base")),
            make_record(5, arrived_ns=NOVEMBER.begin_ns - 1),
            make_record(6, arrived_ns=NOVEMBER.end_ns),
        ]
    )


async def read(database: Database, by: str, tenant_id: str | None = None) -> UsageReport:
    groups = parse_groups(by)
    async with database.reading() as connection:
        rows = await sum_usage(connection, NOVEMBER, groups, tenant_id=tenant_id)
    return UsageReport(NOVEMBER, groups, tuple(rows))


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("", [((), 4)]),
        ("day", [(("2026-11-23",), 3), (("2026-11-24",), 1)]),
        ("mode", [(("",), 1), (("gundam",), 1), (("mixed",), 1), (("tiny",), 1)]),
        ("tenant,outcome", [(("acme", "completed"), 2), (("beta", "completed"), 1), (("beta", "refused"), 1)]),
        ("model,key", [(("nano", "=key"), 1), (("nano", "key-1"), 3)]),
    ],
)
async def test_usage_is_summed_up_by_what_is_asked(
    database: Database, by: str, expected: list[tuple[tuple[str, ...], int]]
) -> None:
    await fill(database)
    report = await read(database, by)
    found = [(tuple(getattr(row, group.value) for group in report.group_by), row.num_requests) for row in report.rows]
    assert sorted(found) == sorted(expected)
    assert report.total.num_requests == 4
    assert report.total.cost_nanodollars == 160_001


async def test_a_tenant_sees_its_own_only(database: Database) -> None:
    await fill(database)
    assert (await read(database, "", "beta")).total.cost_nanodollars == 1
    assert (await read(database, "model", "nobody")).rows == ()
    async with database.reading() as connection:
        of_key = await sum_usage(connection, NOVEMBER, (), key_ids=["=key"], models=["nano"])
        of_none = await sum_usage(connection, NOVEMBER, (), models=[])
    assert [row.num_requests for row in (*of_key, *of_none)] == [1, 0]


@given(st.lists(RECORDS, max_size=25), st.lists(st.sampled_from(GroupBy), unique=True))
@hypothesis.settings(max_examples=25)
def test_sums_are_those_of_the_requests(
    tmp_path_factory: pytest.TempPathFactory, records: list[RequestRecord], groups: list[GroupBy]
) -> None:
    async def run() -> list[UsageRow]:
        database = Database(BillingSettings(directory=tmp_path_factory.mktemp("usage")))
        await database.migrate()
        await database.insert(records)
        async with database.reading() as connection:
            rows = await sum_usage(connection, NOVEMBER, groups)
        await database.close()
        return rows

    expected: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * 8)
    for record in records:
        if NOVEMBER.begin_ns <= record.arrived_ns < NOVEMBER.end_ns:
            row = dict(zip(REQUESTS.c.keys(), row_of(record), strict=True))
            names = {"day": day_of(record.arrived_ns), "key": record.key_id, "tenant": record.tenant_id, **row}
            tokens = record.tokens
            numbers = (1, record.num_pages, tokens.num_prompt_tokens, tokens.num_image_tokens, tokens.num_cached_tokens)
            sums = expected[tuple(str(names[group.value]) for group in groups)]
            for i, number in enumerate(
                (*numbers, tokens.num_completion_tokens, record.num_wasted_tokens, record.cost_nanodollars)
            ):
                sums[i] += number
    if not groups:
        expected[()] = expected[()]
    names_of_sums = [field.name for field in fields(UsageRow)][len(GroupBy) :]
    found = {
        tuple(getattr(row, group.value) for group in groups): [getattr(row, name) for name in names_of_sums]
        for row in asyncio.run(run())
    }
    assert found == expected


async def test_json_is_exact(database: Database) -> None:
    await fill(database)
    shown = json.loads(json.dumps(usage_to_json(await read(database, "tenant"))))
    assert (shown["start_time"], shown["end_time"]) == (1793491200, 1796083200)
    assert shown["group_by"] == ["tenant"]
    acme, beta = shown["data"]
    assert (acme["tenant"], acme["cost_dollars"], acme["cost_nanodollars"]) == ("acme", "0.000160000", 160_000)
    assert "model" not in acme
    assert beta["num_requests"] == 2
    assert shown["total"]["cost_dollars"] == "0.000160001"


async def test_csv_is_read_back_and_runs_nothing(database: Database) -> None:
    await fill(database)
    rows = list(csv.DictReader(io.StringIO(usage_to_csv(await read(database, "day,key")))))
    assert list(rows[0])[:3] == ["day", "key", "num_requests"]
    assert {row["key"] for row in rows} == {"key-1", "'=key"}
    assert sum(Decimal(row["cost_dollars"]) for row in rows) == Decimal("0.000160001")
    assert usage_to_csv(UsageReport(NOVEMBER, (), ())).count("\n") == 1


async def test_openais_client_understands_the_page(database: Database) -> None:
    await fill(database)
    groups = (GroupBy.DAY, *openai_groups(["model", "project_id", "model"]))
    window = Window(parse_time_ns("2026-11-22"), parse_time_ns("2026-11-25"))
    async with database.reading() as connection:
        rows = await sum_usage(connection, window, groups)
    page = usage_to_openai(UsageReport(window, groups, tuple(rows)))
    understood = UsageCompletionsResponse.model_validate(page, strict=True)
    assert [len(bucket.results) for bucket in understood.data] == [0, 2, 1]
    assert understood.data[0].end_time == understood.data[1].start_time == 1795392000
    assert (understood.has_more, understood.next_page) == (False, None)
    result = understood.data[2].results[0]
    assert isinstance(result, DataResultOrganizationUsageCompletionsResult)
    assert (result.input_tokens, result.output_tokens, result.input_cached_tokens) == (1000, 500, 100)
    assert (result.project_id, result.model, result.api_key_id, result.num_model_requests) == ("acme", "nano", None, 1)


def test_days_are_made_whole() -> None:
    day = Window(parse_time_ns("2026-11-23"), parse_time_ns("2026-11-24"))
    assert whole_days(Window(NOON_NS, NOON_NS + 1)) == day
    assert whole_days(day) == day


@pytest.mark.parametrize(("text", "reason"), [("colour", "cannot group by 'colour'"), ("day,day", "given twice")])
def test_groups_that_do_not_exist_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_groups(text)


def test_openais_groups_that_the_ledger_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot group by 'batch'"):
        openai_groups(["batch"])


def test_costs_are_shown_with_what_is_worked_out() -> None:
    lines = [CostLine("nano", "", 1, 10, 1000, 500, 2000, 100), CostLine("nano", "acme", 1, 0, 0, 500, 1900)]
    shown = costs_to_json(NOVEMBER, lines)["data"]
    assert shown[0]["margin_nanodollars"] == -1500
    assert shown[0]["per_thousand_pages_nanodollars"] == 200_000
    assert shown[1]["per_million_tokens_nanodollars"] is None
    rows = list(csv.DictReader(io.StringIO(costs_to_csv(lines))))
    assert (rows[0]["idle_nanodollars"], rows[1]["per_million_tokens_nanodollars"]) == ("100", "")
