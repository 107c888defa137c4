from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive

from serving.errors import BodyTooLargeError, InvalidRequestError, OverloadedError, RequestTimeoutError
from serving.http.bodies import (
    BodyBudget,
    ClientGoneError,
    check_json,
    check_size_in_memory,
    decode_json,
    read_body,
    read_request_id,
)
from serving.settings.router import LimitSettings

LIMITS = LimitSettings(max_body_bytes=2000, max_json_depth=4, max_json_values=1000, body_timeout_s=0.05)


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "headers": list(headers)}


def brings(*parts: bytes, ends: bool = True) -> tuple[Receive, Callable[[], int]]:
    """A client that sends these parts and, unless it ends, nothing after them; and how many were taken."""
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": not ends or number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    taken = 0

    async def receive() -> Message:
        nonlocal taken
        if taken == len(messages):
            await asyncio.Event().wait()
        taken += 1
        return messages[taken - 1]

    return receive, lambda: taken


@pytest.mark.parametrize("parts", [(b"",), (b"hello",), (b"hel", b"", b"lo"), (b"x" * 2000,)])
async def test_a_body_is_read_whole(parts: tuple[bytes, ...]) -> None:
    assert await read_body(scope(), brings(*parts)[0], LIMITS) == b"".join(parts)


@pytest.mark.parametrize("length", [b"2001", b"9" * 30, b"9" * 5000])
async def test_a_body_that_is_announced_too_large_is_read_away_and_refused(length: bytes) -> None:
    receive, num_taken = brings(b"x" * 1500, b"y" * 1500)
    with pytest.raises(BodyTooLargeError, match="2000 bytes"):
        await read_body(scope((b"content-length", length)), receive, LIMITS)
    assert num_taken() == 2


async def test_who_asks_before_sending_is_refused_before_sending() -> None:
    receive, num_taken = brings(b"x")
    headers = scope((b"content-length", b"2001"), (b"expect", b"100-continue"))
    with pytest.raises(BodyTooLargeError):
        await read_body(headers, receive, LIMITS)
    assert num_taken() == 0


@pytest.mark.parametrize("announced", [None, b"5", b"-1", b"many"])
async def test_a_body_that_turns_out_too_large_is_refused(announced: bytes | None) -> None:
    headers = scope((b"content-length", announced)) if announced else scope()
    receive, num_taken = brings(b"x" * 1500, b"y" * 501, b"z")
    with pytest.raises(BodyTooLargeError):
        await read_body(headers, receive, LIMITS)
    assert num_taken() == 3


async def test_a_body_that_never_ends_times_out() -> None:
    with pytest.raises(RequestTimeoutError, match=r"0\.05 seconds"):
        await read_body(scope(), brings(b"hel", ends=False)[0], LIMITS)


async def test_a_client_that_announces_too_much_and_sends_nothing_is_refused_in_time() -> None:
    async with asyncio.timeout(1):
        with pytest.raises(BodyTooLargeError):
            await read_body(scope((b"content-length", b"2001")), brings(ends=False)[0], LIMITS)


async def test_a_client_that_leaves_is_told_apart() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"h", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    with pytest.raises(ClientGoneError):
        await read_body(scope(), receive, LIMITS)


async def test_bodies_are_counted_as_long_as_they_are_held() -> None:
    budget = BodyBudget(100)
    with budget.open() as first:
        await read_body(scope(), brings(b"x" * 40, b"x" * 20)[0], LIMITS, first)
        assert budget.num_held_bytes == 60
        receive, num_taken = brings(b"y" * 30, b"y" * 30, b"y")
        with pytest.raises(OverloadedError), budget.open() as second:
            await read_body(scope(), receive, LIMITS, second)
        assert num_taken() == 3
        assert budget.num_held_bytes == 60
        with budget.open() as third:
            await read_body(scope(), brings(b"z" * 40)[0], LIMITS, third)
            assert budget.num_held_bytes == 100
            with pytest.raises(OverloadedError):
                first.take(1)
    assert budget.num_held_bytes == 0


async def test_what_is_announced_is_not_held() -> None:
    budget = BodyBudget(100)
    with budget.open() as held:
        await read_body(scope((b"content-length", b"1999")), brings(b"x")[0], LIMITS, held)
        assert budget.num_held_bytes == 1


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def test_depth_is_bounded() -> None:
    check_json(nested(4), LIMITS)
    with pytest.raises(InvalidRequestError, match="4 levels") as caught:
        check_json(nested(5), LIMITS)
    assert caught.value.code == "json_too_deep"
    with pytest.raises(InvalidRequestError):
        check_json(nested(100_000), LIMITS)


@pytest.mark.parametrize(
    "value", [[0] * 1000, [[]] * 1000, {str(number): 0 for number in range(1000)}, [[0] * 500, [0] * 500]]
)
def test_values_are_bounded(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="1000 JSON values"):
        check_json(value, LIMITS)


def test_values_up_to_the_bound_pass() -> None:
    check_json([0] * 999, LIMITS)


@pytest.mark.parametrize("unit", [b"0,", b"[],", b"{},", b"[", b"{"])
def test_what_would_fill_memory_is_refused_before_it_is_parsed(unit: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_size_in_memory(unit * 1001, LIMITS)
    assert caught.value.code == "json_too_large"


@pytest.mark.parametrize("body", [b"x" * 10_000, b"," * 1000, b"a,b[c{" * 300])
def test_a_long_text_is_no_reason_to_refuse(body: bytes) -> None:
    check_size_in_memory(body, LIMITS)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"NaN", b'{"a": NaN}', b'{"a": 1e400}', b'{"a": "\\ud800"}', b'{"a": "\xff"}', b"[" * 900],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_json(body, LIMITS)
    assert caught.value.code == "invalid_json"


def test_an_object_is_decoded() -> None:
    assert decode_json(b'{"a": [1, "\\u00e9"]}', LIMITS) == {"a": [1, "é"]}


@pytest.mark.parametrize("given", [b"a", b"req_1.2:3-4", b"x" * 128])
def test_a_sane_request_id_is_kept(given: bytes) -> None:
    assert read_request_id({b"x-request-id": given}) == given.decode()


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a b", b"a\n", b"a\r\nb: c", b"\xc3\xa9", b'"', b"a/b"])
def test_any_other_is_replaced(given: bytes | None) -> None:
    headers = {} if given is None else {b"x-request-id": given}
    first, second = read_request_id(headers), read_request_id(headers)
    assert len(first) == 32
    assert first != second
