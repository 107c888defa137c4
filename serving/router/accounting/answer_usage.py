"""Reads `usage` from answers and adds cost, image tokens and modes to it. Pure.

Engines end every stream with a frame with its usage (`--enable-force-include-usage`). Clients that did not ask for it
do not get it; everything else is passed on unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from serving.billing.prices import Price, to_dollars
from serving.billing.records import Outcome, TokenCounts
from serving.errors import ServingError, from_engine

# A quote inside a JSON string is always escaped, so these bytes cannot be text that the model wrote.
_USAGE = b'"usage":{'
_FINISH = b'"finish_reason":"'
_FRAME_END = b"\n\n"
_DATA = b"data: "
_DONE = b"data: [DONE]"
_ERROR = b'data: {"error":'


@dataclass(slots=True)
class UsageNotes:
    """What is added to one answer's `usage`, and what was read from it."""

    price: Price
    image_modes: tuple[str, ...] = ()
    """The resolution mode of every image, if known."""
    credit_nanodollars: int = 0
    """Deducted from the price, down to 0."""
    tokens: TokenCounts | None = None
    """As the engine counted them; None until its usage has arrived."""
    finish_reason: str = ""
    """OpenAI's, of the first choice that has one."""
    num_frames: int = 0
    """Frames of a stream that were passed on: about one per token."""

    def bill(self, tokens: TokenCounts, outcome: Outcome) -> tuple[int, int]:
        """The charge, and the part of the price that was charged before, in nanodollars."""
        price = self.price.bill_nanodollars(tokens, outcome)
        credited = min(price, self.credit_nanodollars)
        return price - credited, credited

    def take(self, usage: dict[str, Any]) -> None:
        """Read an engine's `usage`, and add the cost in dollars and what the images took."""
        self.tokens = read_tokens(usage)
        cost, credited = self.bill(self.tokens, Outcome.COMPLETED)
        usage["estimated_cost"] = to_dollars(cost)
        if self.credit_nanodollars:
            usage["credited_cost"] = to_dollars(credited)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("multimodal_tokens"), dict):
            details["image_tokens"] = details["multimodal_tokens"].get("image", 0)
            details["image_modes"] = list(self.image_modes)


def read_tokens(usage: dict[str, Any]) -> TokenCounts:
    """The counts in an OpenAI `usage` object, with vLLM's details if present."""
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    multimodal = details.get("multimodal_tokens")
    return TokenCounts(
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_image_tokens=int(multimodal.get("image") or 0) if isinstance(multimodal, dict) else 0,
        num_cached_tokens=int(details.get("cached_tokens") or 0),
        num_completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def annotate_answer(body: bytes, notes: UsageNotes) -> bytes:
    """A whole JSON answer with its notes added. One without usage is returned unchanged."""
    answer = _decode(body) if _USAGE in body else {}
    if not isinstance(answer.get("usage"), dict):
        return body
    notes.take(answer["usage"])
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        notes.finish_reason = str(choices[0].get("finish_reason") or "")
    return orjson.dumps(answer)


class StreamAnnotator:
    """Cuts a stream of server-sent events into whole frames, finds the one with usage and adds the notes to it.

    Only that frame is parsed: the others are passed on byte for byte, as soon as they are whole. If the usage belongs
    in the last chunk of the answer, that chunk is held until the usage, which follows it immediately. The usage frame
    is the engine's last before `[DONE]`: from there on everything is held until `flush`, so that a client reads its
    answer's cost only when the answer is complete and its row is written.
    """

    def __init__(self, notes: UsageNotes, *, shows_usage: bool, usage_in_last: bool = False) -> None:
        """Begin with the stream's first byte.

        Args:
            notes: what is added and read.
            shows_usage: whether the client asked for the usage frame; otherwise it is read and dropped.
            usage_in_last: whether the usage goes into the last chunk that has a `finish_reason`.
        """
        self._notes = notes
        self._usage_in_last = usage_in_last
        self._holds = False
        """Whether a choice has ended, so that a frame may be the last one."""
        self._held = b""
        """Whole frames from one with a `finish_reason` on, which may be the last one."""
        self._shows_usage = shows_usage
        self._partial = b""
        self._last = b""
        self._tail = b""
        self._has_tail = False
        self.error: ServingError | None = None
        """The error that the engine reported in the stream. vLLM ends such a stream like any other, with `[DONE]`;
        nothing is passed on from the error on."""

    @property
    def is_done(self) -> bool:
        """Whether the stream is complete: `[DONE]` came last, without an error before it."""
        return self.error is None and self._last.rstrip().endswith(_DONE)

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes from the engine; returns whole frames for the client."""
        if self._partial:
            chunk = self._partial + chunk
            self._partial = b""
        if not chunk.endswith(_FRAME_END):
            end = chunk.rfind(_FRAME_END) + len(_FRAME_END)
            if end < len(_FRAME_END):
                self._partial = chunk
                return b""
            self._partial = chunk[end:]
            chunk = chunk[:end]
        if self.error is not None:
            return b""
        if _ERROR in chunk:
            chunk = self._take_error(chunk)
        self._last = chunk
        self._notes.num_frames += chunk.count(_FRAME_END)
        if _FINISH in chunk:
            self._note_finish(chunk)
        if _USAGE in chunk:
            return self._take_usage(chunk)
        if self._has_tail:
            self._tail += chunk
            return b""
        if self._holds:
            return self._hold_last(chunk)
        return chunk

    def _note_finish(self, chunk: bytes) -> None:
        """A choice ends in this chunk."""
        if not self._notes.finish_reason:
            start = chunk.index(_FINISH) + len(_FINISH)
            self._notes.finish_reason = chunk[start : chunk.index(b'"', start)].decode()
        self._holds = self._usage_in_last

    def flush(self) -> bytes:
        """What is left when the engine has closed the stream: the usage and what followed it, or an unfinished frame as
        it is; nothing of a stream that failed."""
        left, self._partial = self._partial if self.error is None else b"", b""
        self._last = left or self._last
        tail, self._tail = self._held + self._tail if self.error is None else b"", b""
        self._held = b""
        return tail + left

    def _take_usage(self, chunk: bytes) -> bytes:
        """Returns what may go to the client now, and keeps the rest."""
        out = b""
        *frames, rest = chunk.split(_FRAME_END)
        for frame in frames:
            annotated = self._annotate(frame + _FRAME_END)
            if self._has_tail:
                self._tail += annotated
            else:
                out += self._hold_last(annotated) if self._usage_in_last else annotated
        if self._has_tail:
            self._tail += rest
            return out
        return out + rest

    def _hold_last(self, frames: bytes) -> bytes:
        """Keep everything from the last chunk with a `finish_reason` on; returns what precedes it. If another choice
        continues after it, it was not the last."""
        held, self._held = self._held, b""
        found = frames.rfind(_FINISH)
        if found < 0:
            return held + frames
        before = frames.rfind(_FRAME_END, 0, found)
        start = before + len(_FRAME_END) if before >= 0 else 0
        self._held = frames[start:]
        return held + frames[:start]

    def _close_last(self, usage: dict[str, Any]) -> bytes:
        """What was kept, with the usage in its first chunk; empty if there is no such chunk."""
        held, self._held = self._held, b""
        frame, _, after = held.partition(_FRAME_END)
        event = _decode(frame[len(_DATA) :])
        if not event:
            return b""
        return _DATA + orjson.dumps({**event, "usage": usage}) + _FRAME_END + after

    def _take_error(self, chunk: bytes) -> bytes:
        """Note the error; returns what came before it."""
        before, _, rest = chunk.partition(_ERROR)
        event = _decode(_ERROR[len(_DATA) :] + rest.partition(_FRAME_END)[0])
        status = event["error"].get("code") if isinstance(event.get("error"), dict) else None
        self.error = from_engine(status if isinstance(status, int) and status >= 400 else 500, event)
        return before

    def _annotate(self, frame: bytes) -> bytes:
        """The frame as the client gets it. The one with usage gets the cost, and begins the tail."""
        if _USAGE not in frame or not frame.startswith(_DATA):
            return frame
        event = _decode(frame[len(_DATA) :])
        # With continuous usage every chunk has counts; the cost goes into the last one, which has no choices.
        if not isinstance(event.get("usage"), dict) or event.get("choices"):
            return frame
        self._has_tail = True
        self._notes.take(event["usage"])
        if self._usage_in_last and (last := self._close_last(event["usage"])):
            return last
        is_shown = self._shows_usage or self._usage_in_last
        return _DATA + orjson.dumps(event) + _FRAME_END if is_shown else b""


def _decode(text: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else, which is then passed on unchanged."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
