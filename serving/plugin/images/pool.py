"""Processes that turn image files into views outside the API process's GIL, and a bounded queue for them."""

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
"""How often an idle worker is looked after, and a failed start tried again."""
_START_TIMEOUT_S = 60.0
_TRIES = 2
_CLOSED = "the server is shutting down"
_NO_WORKER = "no process that decodes pages can be started; try again later"

logger = logging.getLogger(__name__)


class PoolUnavailableError(Exception):
    """No room in the queue for as long as a page may wait, no worker, or the pool is closed: try again elsewhere."""


class PageLostError(ValueError):
    """The worker died over this page, and so did the one after it; or it took too long. The page is to blame."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A page's place in the queue. `views` fails with DecodeError or PageLostError when the page is at fault."""

    job: ViewJob
    data: bytes
    views: Future[PageViews] = field(default_factory=Future)
    begin_s: float = field(default_factory=time.monotonic)


class ImagePool:
    """As many processes as the settings say, each driven by a thread of this process.

    Thread-safe. Workers that die are replaced, and the page they had is tried once more.
    """

    def __init__(self, settings: ImagePipelineSettings) -> None:
        self._settings = settings
        self._queue: queue.Queue[Ticket | None] = queue.Queue(settings.queue)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: dict[int, WorkerProcess] = {}
        self._closed = threading.Event()
        self._owner = os.getpid()

    @property
    def pids(self) -> list[int]:
        """Of the processes that are there now."""
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    def start(self) -> None:
        """Start the processes in the background, once."""
        with self._lock:
            if self._threads or self._closed.is_set():
                return
            names = [f"serving-image-{index}" for index in range(self._settings.workers)]
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
        """Queue a page, waiting for room as long as the settings allow, counted from the ticket's making.

        Raises:
            PoolUnavailableError: there was none, or the pool is closed.
        """
        left_s = ticket.begin_s + self._settings.queue_timeout_s - time.monotonic()
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
            self._refuse_waiting(_CLOSED)  # closed meanwhile: nobody else would

    def close(self) -> None:
        """End the processes and refuse what waits. May be called again, and in a fork, where it does nothing."""
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
                self._queue.put_nowait(None)  # only to wake it
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
        """Feed one worker until the pool is closed. Runs in a thread of its own."""
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
        """Settle a ticket, whatever happens to the worker."""
        for _ in range(_TRIES):
            if self._closed.is_set():
                _refuse(ticket, _CLOSED)
                return
            try:
                worker = self._ready_worker(key)
                views, seconds = worker.run(ticket.job, ticket.data, self._settings.work_timeout_s)
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
        """Pages do not wait for workers that may never come: without a single one they are refused."""
        if self._closed.is_set():
            return
        logger.error("image worker cannot be started: %s", error)
        with self._lock:
            has_worker = any(worker.is_ready and worker.is_alive for worker in self._workers.values())
        if not has_worker:
            self._refuse_waiting(_NO_WORKER)

    def _ready_worker(self, key: int) -> WorkerProcess:
        """This thread's worker, replaced if it is dead.

        Raises:
            WorkerStartError: there is none now.
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
            worker.kill()  # `close` may have come too early to see it
        worker.wait_until_ready(_START_TIMEOUT_S)
        return worker

    def _drop_worker(self, key: int) -> None:
        with self._lock:
            worker = self._workers.pop(key, None)
        if worker is not None:
            worker.close()


def _refuse(ticket: Ticket, reason: str) -> None:
    """Fail a ticket that runs. The pool's closing is nobody's failure."""
    if reason is not _CLOSED:
        metrics.FAILURES.labels("unavailable").inc()
    ticket.views.set_exception(PoolUnavailableError(reason))
