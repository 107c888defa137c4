"""Creates the views of pages in the API process: with the pool of workers if there is one, else in the caller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from PIL import Image
from vllm.exceptions import RetryableRequestError

from serving.plugin.images.encoded_page import EncodedPage
from serving.plugin.images.page_views import PageViews, build_views
from serving.plugin.images.picture import Colour
from serving.plugin.images.pool import ImagePool, PoolUnavailableError, Ticket
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.images.worker_messages import ViewJob
from serving.plugin.interfaces import metrics
from serving.plugin.modes.resolution import ResolutionMode
from serving.plugin.modes.selection import ChosenMode


class ImagePipeline:
    """Creates the views of requests' pages. Thread-safe."""

    def __init__(self, settings: ImagePipelineSettings, pool: ImagePool | None = None) -> None:
        """Create the pipeline.

        Args:
            settings: the settings of the workers.
            pool: the workers; None creates them according to the settings.
        """
        self.settings = settings
        self._pool = ImagePool(settings) if pool is None and settings.workers else pool
        # One thread suffices to wait for room in the queue: later pages would not get room earlier.
        self._admission = ThreadPoolExecutor(1, "serving-image-admission")

    @property
    def has_workers(self) -> bool:
        return self._pool is not None

    def start(self) -> None:
        """Start the workers, if any, in the background."""
        if self._pool is not None:
            self._pool.start()

    def close(self) -> None:
        """End the workers. Queued pages fail."""
        self._admission.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    async def prepare(self, pages: Sequence[EncodedPage], chosen: Sequence[ChosenMode], padding: Colour) -> None:
        """Have the workers create the views of these pages concurrently, so that `views` finds them ready.

        Raises:
            ValueError: a page is damaged.
            RetryableRequestError: no worker was available for a page (vLLM answers 503).
        """
        if self._pool is None:
            return
        loop = asyncio.get_running_loop()
        with _as_retryable():
            for page, choice in zip(pages, chosen, strict=True):
                ticket = _ticket(page, choice.mode, padding)
                page.order = (choice.mode, ticket.views)
                if not self._pool.offer(ticket):
                    await loop.run_in_executor(self._admission, self._pool.put, ticket)
            orders = [page.order[1] for page in pages if page.order is not None]
            await asyncio.gather(*map(asyncio.wrap_future, orders))

    def views(self, pages: Sequence[Image.Image], chosen: Sequence[ChosenMode], padding: Colour) -> list[PageViews]:
        """Return the views of these pages, waiting for those that workers are creating.

        Raises:
            ValueError: a page is damaged.
            RetryableRequestError: no worker was available for a page (vLLM answers 503).
        """
        with _as_retryable():
            for page, choice in zip(pages, chosen, strict=True):
                if isinstance(page, EncodedPage) and self._pool is not None and not _is_ordered(page, choice.mode):
                    ticket = _ticket(page, choice.mode, padding)
                    self._pool.put(ticket)
                    page.order = (choice.mode, ticket.views)
            views = [self._views_of(page, choice.mode, padding) for page, choice in zip(pages, chosen, strict=True)]
        for choice in chosen:
            metrics.PAGES.labels(choice.name).inc()
        return views

    def _views_of(self, page: Image.Image, mode: ResolutionMode, padding: Colour) -> PageViews:
        if isinstance(page, EncodedPage) and page.order is not None and page.order[0] == mode:
            views = page.order[1].result()
            page.order = None
            return views
        with metrics.WORK_SECONDS.time():
            source = page.decoded() if isinstance(page, EncodedPage) else page
            return build_views(source, mode, padding)


def _is_ordered(page: EncodedPage, mode: ResolutionMode) -> bool:
    return page.order is not None and page.order[0] == mode


def _ticket(page: EncodedPage, mode: ResolutionMode, padding: Colour) -> Ticket:
    job = ViewJob(page.size, mode, padding, page.background, page.formats)
    return Ticket(job, page.data)


@contextlib.contextmanager
def _as_retryable() -> Iterator[None]:
    try:
        yield
    except PoolUnavailableError as error:
        raise RetryableRequestError(f"{error}.") from error


@cache
def image_pipeline() -> ImagePipeline:
    """Return this process's pipeline, configured by the environment. Does not start it.

    Raises:
        ValueError: an environment variable is invalid.
    """
    return ImagePipeline(ImagePipelineSettings.from_environ())
