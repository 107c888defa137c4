"""Threads that share the batches of views of a step among them.

Batches know nothing of each other, so each thread takes the next one when it is done with its last. PyTorch's own
threads wait for each other at every operation, and all of them for a core that another process uses as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

VARIABLE = "SERVING_ENCODER_THREADS"


class ViewThreads:
    """The calling thread and helpers beside it."""

    def __init__(self, num_threads: int) -> None:
        """num_threads: how many work at once, the calling one among them."""
        self.num_threads = num_threads
        self._helpers = ThreadPoolExecutor(num_threads, "encoder")  # starts a thread when there is work for it

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> ViewThreads:
        """As many as SERVING_ENCODER_THREADS says, by default the calling one alone.

        Raises:
            ValueError: that is no whole number from 1 on.
        """
        text = environ.get(VARIABLE, "") or "1"
        if not (text.isascii() and text.isdecimal() and int(text)):
            raise ValueError(f"{VARIABLE} must be a whole number, 1 or more, not {text!r}")
        return cls(int(text))

    def map(self, encode: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> list[Tensor]:
        """Results in the order of the batches; `encode` is called in several threads.

        An error of any thread is raised when all have ended.
        """
        results: list[Tensor] = [*batches]
        places = iter(range(len(batches)))  # a step of it is one of the interpreter's: no two threads get the same
        in_inference = torch.is_inference_mode_enabled()  # a thread's own

        def work() -> None:
            with torch.inference_mode(in_inference):
                for place in places:
                    results[place] = encode(batches[place])

        helpers = [self._helpers.submit(work) for _ in range(min(self.num_threads, len(batches)) - 1)]
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]
        for error in errors:
            if error is not None:
                raise error
        return results
