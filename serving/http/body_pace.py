"""How slowly a body may arrive. Pure except for `receive_in_time`.

A single timeout for the whole body fails both ways: it cuts off a steady upload of a large document over a slow link,
and lets a client hold a connection for the whole time by sending a byte now and then. Here every byte earns time: a
sender that keeps to the minimum rate has no time limit; one that pauses or is slower has `silence_s` to catch up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.types import Message, Receive

from serving.settings.router import LimitSettings


@dataclass(slots=True)
class BodyPace:
    """Tracks one body. Only time spent waiting for its next piece counts, not the time that processing takes."""

    silence_s: float
    """Longest time that the sender may be behind the minimum rate."""
    least_bytes_per_s: float
    left_s: float = field(init=False)
    """Time left for the next piece."""

    def __post_init__(self) -> None:
        self.left_s = self.silence_s

    @classmethod
    def from_limits(cls, limits: LimitSettings) -> BodyPace:
        return cls(limits.body_timeout_s, limits.min_body_bytes_per_s)

    def take(self, num_bytes: int, waited_s: float) -> None:
        """Record a piece that arrived after so long. Sending fast earns no credit for later."""
        self.left_s = min(self.silence_s, self.left_s - waited_s + num_bytes / self.least_bytes_per_s)


async def receive_in_time(receive: Receive, pace: BodyPace) -> Message:
    """Receive the next message of a body.

    Raises:
        TimeoutError: the message did not arrive in time.
    """
    clock = asyncio.get_running_loop().time
    began_s = clock()
    async with asyncio.timeout(max(0.0, pace.left_s)):
        message = await receive()
    pace.take(len(message.get("body", b"")), clock() - began_s)
    return message
