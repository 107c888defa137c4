"""The plugin's fast path against stock vLLM's own code: `python -m benchmarks.fastpath`.

A measure is a module of this package with a function `run() -> Iterable[Row]` and a line in `MEASURES`.
"""

from __future__ import annotations

MEASURES = {
    "ngram": "benchmarks.fastpath.ngram",
    "images": "benchmarks.fastpath.images",
    "encoder": "benchmarks.fastpath.encoder",
    "servers": "benchmarks.fastpath.servers",
    "reading": "benchmarks.fastpath.reading",
}
"""Names of the measures and the modules that hold them; a module is imported when its measure is run."""
