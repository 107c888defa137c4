"""A pool of processes that decode and tile images outside the API process's GIL, with a bounded queue."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from serving.plugin.images.decoding import DecodeError
from serving.plugin.images.page_views import PageViews
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.images.worker_messages import ViewJob
from serving.plugin.images.worker_process import WorkerHungError, WorkerLostError, WorkerProcess, WorkerStartError
from serving.plugin.interfaces import metrics

_IDLE_CHECK_S = 1.0
"""How often an idle worker is checked, and a failed start retried."""
_START_TIMEOUT_S = 60.0
_TRIES = 2
_CLOSED = "the server is shutting down"
_NO_WORKER = "no process that decodes pages can be started; try again later"

logger = logging.getLogger(__name__)


class PoolUnavailableError(Exception):
    """The queue had no room within the time limit, there is no worker, or the pool is closed. Retry elsewhere."""


class PageLostError(ValueError):
    """Two workers in a row died while processing this page, or one took too long. The page is the cause."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A page in the queue. `views` fails with DecodeError or PageLostError if the page is the cause."""

    job: ViewJob
    data: bytes
    views: Future[PageViews] = field(default_factory=Future)
    begin_s: float = field(default_factory=time.monotonic)


class ImagePool:
    """The configured number of worker processes, each driven by a thread of this process.

    Thread-safe. A worker that dies is replaced, and its page is retried once.
    """

    def __init__(self, settings: ImagePipelineSettings) -> None:
        self.settings = settings
        self._queue: queue.Queue[Ticket | None] = queue.Queue(settings.queue)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: dict[int, WorkerProcess] = {}
        self._closed = threading.Event()
        self._owner = os.getpid()

    @property
    def pids(self) -> list[int]:
        """Process ids of the current workers."""
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    @property
    def num_ready(self) -> int:
        """How many workers can take pages."""
        with self._lock:
            return sum(worker.is_ready and worker.is_alive for worker in self._workers.values())

    def start(self) -> None:
        """Start the processes in the background, once."""
        with self._lock:
            if self._threads or self._closed.is_set():
                return
            names = [f"serving-image-{index}" for index in range(self.settings.workers)]
            self._threads = [threading.Thread(target=self._drive, name=name, daemon=True) for name in names]
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def offer(self, ticket: Ticket) -> bool:
        """Queue a page if there is room. Never blocks.

        Raises:
            PoolUnavailableError: the pool is closed.
        """
        try:
            self._put(ticket, 0.0)
        except queue.Full:
            return False
        return True

    def put(self, ticket: Ticket) -> None:
        """Queue a page, waiting for room as long as the settings allow, counted from the ticket's creation.

        Raises:
            PoolUnavailableError: there was no room, or the pool is closed.
        """
        left_s = ticket.begin_s + self.settings.queue_timeout_s - time.monotonic()
        try:
            self._put(ticket, max(0.0, left_s))
        except queue.Full:
            metrics.FAILURES.labels("full").inc()
            raise PoolUnavailableError("too many pages are waiting to be decoded; try again later") from None

    def _put(self, ticket: Ticket, timeout_s: float) -> None:
        self.start()
        if self._closed.is_set():
            raise PoolUnavailableError(_CLOSED)
        self._queue.put(ticket, block=timeout_s > 0, timeout=timeout_s or None)
        metrics.QUEUE_PAGES.inc()
        if self._closed.is_set():
            self._refuse_waiting(_CLOSED)  # the pool was closed meanwhile, and no thread will settle it

    def close(self) -> None:
        """End the processes and refuse queued pages. May be called again; does nothing in a forked process."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.close)
        self._closed.set()
        self._refuse_waiting(_CLOSED)
        with self._lock:
            workers, threads = list(self._workers.values()), self._threads
        for worker in workers:
            worker.kill()
        for _ in threads:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)  # only wakes the thread
        for thread in threads:
            thread.join()

    def _refuse_waiting(self, reason: str) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                ticket = self._queue.get_nowait()
                if ticket is not None:
                    metrics.QUEUE_PAGES.dec()
                    if ticket.views.set_running_or_notify_cancel():
                        _refuse(ticket, reason)

    def _drive(self) -> None:
        """Give pages to one worker until the pool is closed. Runs in a thread of its own."""
        key = threading.get_ident()
        while not self._closed.is_set():
            try:
                self._ready_worker(key)
            except WorkerStartError as error:
                self._note_failed_start(error)
                self._closed.wait(_IDLE_CHECK_S)
                continue
            try:
                ticket = self._queue.get(timeout=_IDLE_CHECK_S)
            except queue.Empty:
                continue
            if ticket is None:
                break
            metrics.QUEUE_PAGES.dec()
            if ticket.views.set_running_or_notify_cancel():
                metrics.QUEUE_SECONDS.observe(time.monotonic() - ticket.begin_s)
                self._work(key, ticket)
        self._drop_worker(key)

    def _work(self, key: int, ticket: Ticket) -> None:
        """Process a ticket and settle it, whatever happens to the worker."""
        for _ in range(_TRIES):
            if self._closed.is_set():
                _refuse(ticket, _CLOSED)
                return
            try:
                worker = self._ready_worker(key)
                views, seconds = worker.run(ticket.job, ticket.data, self.settings.work_timeout_s)
            except DecodeError as error:
                metrics.FAILURES.labels("invalid").inc()
                ticket.views.set_exception(error)
                return
            except WorkerStartError as error:
                self._note_failed_start(error)
                _refuse(ticket, _CLOSED if self._closed.is_set() else _NO_WORKER)
                return
            except WorkerHungError:
                break
            except WorkerLostError:
                continue
            metrics.WORK_SECONDS.observe(seconds)
            ticket.views.set_result(views)
            return
        metrics.FAILURES.labels("lost").inc()
        ticket.views.set_exception(PageLostError("Failed to load image: it could not be processed"))

    def _note_failed_start(self, error: WorkerStartError) -> None:
        """Refuse queued pages if there is no worker at all: one may never start."""
        if self._closed.is_set():
            return
        logger.error("image worker cannot be started: %s", error)
        if not self.num_ready:
            self._refuse_waiting(_NO_WORKER)

    def _ready_worker(self, key: int) -> WorkerProcess:
        """Return this thread's worker, replacing a dead one.

        Raises:
            WorkerStartError: no worker can be started now.
        """
        with self._lock:
            worker = self._workers.get(key)
        if worker is not None and worker.is_alive:
            return worker
        if worker is not None:
            metrics.WORKER_RESTARTS.inc()
            self._drop_worker(key)
        worker = WorkerProcess()
        with self._lock:
            self._workers[key] = worker
        if self._closed.is_set():
            worker.kill()  # `close` may have run before this worker was registered
        worker.wait_until_ready(_START_TIMEOUT_S)
        return worker

    def _drop_worker(self, key: int) -> None:
        with self._lock:
            worker = self._workers.pop(key, None)
        if worker is not None:
            worker.close()


def _refuse(ticket: Ticket, reason: str) -> None:
    """Fail a ticket in progress. Closing the pool does not count as a failure."""
    if reason is not _CLOSED:
        metrics.FAILURES.labels("unavailable").inc()
    ticket.views.set_exception(PoolUnavailableError(reason))
