from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import OperationalError
from support.billing_samples import NOON_NS, RECORDS, SAMPLE, make_record
from support.databases import MakeSettings

from serving.billing.database import Database, ReplicaLife, build_url, is_data_fault
from serving.billing.periods import month_of
from serving.billing.prices import PriceBook
from serving.billing.records import LostTry, RequestRecord
from serving.billing.schema import LOST_TRIES, METADATA, MIXED, MONTHS, PRICES, REPLICAS, REQUESTS, row_of
from serving.settings.billing import BillingSettings, PriceSettings


async def read_rows(database: Database, table: object) -> list[tuple[object, ...]]:
    async with database.reading() as connection:
        return [tuple(row) for row in await connection.execute(select(table))]  # type: ignore[call-overload]


async def test_migrations_make_the_schema_that_the_code_expects(database: Database) -> None:
    def compare(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), METADATA))

    async with database.engine.connect() as connection:
        assert await connection.run_sync(compare) == []


async def test_processes_that_migrate_at_once_do_it_once(make_settings: MakeSettings) -> None:
    databases = [Database(make_settings()) for _ in range(3)]
    await asyncio.gather(*(database.migrate() for database in databases))
    assert await databases[0].insert([SAMPLE]) == 1
    await databases[0].migrate()
    assert len(await read_rows(databases[1], REQUESTS)) == 1
    for database in databases:
        await database.close()


async def test_a_record_is_one_row_with_all_that_is_known(database: Database) -> None:
    assert await database.insert([SAMPLE]) == 1
    assert await read_rows(database, REQUESTS) == [row_of(SAMPLE)]
    assert await read_rows(database, MONTHS) == [("2026-11", "acme", "router-1", 1, 80_000)]


async def test_a_request_id_is_taken_once(database: Database) -> None:
    first = [make_record(number) for number in range(5)]
    assert await database.insert(first) == 5
    assert await database.insert([*first, make_record(5), make_record(5)]) == 1
    assert len(await read_rows(database, REQUESTS)) == 6
    assert await read_rows(database, MONTHS) == [("2026-11", "acme", "router-1", 6, 6 * 80_000)]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 511, 512, 1100])
async def test_batches_of_any_size_go_in_whole(database: Database, num_rows: int) -> None:
    assert await database.insert([make_record(number) for number in range(num_rows)]) == num_rows
    assert len(await read_rows(database, REQUESTS)) == num_rows


async def test_two_writers_of_the_same_records_count_each_once(make_settings: MakeSettings, database: Database) -> None:
    other = Database(make_settings())
    batches = [[make_record(number) for number in range(begin, begin + 40)] for begin in range(0, 400, 20)]
    for batch in batches:
        await asyncio.gather(database.insert(batch), other.insert(batch))
    await other.close()
    assert len(await read_rows(database, REQUESTS)) == 420
    assert await read_rows(database, MONTHS) == [("2026-11", "acme", "router-1", 420, 420 * 80_000)]


async def test_lost_tries_are_kept_for_new_requests_only(database: Database) -> None:
    record = make_record(lost_tries=(LostTry("nano#8", 10, 3), LostTry("nano#9", 10, 0)))
    await database.insert([record])
    await database.insert([record])
    ended_ns = record.ended_ns
    assert await read_rows(database, LOST_TRIES) == [
        ("req-0", 0, "nano#8", 10, 3, ended_ns),
        ("req-0", 1, "nano#9", 10, 0, ended_ns),
    ]


def test_the_sum_over_requests_is_the_sum_of_the_ledger(tmp_path_factory: pytest.TempPathFactory) -> None:
    @given(st.lists(RECORDS, max_size=30))
    @hypothesis.settings(max_examples=20)
    def check(records: list[RequestRecord]) -> None:
        asyncio.run(insert_and_compare(records, tmp_path_factory.mktemp("ledger")))

    check()


async def insert_and_compare(records: list[RequestRecord], directory: Path) -> None:
    database = Database(BillingSettings(directory=directory))
    await database.migrate()
    for begin in range(0, len(records), 7):
        await database.insert(records[begin : begin + 7])
    await database.insert(records)
    expected: Counter[tuple[object, ...]] = Counter()
    for record in records:
        expected[month_of(record.arrived_ns), record.tenant_id, record.router_id] += record.cost_nanodollars
    months = {(month, tenant, router): cost for month, tenant, router, _, cost in await read_rows(database, MONTHS)}
    assert months == expected
    assert sorted(await read_rows(database, REQUESTS)) == sorted(row_of(record) for record in records)
    await database.close()


async def test_prices_are_remembered_under_their_versions(database: Database) -> None:
    book = PriceBook.from_settings({"nano": PriceSettings()})
    await database.insert_prices(book.rows())
    await database.insert_prices(book.rows())
    version = book.find("nano", "", 0).version
    assert await read_rows(database, PRICES) == [("nano", "", version, 0, 30_000, 100_000, None, None)]


async def test_a_replicas_life_only_grows(database: Database) -> None:
    for started_ns, seen_ns in ((50, 60), (40, 55), (45, 90)):
        await database.see_replicas([ReplicaLife("nano#1", "nano", started_ns, seen_ns, 7)])
    await database.see_replicas([])
    assert await read_rows(database, REPLICAS) == [("nano#1", "nano", 40, 90, 7)]


@pytest.mark.parametrize(
    ("modes", "mode", "text"), [((), "", ""), (("tiny",), "tiny", "tiny"), (("tiny", "base"), MIXED, "tiny,base")]
)
def test_a_request_has_one_mode_or_is_mixed(modes: tuple[str, ...], mode: str, text: str) -> None:
    row = dict(zip(REQUESTS.c.keys(), row_of(make_record(modes=modes)), strict=True))
    assert (row["mode"], row["modes"]) == (mode, text)


@pytest.mark.parametrize(
    "record",
    [make_record(1, num_pages=2**63), make_record(1, arrived_ns=NOON_NS, status=-(2**64))],
    ids=["large", "small"],
)
async def test_what_the_database_refuses_is_told_from_what_it_cannot_do_now(
    database: Database, record: RequestRecord
) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        await database.insert([make_record(0), record])
    assert is_data_fault(caught.value)
    assert await read_rows(database, REQUESTS) == []
    with pytest.raises(Exception, match=r".") as caught:
        async with database.engine.begin() as connection:
            await connection.execute(text("SELECT * FROM nothing"))
    assert not is_data_fault(caught.value)


async def test_a_zero_byte_is_refused_by_postgresql_only(database: Database) -> None:
    record = make_record(tenant_id="a\0b")
    if database.is_sqlite:
        assert await database.insert([record]) == 1
        return
    with pytest.raises(Exception, match="0x00") as caught:
        await database.insert([record])
    assert is_data_fault(caught.value)


async def test_a_read_sees_one_state(database: Database) -> None:
    async with database.reading() as connection:
        count = text("SELECT count(*) FROM requests")
        assert (await connection.execute(count)).scalar() == 0
        await database.insert([SAMPLE])
        assert (await connection.execute(count)).scalar() == 0


async def test_a_database_that_is_not_there_is_told(tmp_path: Path) -> None:
    url = SecretStr("postgresql://nobody@127.0.0.1:1/none")
    database = Database(BillingSettings(directory=tmp_path, database_url=url, write_timeout_s=5))
    with pytest.raises((OSError, OperationalError)):
        await database.insert([SAMPLE])
    await database.close()


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("sqlite:////data/x.db", "sqlite+aiosqlite:////data/x.db"),
        ("postgres://u:p@h:1/d", "postgresql+asyncpg://u:p@h:1/d"),
        ("postgresql://u:p@h/d?ssl=require", "postgresql+asyncpg://u:p@h/d?ssl=require"),
    ],
)
def test_addresses_get_the_driver(given_url: str, url: str) -> None:
    settings = BillingSettings(database_url=SecretStr(given_url))
    assert build_url(settings).render_as_string(hide_password=False) == url


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValidationError, match="must begin with one of"):
        BillingSettings(database_url=SecretStr("mysql://x/y"))
