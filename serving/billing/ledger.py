"""The ledger of one router: records go to the spool immediately and to the database in batches, each exactly once.

A request only waits for `record`: one encoding and one `write`. `check_room` precedes everything that costs anything,
so that every request that has begun can be recorded. One task moves records from the spool to the database, in order,
whenever it is available; another makes the spool survive a loss of power. A slow or unavailable database shows in
`depth`, `lag_s` and `is_alarming`, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving.billing.database import Database, ReplicaLife
from serving.billing.journal_frames import clean_record
from serving.billing.journal_room import JournalRoom
from serving.billing.open_requests import FetchCounts, OpenRequest, close_request
from serving.billing.prices import PriceBook
from serving.billing.queries import sum_month_by_tenant
from serving.billing.records import RequestRecord
from serving.billing.row_writer import LedgerCounts, RowWriter, describe
from serving.billing.spool import Spool, adopt_spool, open_spool, sync_and_close
from serving.settings.billing import BillingSettings

logger = logging.getLogger(__name__)

_MARK_EVERY = 64
_FIRST_PAUSE_S = 0.25
_LAST_PAUSE_S = 10.0
_ALARM_EVERY_S = 60.0
_FLUSH_POLL_S = 0.01
_SEE_REPLICAS_S = 10.0
_LOOK_S = 10.0
_REST_S = 1.0  # by then a dead router's last requests have reached their replicas


class Ledger:
    """Use it from a single event loop, between `start` and `close`.

    `router_id` identifies this router process: no other process may have the same, not even a restarted router.
    """

    def __init__(
        self,
        settings: BillingSettings,
        router_id: str,
        prices: PriceBook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.router_id = router_id
        self.database = Database(settings)
        self.counts = LedgerCounts()
        self._writer = RowWriter(self.database, settings, self.counts)
        self.is_database_up = False
        """Whether the last use of the database succeeded."""
        self.fetch_counts: FetchCounts | None = None
        """Set as soon as the replicas are known; requests that dead routers left open wait until then."""
        self._prices = prices
        self._clock = clock
        self._room = JournalRoom(settings)
        self._looked_s = -_LOOK_S
        self._spool: Spool | None = None
        self._memory: deque[RequestRecord] = deque()
        self._num_uncommitted = 0
        self._num_done = 0
        self._marks: deque[tuple[int, int]] = deque()
        self._replicas: dict[str, ReplicaLife] = {}
        self._replicas_saved_s = -_SEE_REPLICAS_S
        self._adopted_s = -settings.spool.adopt_s
        self._alarmed_s = -_ALARM_EVERY_S
        self._is_prepared = False
        self._is_flushing = False
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def depth(self) -> int:
        """Records of this router process that are not in the database yet."""
        return self._num_uncommitted

    @property
    def lag_s(self) -> float:
        """How long the oldest of them has waited, in seconds; 0 if there are none."""
        return max(0.0, (time.time_ns() - self._marks[0][1]) / 1e9) if self._num_uncommitted and self._marks else 0.0

    @property
    def size_bytes(self) -> int:
        """Bytes in the spool on disk that wait for the database."""
        return self._spool.size_bytes if self._spool is not None else 0

    @property
    def is_alarming(self) -> bool:
        """Whether an operator has to intervene: too much is waiting, or the disk refuses writes."""
        return bool(self._memory) or self.size_bytes >= self.settings.spool.alarm_bytes

    @property
    def used_ratio(self) -> float:
        """Used part of the journals' room; from 1 on `check_room` refuses all requests."""
        return self._room.used_ratio(self.size_bytes)

    def check_room(self, tenant_id: str, *, is_one_of_many: bool) -> None:
        """Check that a request may begin, since its record will have to be written.

        Raises:
            RateLimitError: the tenant's waiting rows take up its whole share.
            OverloadedError: the journals have reached their maximum size, or the disk refuses writes.
        """
        self._room.check(tenant_id, self.size_bytes, is_one_of_many=is_one_of_many)

    async def start(self) -> None:
        """Open the spool and begin; the database need not be available.

        Raises:
            OSError: the spool's directory cannot be used.
        """
        self._spool = open_spool(self._root, self.router_id, self.settings.spool)
        await asyncio.to_thread(self._room.look, self._spool.directory)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._sync())]

    def open(self, request: OpenRequest) -> None:
        """A replica gets the request next; `record` will close it, or the router that adopts this spool. Never
        fails."""
        assert self._spool is not None, "the ledger was not started"
        try:
            self._spool.open_requests.put(request)
        except (OSError, ValueError) as error:
            self._room.is_disk_failing |= isinstance(error, OSError)
            logger.warning("%s would leave no trace if this router died now: %s", request.request_id, error)

    def record(self, record: RequestRecord) -> None:
        """Record a request, once. Never waits for the database, never fails.

        The record survives the death of this process as soon as this returns.
        """
        assert self._spool is not None, "the ledger was not started"
        self.counts.num_recorded += 1
        try:
            self._spool.append(record)
        except (OSError, ValueError) as error:
            self._spool_otherwise(record, error)
        self._room.add(record.tenant_id)
        with contextlib.suppress(OSError):
            self._spool.open_requests.remove(record.request_id)
        if self.counts.num_recorded % _MARK_EVERY == 1 or not self._num_uncommitted:
            self._marks.append((self.counts.num_recorded, time.time_ns()))
        self._num_uncommitted += 1
        if self._num_uncommitted >= self.settings.batch_rows:
            self._wake.set()

    def see_replicas(self, lives: Iterable[ReplicaLife]) -> None:
        """Note the replicas that exist now; written to the database from time to time, for reports of the stack's
        costs."""
        rates = self.settings.replica_hour_dollars
        for life in lives:
            rate = int(rates[life.model].scaleb(9)) if life.model in rates else life.nanodollars_per_hour
            known = self._replicas.get(life.replica_id)
            started_ns = min(life.started_ns, known.started_ns) if known else life.started_ns
            self._replicas[life.replica_id] = replace(life, started_ns=started_ns, nanodollars_per_hour=rate)

    async def read_month(self, month: str) -> Mapping[str, int]:
        """What tenants have spent in a month through other routers, in nanodollars: for `Budgets.refresh`."""
        async with self.database.reading() as connection:
            return await sum_month_by_tenant(connection, month, except_router_id=self.router_id)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything recorded so far is in the database; returns whether it is."""
        self._is_flushing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._num_uncommitted or not self._is_prepared:
                    self._wake.set()
                    await asyncio.sleep(_FLUSH_POLL_S)
        self._is_flushing = False
        return self._is_prepared and not self._num_uncommitted

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left to the database if that is possible in time; otherwise the spool keeps it."""
        if self._spool is None:
            await self.database.close()
            return
        await self.flush(timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._respool()
        self.counts.num_lost += len(self._memory)
        for record in self._memory:
            logger.critical("a record is lost with the memory it was in: %s", describe(record))
        sync_and_close(self._spool.take_unsynced())
        self._spool.close()
        self._spool = None
        await self.database.close()

    @property
    def _root(self) -> Path:
        return self.settings.directory / "spool"

    def _spool_otherwise(self, record: RequestRecord, error: Exception) -> None:
        """Handle a record that the spool refused: clean it if it was at fault, otherwise keep it in memory."""
        assert self._spool is not None
        if isinstance(error, ValueError):
            with contextlib.suppress(OSError, ValueError):
                self._spool.append(clean_record(record))
                return
        else:
            self._room.is_disk_failing = True  # so no more requests are admitted, and memory holds those in flight
        self.counts.num_unspooled += 1
        self._memory.append(record)

    def _respool(self) -> None:
        """Move records from memory to the disk as soon as it accepts writes again."""
        assert self._spool is not None
        for _ in range(len(self._memory)):
            try:
                self._spool.append(self._memory[0])
            except OSError:
                return
            except ValueError:  # no journal will ever accept it, the database may
                self._memory.rotate(-1)
            else:
                self._memory.popleft()
        self._room.is_disk_failing = False

    async def _sync(self) -> None:
        """Keep syncing the spool, so that it survives a loss of power."""
        while True:
            await asyncio.sleep(self.settings.spool.fsync_ms / 1000)
            try:
                fds = self._spool.take_unsynced() if self._spool is not None else ()
                if fds:
                    await asyncio.to_thread(sync_and_close, fds)
            except OSError:
                logger.exception("the spool cannot be synced")

    async def _run(self) -> None:
        """Keep moving records to the database."""
        pause_s, is_due = _FIRST_PAUSE_S, True
        while True:
            try:
                await self._work(is_due)
            except Exception as error:  # noqa: BLE001 - drivers have their own exception trees, and none may end this task
                self.is_database_up = False
                self.counts.num_failures += 1
                logger.warning("the ledger's database fails, next try in %g s: %r", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            else:
                self.is_database_up = True
                pause_s = _FIRST_PAUSE_S
                is_due = await self._wait_for_a_batch()
            await self._look()
            self._alarm()

    async def _look(self) -> None:
        """Measure the room: whether the disk accepts writes again, and the size of the other journals."""
        if self._spool is None:
            return
        self._respool()
        now_s = self._clock()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        try:
            await asyncio.to_thread(self._room.look, self._spool.directory)
        except OSError as error:
            logger.warning("the journals cannot be counted: %s", error)

    async def _wait_for_a_batch(self) -> bool:
        """Wait until there are enough records for a batch (False), or they have waited long enough (True)."""
        self._wake.clear()
        try:
            async with asyncio.timeout(self.settings.flush_s):
                await self._wake.wait()
        except TimeoutError:
            return True
        return self._is_flushing

    async def _work(self, is_due: bool) -> None:
        await self._prepare()
        await self._drain_own(1 if is_due else self.settings.batch_rows)
        while self._memory:
            records = [self._memory[i] for i in range(min(len(self._memory), self.settings.batch_rows))]
            await self._writer.write(records)
            for _ in records:
                self._memory.popleft()
            self._mark_done(records)
        now_s = self._clock()
        if self._replicas and now_s - self._replicas_saved_s >= _SEE_REPLICAS_S:
            await self.database.see_replicas(self._replicas.values())
            self._replicas_saved_s = now_s
            self._replicas.clear()
        if now_s - self._adopted_s >= self.settings.spool.adopt_s and await self._adopt():
            self._adopted_s = now_s

    async def _prepare(self) -> None:
        if self._is_prepared:
            return
        if self.settings.migrate_on_start:
            await self.database.migrate()
        if self._prices is not None:
            await self.database.insert_prices(self._prices.rows())
        self._is_prepared = True

    async def _drain_own(self, min_records: int) -> None:
        """Write this router's records to the database while there are at least so many: each batch costs a
        transaction."""
        while self._spool is not None and self._num_uncommitted >= min_records:
            records = self._spool.read(self.settings.batch_rows)
            if not records:  # the rest is in memory
                return
            await self._writer.write(records)
            self._spool.commit()
            self._mark_done(records)

    async def _adopt(self) -> bool:
        """Write the spools of dead routers to the database; False if some must wait.

        This router's own records take precedence, between any two batches.
        """
        left: list[Path] = []
        while (orphan := adopt_spool(self._root, self.settings.spool, left)) is not None:
            logger.warning("adopting %s with %d bytes of a router that is gone", orphan.directory, orphan.size_bytes)
            try:
                while records := orphan.read(self.settings.batch_rows):
                    await self._writer.write(records)
                    orphan.commit()
                    await self._drain_own(self.settings.batch_rows)
                if not await self._close_requests(orphan):
                    left.append(orphan.directory)
            finally:
                orphan.close()
        return not left

    async def _close_requests(self, orphan: Spool) -> bool:
        """Make records of the requests that a dead router left open; False while the replicas are unknown.

        If a request's record was written before the router could close it, it is in the database by now and stays
        unchanged.
        """
        if not orphan.open_requests.has_left_over:
            return True
        if self.fetch_counts is None:
            return False
        await asyncio.sleep(_REST_S)
        requests, ask, now_ns = orphan.open_requests.read(), self.fetch_counts, time.time_ns()
        records = await asyncio.gather(*(close_request(request, ask, now_ns) for request in requests))
        for begin in range(0, len(records), self.settings.batch_rows):
            await self._writer.write(records[begin : begin + self.settings.batch_rows])
        self.counts.num_closed += len(records)
        orphan.open_requests.forget()
        return True

    def _mark_done(self, records: Sequence[RequestRecord]) -> None:
        self._room.remove(records)
        self._num_done += len(records)
        self._num_uncommitted -= len(records)
        # The mark that applies is the last one at or before the oldest remaining record.
        while len(self._marks) > 1 and self._marks[1][0] <= self._num_done + 1:
            self._marks.popleft()
        if not self._num_uncommitted:
            self._marks.clear()

    def _alarm(self) -> None:
        now_s = self._clock()
        if self.is_alarming and now_s - self._alarmed_s >= _ALARM_EVERY_S:
            self._alarmed_s = now_s
            logger.error(
                "the ledger is behind: %d records, %d bytes, %d of them in memory only, the oldest of %.0f s ago",
                *(self.depth, self.size_bytes, len(self._memory), self.lag_s),
            )
