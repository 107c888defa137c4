"""How slowly a body may come. Pure but for `receive_in_time`.

One clock for a whole body is wrong both ways: it cuts a large document on a slow line in the middle of a steady upload,
and lets a client hold a connection for the whole time with a byte now and then. Here every byte buys time: a sender
that keeps to the least rate may go on for ever, one that is silent or slower has `silence_s` to catch up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.types import Message, Receive

from serving.settings.router import LimitSettings


@dataclass(slots=True)
class BodyPace:
    """Follows one body. Only the time is counted in which its next piece was waited for: while what came is being
    worked on, the client is not to blame."""

    silence_s: float
    """The longest that it may be behind."""
    least_bytes_per_s: float
    left_s: float = field(init=False)
    """How long the next piece may take."""

    def __post_init__(self) -> None:
        self.left_s = self.silence_s

    @classmethod
    def from_limits(cls, limits: LimitSettings) -> BodyPace:
        return cls(limits.body_timeout_s, limits.min_body_bytes_per_s)

    def take(self, num_bytes: int, waited_s: float) -> None:
        """A piece has come, after so long. What was sent quickly earlier saves nothing for later."""
        self.left_s = min(self.silence_s, self.left_s - waited_s + num_bytes / self.least_bytes_per_s)


async def receive_in_time(receive: Receive, pace: BodyPace) -> Message:
    """The next message of a body.

    Raises:
        TimeoutError: it did not come in time.
    """
    clock = asyncio.get_running_loop().time
    began_s = clock()
    async with asyncio.timeout(max(0.0, pace.left_s)):
        message = await receive()
    pace.take(len(message.get("body", b"")), clock() - began_s)
    return message
