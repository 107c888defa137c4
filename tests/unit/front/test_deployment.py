from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serving.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.errors import SettingsError
from serving.front.haproxy import HaproxyError
from serving.front.slots import SlotState
from serving.settings import ModelSettings, Settings

from .replicas import MODEL, Replica, answers, build_settings, reserved_port, until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray.exceptions import RayActorError

    from serving.front.deployment import FrontReplica, build_front_app


class Front(FrontReplica):
    """Ray Serve awaits `__del__`, Python would not."""

    async def stop(self) -> None:
        await super().__del__()

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Watch:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def remote(self, seen: tuple[int, int], timeout_s: float, reader: str) -> Snapshot:
        assert reader.startswith("front-"), "a draining replica waits for those that it knows by name"
        return await self._directory.tell(seen)


class Leave:
    async def remote(self, reader: str) -> None:
        pass


class Directory:
    """In the place of the actor's handle."""

    def __init__(self) -> None:
        self.watch = Watch(self)
        self.leave = Leave()
        self.num_failures = 0
        self._snapshot = Snapshot((1, 0))
        self._changed = asyncio.Event()

    def put(self, *replicas: Replica, state: ReplicaState = ReplicaState.READY, life: int = 1) -> None:
        records = tuple(
            ReplicaRecord(str(one.port), MODEL, "", state, front_url=f"http://127.0.0.1:{one.port}") for one in replicas
        )
        self._snapshot = Snapshot((life, self._snapshot.version[1] + 1), records)
        self._changed.set()

    async def tell(self, seen: tuple[int, int]) -> Snapshot:
        if self.num_failures:
            self.num_failures -= 1
            raise RayActorError
        while self._snapshot.version == seen:
            await self._changed.wait()
            self._changed.clear()
        return self._snapshot


@contextlib.asynccontextmanager
async def running_front(directory: Any, settings: Settings | None = None) -> AsyncIterator[tuple[Front, int]]:
    with reserved_port() as port:
        settings = settings or build_settings()
        settings = settings.model_copy(update={"router": settings.router.model_copy(update={"port": port})})
        replica = Front.__new__(Front)
        await replica.__init__(settings, directory)  # type: ignore[misc]
        try:
            yield replica, port
        finally:
            await replica.stop()
            assert not replica._haproxy.is_running


async def ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


async def until_answer(port: int, end: bytes) -> None:
    async with asyncio.timeout(5):
        while not (await ask(port)).endswith(end):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_the_list_is_followed() -> None:
    directory = Directory()
    async with Replica(answers(b"one")) as one, Replica(answers(b"two")) as two, running_front(directory) as (it, port):
        assert b"503" in await ask(port)
        directory.put(one)
        await until_answer(port, b"one")
        directory.put(two)
        await until_answer(port, b"two")
        directory.put(two, state=ReplicaState.DRAINING)
        await until_answer(port, b"}")
        await it.check_health()


async def test_a_directory_that_dies_changes_nothing() -> None:
    directory = Directory()
    async with Replica(answers(b"one")) as one, running_front(directory) as (it, port):
        directory.put(one)
        await until_answer(port, b"one")
        directory.num_failures = 1
        directory.put(life=2)
        await until(lambda: it._known.snapshot.version[0] == 2)
        assert (await ask(port)).endswith(b"one")
        directory.put(one, life=2)
        await asyncio.sleep(0.1)
        assert (await ask(port)).endswith(b"one")


async def test_names_are_looked_up() -> None:
    async with Replica(answers(b"one")) as one, running_front(Directory()) as (it, port):
        await it._haproxy.steer({("localhost", one.port): SlotState.READY})
        assert (await ask(port)).endswith(b"one")


async def test_a_front_without_haproxy_is_ill() -> None:
    async with running_front(Directory()) as (it, _):
        await it.check_health()
        os.kill(it._haproxy.pid, signal.SIGKILL)
        with pytest.raises(HaproxyError):
            await it.check_health()


async def test_a_haproxy_that_has_died_is_started_again_and_knows_its_replicas() -> None:
    directory = Directory()
    async with Replica(answers(b"one")) as one, running_front(directory) as (it, port):
        directory.put(one)
        await until_answer(port, b"one")
        killed = it._haproxy.pid
        os.kill(killed, signal.SIGKILL)
        await until(lambda: it._haproxy.pid != killed)
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(ConnectionError):
                    if (await ask(port)).endswith(b"one"):
                        break
                await asyncio.sleep(0.05)
        await it.check_health()


async def test_a_front_that_no_longer_follows_is_ill() -> None:
    async with running_front(Directory()) as (it, _):
        it._tasks[0].cancel()
        await until(it._tasks[0].done)
        with pytest.raises(RuntimeError, match="follows"):
            await it.check_health()


async def test_one_model_only() -> None:
    models = {name: ModelSettings(checkpoint="nano") for name in ("one", "two")}
    directory: Any = Directory()
    with pytest.raises(SettingsError, match="one model"):
        build_front_app(Settings(models=models), directory)
