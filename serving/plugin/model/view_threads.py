"""Threads that encode the batches of views of a step concurrently.

Batches are independent, so each thread takes the next one when it has finished one. PyTorch's own threads wait for each
other at every operation, so that all of them wait for a core that another process is using.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

VARIABLE = "SERVING_ENCODER_THREADS"


class ViewThreads:
    """The calling thread and helper threads."""

    def __init__(self, num_threads: int) -> None:
        """Create the helpers.

        Args:
            num_threads: how many threads work concurrently, including the calling one.
        """
        self.num_threads = num_threads
        self._helpers = ThreadPoolExecutor(num_threads, "encoder")  # starts its threads on demand

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> ViewThreads:
        """Return as many threads as SERVING_ENCODER_THREADS says; by default only the calling one.

        Raises:
            ValueError: the variable is not a whole number of at least 1.
        """
        text = environ.get(VARIABLE, "") or "1"
        if not (text.isascii() and text.isdecimal() and int(text)):
            raise ValueError(f"{VARIABLE} must be a whole number, 1 or more, not {text!r}")
        return cls(int(text))

    def map(self, encode: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> list[Tensor]:
        """Call `encode` for each batch, in several threads, and return the results in the order of the batches.

        An error in any thread is raised once all have ended.
        """
        results: list[Tensor] = [*batches]
        places = iter(range(len(batches)))  # advancing it is atomic: no two threads get the same place
        in_inference = torch.is_inference_mode_enabled()  # is local to a thread

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
