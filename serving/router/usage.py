"""What the router adds to an engine's answer: `usage.estimated_cost`. Pure; everything else passes as it came."""

from __future__ import annotations

from typing import Any

import orjson

from serving.billing.prices import Price, to_dollars

# A quote inside a JSON string is always escaped, so these bytes cannot be text that the model wrote.
_USAGE = b'"usage":{'
_FRAME_END = b"\n\n"
_DATA = b"data: "


def add_cost(usage: dict[str, Any], price: Price) -> None:
    """Put the cost of these tokens into a `usage` object, in dollars."""
    cost = price.cost_nanodollars(
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_completion_tokens=int(usage.get("completion_tokens") or 0),
    )
    usage["estimated_cost"] = to_dollars(cost)


def price_answer(body: bytes, price: Price) -> bytes:
    """A whole JSON answer with its cost. One without usage is returned as it is."""
    if _USAGE not in body:
        return body
    answer = orjson.loads(body)
    add_cost(answer["usage"], price)
    return orjson.dumps(answer)


class StreamPricer:
    """Finds the frame with usage in a stream of server-sent events and prices it.

    Only that frame is looked into: others pass byte for byte, and are held back no longer than until they are whole.
    """

    def __init__(self, price: Price) -> None:
        self._price = price
        self._partial = b""

    def feed(self, chunk: bytes) -> bytes:
        """Bytes from the engine in, bytes for the client out."""
        if self._partial:
            chunk = self._partial + chunk
            self._partial = b""
        end = chunk.rfind(_FRAME_END) + len(_FRAME_END)
        if end < len(_FRAME_END):
            self._partial = chunk
            return b""
        if end != len(chunk):
            self._partial = chunk[end:]
            chunk = chunk[:end]
        if _USAGE not in chunk:
            return chunk
        return b"".join(self._price_frame(frame) for frame in chunk.split(_FRAME_END)[:-1])

    def flush(self) -> bytes:
        """What is left when the engine has closed the stream: an unfinished frame, passed as it is."""
        left, self._partial = self._partial, b""
        return left

    def _price_frame(self, frame: bytes) -> bytes:
        if _USAGE in frame and frame.startswith(_DATA):
            event = orjson.loads(frame[len(_DATA) :])
            # With continuous usage every chunk counts; the cost stands in the last one, which has no choices.
            if isinstance(event.get("usage"), dict) and not event.get("choices"):
                add_cost(event["usage"], self._price)
                frame = _DATA + orjson.dumps(event)
        return frame + _FRAME_END
