"""The ledger of one router: records go to the spool at once and to the database in batches, each exactly once.

`record` is all that a request waits for: one encoding and one `write`. `check_room` comes before everything that costs
something: a request that has begun is recorded. A task takes records from the spool to the
database, in the order they came, whenever it is there; another makes the spool survive a loss of power. A database that
is slow or away is seen in `depth`, `lag_s` and `is_alarming`, and nowhere else.
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
_REST_S = 1.0  # what a dead router has sent is with its replica by then


class Ledger:
    """Use `start`, `record` and `close` from one event loop.

    `router_id` names this life of the router: it must differ from that of any other life and router.
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
        """Whether the last thing that was asked of the database succeeded."""
        self.fetch_counts: FetchCounts | None = None
        """Set as soon as it is known which replicas there are; what dead routers left open waits until then."""
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
        """Records of this router that are not in the database yet, without those of an earlier life."""
        return self._num_uncommitted

    @property
    def lag_s(self) -> float:
        """How long the oldest of them has waited, in seconds; 0 when there are none."""
        return max(0.0, (time.time_ns() - self._marks[0][1]) / 1e9) if self._num_uncommitted and self._marks else 0.0

    @property
    def size_bytes(self) -> int:
        """Size of the spool on disk that waits for the database."""
        return self._spool.size_bytes if self._spool is not None else 0

    @property
    def is_alarming(self) -> bool:
        """Whether so much waits, or so little can be written, that somebody must look."""
        return bool(self._memory) or self.size_bytes >= self.settings.spool.alarm_bytes

    @property
    def used_ratio(self) -> float:
        """Part of the journals' room that is used; from 1 on `check_room` refuses everybody."""
        return self._room.used_ratio(self.size_bytes)

    def check_room(self, tenant_id: str, *, is_one_of_many: bool) -> None:
        """Whether a request may begin, whose record must be written in the end.

        Raises:
            RateLimitError: what waits for the database is the tenant's share of it.
            OverloadedError: the journals are as large as they may be, or the disk takes no more.
        """
        self._room.check(tenant_id, self.size_bytes, is_one_of_many=is_one_of_many)

    async def start(self) -> None:
        """Take the spool and begin; the database need not be there.

        Raises:
            OSError: the spool's directory cannot be used.
        """
        self._spool = open_spool(self._root, self.router_id, self.settings.spool)
        await asyncio.to_thread(self._room.look, self._spool.directory)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._sync())]

    def open(self, request: OpenRequest) -> None:
        """A request goes to a replica now; `record` will close it, or whoever adopts these books. Never fails."""
        assert self._spool is not None, "the ledger was not started"
        try:
            self._spool.open_requests.put(request)
        except (OSError, ValueError) as error:
            self._room.is_disk_failing |= isinstance(error, OSError)
            logger.warning("%s would leave no trace if this router died now: %s", request.request_id, error)

    def record(self, record: RequestRecord) -> None:
        """Take one request into the books. Never waits for the database, never fails; once per request.

        It survives the death of this process from the return on.
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
        """Tell which replicas are there now; written to the database now and then, for what the stack costs."""
        rates = self.settings.replica_hour_dollars
        for life in lives:
            rate = int(rates[life.model].scaleb(9)) if life.model in rates else life.nanodollars_per_hour
            known = self._replicas.get(life.replica_id)
            started_ns = min(life.started_ns, known.started_ns) if known else life.started_ns
            self._replicas[life.replica_id] = replace(life, started_ns=started_ns, nanodollars_per_hour=rate)

    async def read_month(self, month: str) -> Mapping[str, int]:
        """What tenants have spent in a month by way of other routers, in nanodollars: for `Budgets.refresh`."""
        async with self.database.reading() as connection:
            return await sum_month_by_tenant(connection, month, except_router_id=self.router_id)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything recorded so far is in the database; says whether it is."""
        self._is_flushing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._num_uncommitted or not self._is_prepared:
                    self._wake.set()
                    await asyncio.sleep(_FLUSH_POLL_S)
        self._is_flushing = False
        return self._is_prepared and not self._num_uncommitted

    async def close(self, timeout_s: float = 5.0) -> None:
        """Bring what is left to the database if it can be had in time; the spool keeps it otherwise."""
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
        """What the spool did not take: mended if it was the record's fault, else kept in memory."""
        assert self._spool is not None
        if isinstance(error, ValueError):
            with contextlib.suppress(OSError, ValueError):
                self._spool.append(clean_record(record))
                return
        else:
            self._room.is_disk_failing = True  # so no more requests are begun, and memory holds those under way
        self.counts.num_unspooled += 1
        self._memory.append(record)

    def _respool(self) -> None:
        """Records go from memory to the disk as soon as it takes them."""
        assert self._spool is not None
        for _ in range(len(self._memory)):
            try:
                self._spool.append(self._memory[0])
            except OSError:
                return
            except ValueError:  # no journal will ever hold it, the database may
                self._memory.rotate(-1)
            else:
                self._memory.popleft()
        self._room.is_disk_failing = False

    async def _sync(self) -> None:
        """Make the spool survive a loss of power, again and again."""
        while True:
            await asyncio.sleep(self.settings.spool.fsync_ms / 1000)
            try:
                fds = self._spool.take_unsynced() if self._spool is not None else ()
                if fds:
                    await asyncio.to_thread(sync_and_close, fds)
            except OSError:
                logger.exception("the spool cannot be synced")

    async def _run(self) -> None:
        """Bring records to the database as long as this process lives."""
        pause_s, is_due = _FIRST_PAUSE_S, True
        while True:
            try:
                await self._work(is_due)
            except Exception as error:  # noqa: BLE001 - drivers have trees of their own, and none may end this task
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
        """See how much room there is: what the disk takes again, and what lies beside one's own journal."""
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
        """Until there are enough records for one (False), or they have waited long enough (True)."""
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
        """Bring one's own records to the database while there are so many: each batch costs a transaction."""
        while self._spool is not None and self._num_uncommitted >= min_records:
            records = self._spool.read(self.settings.batch_rows)
            if not records:  # what is left is in memory
                return
            await self._writer.write(records)
            self._spool.commit()
            self._mark_done(records)

    async def _adopt(self) -> bool:
        """Read spools of routers that have died to their end; False when some must wait.

        One's own records go first, between any two batches.
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
        """Make records of what a dead router left open; False while it is not known which replicas there are.

        One whose record was written before the router could say so is in the database by now, and stays as it is.
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
        # The mark in force is the last one at or before the oldest record that is left.
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
