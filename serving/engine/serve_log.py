"""Ray Serve's log in a process that runs vLLM.

vLLM configures logging by `logging.config.dictConfig`, which first closes every handler there is. Serve's, a memory
handler before a file, loses its file by that and is not told. It then keeps every record for ever; and a controller
that starts anew, after the loss of the head, asks each replica for the name of that file and stops those that cannot
say it. Seen with vLLM 0.32 and Ray 2.60.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from logging.handlers import MemoryHandler


@contextlib.contextmanager
def keep_serve_log() -> Iterator[None]:
    """Serve's records go where they went, whatever happens to logging meanwhile; a closed file opens itself."""
    handlers = logging.getLogger("ray.serve").handlers
    targets = [(each, each.target) for each in handlers if isinstance(each, MemoryHandler) and each.target]
    try:
        yield
    finally:
        for handler, target in targets:
            if handler.target is None:
                handler.setTarget(target)
                handler.flush()
