"""Protects Ray Serve's log handler in a process that runs vLLM.

vLLM configures logging with `logging.config.dictConfig`, which closes all existing handlers. Serve's handler, a memory
handler in front of a file, loses its file without noticing and then keeps every record in memory forever. In addition,
a controller that restarts after the loss of the head node asks each replica for the name of that file and stops those
that cannot answer. Observed with vLLM 0.32 and Ray 2.60.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from logging.handlers import MemoryHandler


@contextlib.contextmanager
def keep_serve_log() -> Iterator[None]:
    """Restore the target of Serve's handler after logging was reconfigured; a closed file reopens by itself."""
    handlers = logging.getLogger("ray.serve").handlers
    targets = [(each, each.target) for each in handlers if isinstance(each, MemoryHandler) and each.target]
    try:
        yield
    finally:
        for handler, target in targets:
            if handler.target is None:
                handler.setTarget(target)
                handler.flush()
