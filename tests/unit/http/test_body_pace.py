"""How slowly bodies may come: the rule, and everybody who reads one, on a clock that only the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from serving.errors import RequestTimeoutError
from serving.http.bodies import read_body
from serving.http.body_pace import BodyPace
from serving.ocr.api.uploads import UploadBody
from serving.router.relay.ocr_relay import RelayedBody
from serving.settings.router import LimitSettings

SILENCE_S, RATE = 60.0, 100.0
LIMITS = LimitSettings(body_timeout_s=SILENCE_S, min_body_bytes_per_s=int(RATE))
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}

PIECES = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1)), max_size=50)
"""Bytes of each piece, and the part of the time it may take that it takes."""


@given(PIECES)
def test_who_keeps_the_pace_is_never_cut(pieces: list[tuple[int, float]]) -> None:
    pace = BodyPace(SILENCE_S, RATE)
    for num_bytes, part in pieces:
        waited_s = part * min(num_bytes / RATE, SILENCE_S)
        assert waited_s <= pace.left_s
        pace.take(num_bytes, waited_s)
    assert pace.left_s == pytest.approx(SILENCE_S)


@given(PIECES)
def test_nobody_takes_longer_than_the_least_rate_and_one_silence(pieces: list[tuple[int, float]]) -> None:
    pace = BodyPace(SILENCE_S, RATE)
    taken_s = 0.0
    for num_bytes, part in pieces:
        waited_s = part * pace.left_s  # as long as it is not cut
        taken_s += waited_s
        pace.take(num_bytes, waited_s)
        assert 0 <= pace.left_s <= SILENCE_S
    assert taken_s <= SILENCE_S + sum(num_bytes for num_bytes, _ in pieces) / RATE + 1e-6


def test_what_was_sent_quickly_saves_nothing_for_later() -> None:
    pace = BodyPace(SILENCE_S, RATE)
    pace.take(10**9, 1.0)
    assert pace.left_s == SILENCE_S


# Whoever reads bodies


async def read_whole(receive: Receive) -> int:
    return len(await read_body(SCOPE, receive, LIMITS))


async def read_upload(receive: Receive) -> int:
    upload = UploadBody(Request(SCOPE, receive), LIMITS, 10**9)
    try:
        return await count(upload.pieces())
    except TimeoutError:
        raise RequestTimeoutError("as the intake has it") from None


async def read_relayed(receive: Receive) -> int:
    return await count(RelayedBody(receive, LIMITS, 10**9).read())


async def count(pieces: AsyncIterator[bytes]) -> int:
    return sum([len(piece) async for piece in pieces])


Read = Callable[[Receive], Awaitable[int]]
READERS = pytest.mark.parametrize("read", [read_whole, read_upload, read_relayed])


class Sender:
    """Sends pieces of a body, each after some seconds on the loop's clock."""

    def __init__(self, pieces: Iterator[tuple[bytes, float]], monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real = loop.time
        self.passed_s = 0.0
        self._pieces = pieces
        monkeypatch.setattr(loop, "time", lambda: real() + self.passed_s)

    async def receive(self) -> Message:
        piece, after_s = next(self._pieces, (b"", 0.0))
        self.passed_s += after_s
        await asyncio.sleep(0)  # a timer that is due rings
        await asyncio.sleep(0)
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}


@READERS
async def test_a_steady_upload_may_take_as_long_as_it_takes(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(iter([(b"x" * 10_000, 40.0)] * 60), monkeypatch)
    assert await read(sender.receive) == 600_000
    assert sender.passed_s == 60 * 40.0


@READERS
async def test_a_drip_is_cut(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(iter([(b"x", 1.0)] * 10_000), monkeypatch)
    with pytest.raises(RequestTimeoutError):
        await read(sender.receive)
    assert SILENCE_S <= sender.passed_s <= SILENCE_S + 3


@READERS
async def test_silence_in_the_middle_is_cut(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(iter([(b"x" * 10_000, 1.0), (b"x" * 10_000, SILENCE_S + 1)]), monkeypatch)
    with pytest.raises(RequestTimeoutError):
        await read(sender.receive)
