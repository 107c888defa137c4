from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import msgspec
import pytest
from support.billing_samples import make_record
from support.databases import MakeSettings

from serving.billing.ledger import Ledger
from serving.billing.open_requests import OpenRequest, OpenRequests, close_request, read_open_requests
from serving.billing.records import LostTry, Outcome, TokenCounts
from serving.billing.spool import count_open, open_spool
from unit.billing.test_ledger import read_ids, wait_until
from unit.billing.test_spool import die

COUNTS = TokenCounts(num_prompt_tokens=9, num_completion_tokens=4)


def make_open(request_id: str, *replica_ids: str) -> OpenRequest:
    return OpenRequest(
        request_id=request_id,
        tenant_id="t",
        key_id="k",
        model="nano",
        route="/v1/chat/completions",
        price_version="base",
        router_id="dead",
        arrived_ns=time.time_ns(),
        num_pages=1,
        priority="normal",
        is_stream=True,
        num_tries=len(replica_ids),
        replica_ids=replica_ids,
    )


def test_what_is_removed_is_gone_and_its_place_is_used_again(tmp_path: Path) -> None:
    table = OpenRequests(tmp_path / "open")
    for number in range(1000):
        table.put(make_open(f"r{number}", "a"))
        if number >= 3:
            table.remove(f"r{number - 3}")
    assert sorted(request.request_id for request in table.read()) == ["r997", "r998", "r999"]
    assert (tmp_path / "open").stat().st_size < 5 * 2048
    for number in range(997, 1000):
        table.remove(f"r{number}")
    table.close()
    assert not (tmp_path / "open").exists()


def test_another_try_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    table = OpenRequests(tmp_path / "open")
    table.put(make_open("r", "a"))
    table.put(make_open("r", "a", "b"))
    assert [request.replica_ids for request in table.read()] == [("a", "b")]
    assert len(table) == 1


def test_a_place_that_was_torn_is_passed_over(tmp_path: Path) -> None:
    table = OpenRequests(tmp_path / "open")
    table.put(make_open("r0", "a"))
    table.put(make_open("r1", "a"))
    text = bytearray((tmp_path / "open").read_bytes())
    text[20] ^= 1
    (tmp_path / "open").write_bytes(text)
    assert [request.request_id for request in read_open_requests(tmp_path / "open")] == ["r1"]
    with pytest.raises(ValueError, match="bytes"):
        table.put(make_open("x" * 3000, "a"))


async def test_a_record_has_what_all_replicas_say() -> None:
    async def ask(replica_id: str, request_id: str) -> TokenCounts | None:
        assert request_id == "r"
        return None if replica_id == "gone" else COUNTS

    record = await close_request(make_open("r", "gone", "a", "b"), ask, 7)
    assert (record.outcome, record.error_code, record.cost_nanodollars) == (Outcome.FAILED, "router_lost", 0)
    assert (record.tokens, record.replica_id, record.is_estimated) == (COUNTS, "b", False)
    assert record.lost_tries == (LostTry("a", 9, 4),)
    assert record.num_wasted_tokens == 8
    assert (await close_request(make_open("r", "gone"), ask, 7)).is_estimated


async def test_an_answer_that_may_have_left_keeps_the_record_that_was_made_for_it(tmp_path: Path) -> None:
    async def ask(replica_id: str, request_id: str) -> TokenCounts | None:
        assert replica_id == "a", "the one that answered has told already"
        return COUNTS

    promised = make_record(request_id="r", outcome=Outcome.COMPLETED, cost_nanodollars=77, num_wasted_tokens=1)
    table = OpenRequests(tmp_path / "open")
    table.put(make_open("r", "a", "b"))
    table.put(msgspec.structs.replace(make_open("r", "a"), num_tries=2, promised=promised))
    (found,) = table.read()
    record = await close_request(found, ask, 7)
    assert record == dataclasses.replace(promised, num_wasted_tokens=5, lost_tries=(LostTry("a", 9, 4),))


@pytest.mark.parametrize("is_promise_first", [True, False])
def test_a_promise_counts_also_while_its_request_is_there_twice(tmp_path: Path, is_promise_first: bool) -> None:
    """Killed between the new place and the end of the old one."""
    promised = make_record(request_id="r")
    requests = [make_open("r", "a"), msgspec.structs.replace(make_open("r", "a"), promised=promised)]
    places = []
    for request in reversed(requests) if is_promise_first else requests:
        table = OpenRequests(tmp_path / "one")
        table.put(request)
        places.append((tmp_path / "one").read_bytes().ljust(2048, b"\0"))
        table.remove("r")
        table.close()
    (tmp_path / "both").write_bytes(b"".join(places))
    assert [request.promised for request in read_open_requests(tmp_path / "both")] == [promised]


async def test_a_request_is_open_on_disk_until_it_is_recorded(make_settings: MakeSettings) -> None:
    settings = make_settings()
    ledger = Ledger(settings, "r1")
    await ledger.start()
    ledger.open(make_open("req-0", "a"))
    assert count_open(settings.directory / "spool") == 1
    ledger.record(make_record(0))
    assert count_open(settings.directory / "spool") == 0
    await ledger.close()


async def test_whoever_adopts_a_spool_closes_what_its_router_left_open(make_settings: MakeSettings) -> None:
    settings = make_settings()
    dead = open_spool(settings.directory / "spool", "dead", settings.spool)
    for name in ("recorded", "both", "open"):
        dead.open_requests.put(make_open(name, "a"))
    dead.append(make_record(request_id="recorded"))
    dead.open_requests.remove("recorded")
    dead.append(make_record(request_id="both"))  # killed after this and before it was closed
    die(dead)
    assert count_open(settings.directory / "spool") == 2
    other = Ledger(settings, "other")
    await other.start()
    await asyncio.sleep(0.3)
    assert count_open(settings.directory / "spool") == 2, "nobody knows the replicas yet"

    async def ask(_replica_id: str, _request_id: str) -> TokenCounts | None:
        return COUNTS

    other.fetch_counts = ask
    await wait_until(lambda: other.counts.num_closed == 2)
    await other.close()
    assert await read_ids(settings) == {"recorded": 1, "both": 1, "open": 1}
    assert list((settings.directory / "spool").iterdir()) == []
