"""What the router adds to an answer: cost, image tokens and modes in `usage`. Pure; the rest passes as it came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from serving.billing.prices import Price, to_dollars

# A quote inside a JSON string is always escaped, so these bytes cannot be text that the model wrote.
_USAGE = b'"usage":{'
_FRAME_END = b"\n\n"
_DATA = b"data: "


@dataclass(frozen=True, slots=True)
class UsageNotes:
    """What is added to a `usage` object."""

    price: Price
    image_modes: tuple[str, ...] = ()
    """The resolution mode of every image, where it is known."""

    def add_to(self, usage: dict[str, Any]) -> None:
        """Put the cost in, in dollars, and what the images took."""
        cost = self.price.cost_nanodollars(
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            num_completion_tokens=int(usage.get("completion_tokens") or 0),
        )
        usage["estimated_cost"] = to_dollars(cost)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("multimodal_tokens"), dict):
            details["image_tokens"] = details["multimodal_tokens"].get("image", 0)
            details["image_modes"] = list(self.image_modes)


def annotate_answer(body: bytes, notes: UsageNotes) -> bytes:
    """A whole JSON answer with its notes. One without usage is returned as it is."""
    answer = _decode(body) if _USAGE in body else {}
    if not isinstance(answer.get("usage"), dict):
        return body
    notes.add_to(answer["usage"])
    return orjson.dumps(answer)


class StreamAnnotator:
    """Cuts a stream of server-sent events into whole frames, finds the one with usage and adds the notes.

    Only that frame is looked into: others pass byte for byte, and are held back no longer than until they are whole.
    Without notes (None) all of them pass.
    """

    def __init__(self, notes: UsageNotes | None) -> None:
        self._notes = notes
        self._partial = b""

    def feed(self, chunk: bytes) -> bytes:
        """Bytes from the engine in, whole frames for the client out."""
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
        if self._notes is None or _USAGE not in chunk:
            return chunk
        return _FRAME_END.join(self._annotate(frame, self._notes) for frame in chunk.split(_FRAME_END))

    def flush(self) -> bytes:
        """What is left when the engine has closed the stream: an unfinished frame, passed as it is."""
        left, self._partial = self._partial, b""
        return left

    def _annotate(self, frame: bytes, notes: UsageNotes) -> bytes:
        if _USAGE not in frame or not frame.startswith(_DATA):
            return frame
        event = _decode(frame[len(_DATA) :])
        # With continuous usage every chunk counts; the cost stands in the last one, which has no choices.
        if not isinstance(event.get("usage"), dict) or event.get("choices"):
            return frame
        notes.add_to(event["usage"])
        return _DATA + orjson.dumps(event)


def _decode(text: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else, which is then passed on as it came."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
