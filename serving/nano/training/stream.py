"""Batches for training, rendered on the way in a thread of their own."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from serving.nano.config import NanoConfig
from serving.nano.pages import sample_page
from serving.nano.training.batches import Batch
from serving.nano.training.plan import Clock, Plan, View, training_spec, view_of, view_spec

_GROUP = 8
"""Batches rendered together and sorted by length, so that little is padded."""
_VIEW_PAGES = 100_000_000
"""Pages of other views are numbered from here, apart from those of the native size."""


def render_group(plan: Plan, group: int, progress: float, sizes: NanoConfig) -> list[Batch]:
    """Return the batches of a group, in an order shuffled by its number."""
    first = group * _GROUP * plan.batch_pages
    indices = range(first, first + _GROUP * plan.batch_pages)
    pages = [sample_page(training_spec(i, plan, progress), "train", plan.seed, i) for i in indices]
    pages.sort(key=lambda page: len(page.text))
    batches = [pages[i : i + plan.batch_pages] for i in range(0, len(pages), plan.batch_pages)]
    order = torch.randperm(_GROUP, generator=torch.Generator().manual_seed(group)).tolist()
    steps = range(group * _GROUP, (group + 1) * _GROUP)
    views = [view_of(step, plan) for step in steps]
    return [
        render_view(plan, view, step, sizes) if view else Batch.from_pages(batches[i], sizes)
        for i, view, step in zip(order, views, steps, strict=True)
    ]


def render_view(plan: Plan, view: View, step: int, sizes: NanoConfig) -> Batch:
    """Return the batch of a step that is not at the native size."""
    indices = range(_VIEW_PAGES + step * view.pages, _VIEW_PAGES + (step + 1) * view.pages)
    pages = [sample_page(view_spec(index, plan), "train", plan.seed, index) for index in indices]
    return Batch.from_pages(pages, sizes, view.side_px)


class BatchStream:
    """Hands out batches by step number and renders the next group in a thread meanwhile."""

    def __init__(self, plan: Plan, sizes: NanoConfig, clock: Clock) -> None:
        self._plan, self._sizes, self._clock = plan, sizes, clock
        self._pool = ThreadPoolExecutor(1)
        self._pending: dict[int, Future[list[Batch]]] = {}

    def _request(self, group: int) -> Future[list[Batch]]:
        if group not in self._pending:
            progress = self._clock.progress
            self._pending[group] = self._pool.submit(render_group, self._plan, group, progress, self._sizes)
        return self._pending[group]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        group, index = divmod(step, _GROUP)
        current = self._request(group)
        self._request(group + 1)
        for old in [number for number in self._pending if number < group]:
            del self._pending[old]
        return current.result()[index]

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)
