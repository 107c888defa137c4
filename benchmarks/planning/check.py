"""Whether the simulation comes true: calibrate the nano stack, predict other loads, apply them, compare.

A shared machine is now fast, now slow. So calibration and loads take turns in short slices. The curve's shape is fitted
to all slices together; how fast the machine was during a load comes from the slices before and after it. The predicted
loads differ from those of the calibration: answers of mixed lengths, another concurrency, and arrivals at random that
don't wait for anybody. Nothing of a load's own measurement goes into its prediction.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from benchmarks.planning.clients import Reader, nano_images, read_closed, read_trace
from benchmarks.planning.comparison import (
    CLOSED_CLIENTS,
    GRID,
    LENGTHS,
    OPEN_LOAD,
    REQUESTS_PER_CLIENT,
    TOLERANCE,
    Calibration,
    Comparison,
    Measured,
    draw_trace,
)
from benchmarks.router.servers import run_engine, run_gateway
from benchmarks.router.stack import run_stack
from serving.planning.curve import Fit, ServiceCurve

MAX_SEQS = 64
"""Of configs/local.yaml."""
SCRIPTED_SEQS = 12

Say = Callable[[str], None]


@contextlib.contextmanager
def run_nano() -> Iterator[tuple[Reader, int, int]]:
    """`serving up` with configs/local.yaml; a reader, and the engine's places and room."""
    with run_stack() as stack:
        with urllib.request.urlopen(f"{stack.url}/admin/state", timeout=60) as answer:
            kv_tokens = int(json.load(answer)["replicas"][0]["capacity_tokens"])
        yield Reader(stack.url, "nano", nano_images()), MAX_SEQS, kv_tokens


@contextlib.contextmanager
def run_scripted() -> Iterator[tuple[Reader, int, int]]:
    """One router process and a scripted engine with few places. Its prompts take no time: those of vLLM hold up what
    runs, those of the script would not."""
    flags = ["--tokens-per-s", "60", "--output-tokens", "256"]
    with run_engine(*flags, "--max-num-seqs", str(SCRIPTED_SEQS)) as engine, run_gateway(engine) as router:
        yield Reader(router.url, "nano", nano_images()), SCRIPTED_SEQS, 1 << 30


async def calibrate(reader: Reader, calibration: Calibration, grid: Iterable[tuple[int, int]] = GRID) -> None:
    """One round over the grid."""
    for concurrency, num_output in grid:
        lengths = [num_output] * (concurrency * REQUESTS_PER_CLIENT)
        calibration.add(concurrency, num_output, await read_closed(reader, concurrency, lengths))


def find_rate(curve: ServiceCurve, num_prompt: int) -> float:
    """How many pages a second keep the stack busy to `OPEN_LOAD`. On a CPU a full house gains little over a dozen at a
    time, and takes long."""
    mean_output = sum(LENGTHS) / 2
    at_12 = 12 / (curve.overhead_s + mean_output * curve.step_s(12) + 12 * curve.prefill_s)
    return OPEN_LOAD * min(curve.peak_pages_per_s(num_prompt, mean_output), at_12)


@dataclass(slots=True)
class Check:
    """A whole check of one stack."""

    reader: Reader
    measured: Measured
    seconds: float
    """Of a slice of arrivals at random."""
    say: Say
    rng: Random = field(default_factory=lambda: Random(11))

    async def run(self, num_rounds: int) -> None:
        """Calibrate and load in turns. A first round warms up, and says how fast pages may come."""
        measured, warm_up = self.measured, Calibration()
        await calibrate(self.reader, warm_up)
        rate = find_rate(warm_up.fit(measured.max_seqs, measured.kv_tokens).curve, warm_up.num_prompt)
        await calibrate(self.reader, measured.calibration)
        for number in range(num_rounds):
            turn = f"round {number + 1} of {num_rounds}"
            self.say(f"{turn}: {rate:.2f} pages/s at random")
            measured.traces.append(draw_trace(self.rng, rate, self.seconds, LENGTHS))
            measured.opened.append(await read_trace(self.reader, measured.traces[-1]))
            self.say(f"{turn}: {CLOSED_CLIENTS} clients")
            lengths = [self.rng.randint(*LENGTHS) for _ in range(CLOSED_CLIENTS * 4)]
            measured.closed.append(await read_closed(self.reader, CLOSED_CLIENTS, lengths))
            self.say(f"{turn}: calibrating")
            await calibrate(self.reader, measured.calibration)


def to_json(fit: Fit, rows: Sequence[Comparison], measured: Measured) -> dict[str, Any]:
    """All of it, for a file."""
    times = measured.calibration.times
    return {
        "curve": asdict(fit.curve),
        "worst_error_of_fit": fit.worst_error,
        "points": [asdict(point) for point in measured.calibration.points()],
        "slices": {f"{concurrency} x {length}": taken_s for (concurrency, length), taken_s in times.items()},
        "slowness": [measured.calibration.slowness(number) for number in range(len(measured.traces))],
        "closed_clients": CLOSED_CLIENTS,
        "lengths": LENGTHS,
        "num_pages": sum(map(len, [*measured.opened, *measured.closed])),
        "tolerance": TOLERANCE,
        "comparisons": [{**asdict(row), "error": row.error} for row in rows],
    }
