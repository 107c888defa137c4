"""Continuous batching without a model: running and queued sequences, the time of the next token, and usage."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from serving.settings.stack import ScriptSettings

_STEP_S = 0.01
"""How often the progress of an answer that is not streamed is updated."""
_KEPT = 10_000
"""How many requests' usage is kept."""


@dataclass(slots=True)
class RequestUsage:
    """The usage of one request so far."""

    request_id: str
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    """`stop`, `length`, `abort` (the client disconnected, or a failure happened), `error`; None while it runs."""
    is_finished: bool = False


class UsageLog:
    """The usage of the latest requests with an id. Requests with the same id add up, since the engine ran all of
    them."""

    def __init__(self) -> None:
        self._usages: OrderedDict[str, list[RequestUsage]] = OrderedDict()

    def add(self, usage: RequestUsage) -> None:
        self._usages.setdefault(usage.request_id, []).append(usage)
        self._usages.move_to_end(usage.request_id)
        if len(self._usages) > _KEPT:
            self._usages.popitem(last=False)

    def find(self, request_id: str) -> RequestUsage | None:
        usages = self._usages.get(request_id)
        if usages is None:
            return None
        return RequestUsage(
            request_id,
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            image_tokens=sum(usage.image_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            finish_reason=usages[-1].finish_reason,
            is_finished=all(usage.is_finished for usage in usages),
        )


@dataclass(slots=True)
class Counts:
    """Totals since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompted: int = 0
    """Requests whose prompts were computed."""
    finished: Counter[str] = field(default_factory=Counter)


class RunningBatch:
    """The running batch: at most `max_num_seqs` sequences; others wait in the order of arrival."""

    def __init__(self, script: ScriptSettings) -> None:
        self.script = script
        self.num_running = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._prefill_free_s = 0.0

    @property
    def num_waiting(self) -> int:
        return sum(num_seqs for num_seqs, _ in self._waiting)

    def change(self, script: ScriptSettings) -> None:
        """Apply another script. Running sequences continue."""
        self.script = script
        self._let_in()

    @contextlib.asynccontextmanager
    async def seat(self, num_seqs: int) -> AsyncIterator[None]:
        """Occupy places while the context lasts, after waiting for them. A request with too many sequences takes
        all."""
        num_seqs = min(num_seqs, self.script.max_num_seqs)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (num_seqs, place)
        self._waiting.append(entry)
        self._let_in()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self.num_running -= num_seqs
            elif entry in self._waiting:
                self._waiting.remove(entry)
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            num_seqs, place = self._waiting[0]
            if place.cancelled():
                self._waiting.popleft()
                continue
            if self.num_running and self.num_running + num_seqs > self.script.max_num_seqs:
                return
            self._waiting.popleft()
            self.num_running += num_seqs
            place.set_result(None)

    async def prefill(self, prompt_tokens: int) -> None:
        """Wait until the prompt is prefilled. Prompts are prefilled one after another."""
        rate = self.script.prefill_tokens_per_s
        if rate is None:
            return
        now_s = asyncio.get_running_loop().time()
        self._prefill_free_s = max(now_s, self._prefill_free_s) + prompt_tokens / rate
        await asyncio.sleep(self._prefill_free_s - now_s)

    async def wait_for_token(self, number: int, started_s: float) -> None:
        """Wait until token `number` is due; the first (1) is due immediately, since prefill produces it.

        At unlimited speed all sequences take turns, one token each.
        """
        rate = self.script.tokens_per_s
        if rate is None:
            await asyncio.sleep(0)
            return
        await asyncio.sleep(max(0.0, started_s + (number - 1) / rate - asyncio.get_running_loop().time()))

    async def generate_unseen(self, num_tokens: int) -> AsyncIterator[int]:
        """Yield how many tokens exist so far, for an answer that is sent as a whole."""
        num_done = 0
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        while num_done < num_tokens:
            rate = self.script.tokens_per_s
            if rate is None:
                num_due = num_tokens
            else:
                left_s = started_s + (num_tokens - 1) / rate - loop.time()
                await asyncio.sleep(max(0.0, min(_STEP_S, left_s)))
                num_due = min(num_tokens, 1 + int((loop.time() - started_s) * rate + 1e-6))
            if num_due > num_done:
                yield num_due - num_done
                num_done = num_due


_METRICS = (
    ("num_requests_running", "gauge", "Number of requests in model execution batches."),
    ("num_requests_waiting", "gauge", "Number of requests waiting to be processed."),
    ("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage."),
    ("prompt_tokens_total", "counter", "Number of prefill tokens processed."),
    ("generation_tokens_total", "counter", "Number of generation tokens processed."),
)
_REASONS = ("stop", "length", "abort", "error")


def render_metrics(names: Sequence[str], batch: RunningBatch, counts: Counts) -> bytes:
    """Return the metrics under vLLM's names in Prometheus' text format."""
    labels = f'engine="0",model_name="{names[0]}"'
    values = (
        batch.num_running,
        batch.num_waiting,
        batch.num_running / batch.script.max_num_seqs,
        counts.prompt_tokens,
        counts.generation_tokens,
    )
    lines: list[str] = []
    for (name, kind, words), value in zip(_METRICS, values, strict=True):
        lines += [f"# HELP vllm:{name} {words}", f"# TYPE vllm:{name} {kind}"]
        lines.append(f"vllm:{name}{{{labels}}} {float(value)}")
    name = "vllm:request_success_total"
    lines += [f"# HELP {name} Count of successfully processed requests.", f"# TYPE {name} counter"]
    for reason in _REASONS:
        lines.append(f'{name}{{{labels},finished_reason="{reason}"}} {float(counts.finished[reason])}')
    return "\n".join([*lines, ""]).encode()
