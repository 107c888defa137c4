from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from serving.http.bodies import ClientGoneError
from serving.http.disconnects import ClientPresence


class Connection:
    """A client that leaves when told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def test_work_ends_when_its_client_leaves() -> None:
    connection = Connection()
    asyncio.get_running_loop().call_later(0.01, connection.leaves.set)
    has_cleaned_up = False

    async def work() -> None:
        nonlocal has_cleaned_up
        async with asyncio.timeout(1), ClientPresence(connection.receive):
            try:
                await asyncio.Event().wait()
            finally:
                has_cleaned_up = True

    with pytest.raises(ClientGoneError):
        await work()
    assert has_cleaned_up
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the task can go on as if it had not been cancelled"


async def test_work_that_ends_first_leaves_nobody_watching() -> None:
    connection = Connection()
    before = asyncio.all_tasks()
    async with ClientPresence(connection.receive):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
    connection.leaves.set()
    await asyncio.sleep(0.01)


async def test_an_error_of_the_work_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        async with ClientPresence(Connection().receive):
            raise ZeroDivisionError


async def test_a_cancellation_from_outside_is_no_departure() -> None:
    async def work() -> None:
        async with ClientPresence(Connection().receive):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_inside_stays_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with ClientPresence(Connection().receive), asyncio.timeout(0.01):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), ClientPresence(Connection().receive):
            await asyncio.Event().wait()
