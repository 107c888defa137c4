"""A request's money, step by step, without a router around it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from support.router_stack import MemoryJournal, build_record, build_settings, eventually

from serving.billing.quotes import TokenRange
from serving.billing.records import LostTry, Outcome, TokenCounts
from serving.cluster.directory import ReplicaRecord
from serving.errors import QuotaExceededError, RateLimitError
from serving.router.access.limits import TenantLimits
from serving.router.accounting.accounts import Accounts
from serving.router.accounting.request_account import Ending, RequestAccount, RequestContext
from serving.router.accounting.token_bounds import TokenBounds
from serving.router.request.parsing import RoutedRequest
from serving.settings.tenants import Identity, Tenant
from serving.telemetry.router_metrics import RouterMetrics

A, B = build_record("a", 1), build_record("b", 2)
BOUNDS = TokenBounds(TokenRange(10, 10), 0, 10, 1)
COUNTS = TokenCounts(num_prompt_tokens=10, num_completion_tokens=5)
FAILED = Ending(Outcome.FAILED, 502, "replica_unreachable")
PRICE = 10 * 30 + 5 * 100
"""Of these counts, in nanodollars."""
REQUEST = RoutedRequest("/v1/completions", "nano", b"{}", False, False, max_tokens=10, max_tokens_field="max_tokens")


class Bench:
    """A router's accounts, and what its replicas say that they counted."""

    def __init__(self, tenant: Tenant | None = None) -> None:
        self.journal = MemoryJournal()
        self.counted: dict[str, Mapping[str, Any]] = {}
        self.identity = Identity("acme", tenant or Tenant())
        limits, metrics = TenantLimits(time.monotonic), RouterMetrics(lambda: iter(()))
        self.accounts = Accounts(build_settings(), "router", limits, metrics, self.fetch_usage, journal=self.journal)

    async def fetch_usage(self, replica: ReplicaRecord, _request_id: str) -> dict[str, Any] | None:
        found = self.counted.get(replica.replica_id)
        return dict(found) if found is not None else None

    def open(self, request_id: str = "r") -> RequestAccount:
        context = RequestContext(request_id, "/v1/completions", self.identity, time.time_ns())
        account = RequestAccount(self.accounts, context)
        account.set_price(REQUEST)
        return account


async def test_the_row_of_a_complete_answer_is_in_the_journal_at_once_and_once() -> None:
    bench = Bench()
    account = bench.open()
    account.reserve(REQUEST, BOUNDS)
    account.queued(0.5)
    account.sent_to(A, ("base",))
    account.notes.tokens = COUNTS
    account.complete(200, 7)
    (row,) = bench.journal.records
    assert (row.outcome, row.tokens, row.cost_nanodollars, row.first_byte_ns) == (Outcome.COMPLETED, COUNTS, PRICE, 7)
    assert (row.replica_id, row.num_tries, row.modes, row.queue_wait_ns) == ("a", 1, ("base",), 5 * 10**8)
    account.finish(FAILED)
    assert bench.journal.records == [row]
    assert bench.accounts.num_settling == 0


async def test_a_request_is_noted_before_each_replica_gets_it() -> None:
    bench = Bench()
    account = bench.open()
    assert not bench.journal.opened
    for replica in (A, B):
        account.sent_to(replica, ())
    assert [(note.num_tries, note.replica_ids, note.promised) for note in bench.journal.opened] == [
        (1, ("a",), None),
        (2, ("a", "b"), None),
    ]


async def test_a_replica_that_has_not_run_a_request_is_not_asked() -> None:
    bench = Bench()
    account = bench.open()
    account.sent_to(A, ())
    account.refused()
    account.finish(FAILED)
    (row,) = bench.journal.records
    assert (row.outcome, row.tokens, row.is_estimated, row.num_tries) == (Outcome.FAILED, TokenCounts(), False, 1)


async def test_a_complete_answer_after_a_lost_try_is_promised_at_once() -> None:
    bench = Bench()
    bench.counted["a"] = {
        "prompt_tokens": 10,
        "image_tokens": 0,
        "cached_tokens": 0,
        "completion_tokens": 3,
        "is_finished": True,
    }
    account = bench.open()
    account.sent_to(A, ())
    account.sent_to(B, ())
    account.notes.tokens = COUNTS
    account.complete(200, 7)
    promise = bench.journal.opened[-1].promised
    assert promise is not None
    assert (promise.outcome, promise.tokens, promise.cost_nanodollars) == (Outcome.COMPLETED, COUNTS, PRICE)
    assert not bench.journal.records
    assert bench.accounts.num_settling == 1
    assert await eventually(lambda: bool(bench.journal.records))
    (row,) = bench.journal.records
    assert dataclasses.replace(row, lost_tries=(), num_wasted_tokens=0, ended_ns=promise.ended_ns) == promise
    assert (row.lost_tries, row.num_wasted_tokens) == ((LostTry("a", 10, 3),), 3)


async def test_what_was_reserved_is_given_back_however_a_request_ends() -> None:
    bench = Bench(Tenant(monthly_budget=Decimal("0.000002"), tokens_per_minute=20))
    for request_id in ("refused", "failed", "again"):
        account = bench.open(request_id)
        account.reserve(REQUEST, BOUNDS)
        account.reserve_tokens(20)
        with pytest.raises(RateLimitError):
            bench.open().reserve(REQUEST, BOUNDS)
        with pytest.raises(RateLimitError):
            bench.open().reserve_tokens(20)
        if request_id == "failed":
            account.sent_to(A, ())
            account.refused()
        account.finish(FAILED)
    account = bench.open("completed")
    account.reserve(REQUEST, BOUNDS)
    account.sent_to(A, ())
    account.notes.tokens = COUNTS
    account.complete(200, 7)
    with pytest.raises(QuotaExceededError):
        bench.open().reserve(REQUEST, BOUNDS)
