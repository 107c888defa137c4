"""What the router costs, beside what others put in the same place: `python -m benchmarks.router`.

A measure is a module of this package with a function `run() -> Iterable[Row]` and a line in `MEASURES`. Engines are
scripted unless a measure says otherwise; load comes from a process of its own, and costs are CPU time per process.
"""

from __future__ import annotations

MEASURES = {
    "chunks": "benchmarks.router.chunks",
    "first_token": "benchmarks.router.first_token",
    "throughput": "benchmarks.router.throughput",
    "memory": "benchmarks.router.memory",
    "writes": "benchmarks.router.writes",
    "stack": "benchmarks.router.stack",
    "ray_llm": "benchmarks.router.ray_llm",
}
"""Names of the measures and the modules that hold them; a module is imported when its measure is run."""
