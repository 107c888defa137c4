"""What joining the writes of one event-loop iteration saves: one server process with it and without, in turns.

The server is the router's own (`serving.http.server`) with an app that costs nothing, the client a bare protocol in a
process of its own. Streams get a chunk each whenever a clock ticks, as the sequences of one engine step do; whole
answers are two writes of the app's, the head and the body.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, cast

import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from benchmarks.fastpath.rows import Row
from serving.http import protocol
from serving.http.server import HttpServer

Kind = Literal["chunk", "answer"]
NUM_CHUNKS, TICK_S, NUM_ANSWERS, NUM_ROUNDS = 300, 0.01, 20_000, 3
WORK: tuple[tuple[Kind, int], ...] = (("chunk", 16), ("chunk", 256), ("answer", 16))
"""What is sent, and over how many connections."""
_REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
_CHUNK, _BODY = b"data: " + b"x" * 200 + b"\n\n", b"x" * 500
_END = {"chunk": b"0\r\n\r\n", "answer": _BODY[-5:]}
Send = Callable[[dict[str, Any]], Awaitable[None]]


def run() -> Iterator[Row]:
    """CPU per chunk and per answer, of server and client."""
    for kind, number in WORK:
        found: dict[str, list[tuple[float, float]]] = {"joined": [], "separate": []}
        for _ in range(NUM_ROUNDS):
            for way, figures in found.items():
                figures.append(measure(way, kind, number))
        for side, name in enumerate(("server", "client")):
            ours, theirs = (statistics.median(each[side] for each in found[way]) for way in found)
            measure_name = f"{name}'s CPU per {kind}, {number} connections, writes joined"
            yield Row.of_costs(measure_name, ours, theirs, "each write sent by itself", None, "us")


def measure(way: str, kind: Kind, num_connections: int) -> tuple[float, float]:
    """Microseconds of CPU per chunk or answer: the server's and the client's."""
    command = [sys.executable, "-m", "benchmarks.router.writes", way, kind, str(num_connections)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    server, client = json.loads(done.stdout)
    return server, client


def _count(kind: Kind, num_connections: int) -> int:
    return NUM_CHUNKS * num_connections if kind == "chunk" else NUM_ANSWERS // num_connections * num_connections


async def serve(way: str, kind: Kind, num_connections: int) -> None:
    """Serve one client, and print both sides' figures."""
    if way == "separate":
        protocol.JoiningProtocol.connection_made = HttpToolsProtocol.connection_made  # type: ignore[method-assign]
    clock = Clock()
    server = HttpServer(clock if kind == "chunk" else answer, host="127.0.0.1", port=0, drain_s=1)
    await server.start()
    command = (sys.executable, "-m", "benchmarks.router.writes", "client", kind, str(num_connections), str(server.port))
    client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    await client.stdout.readline()  # it is connected
    began_s = time.process_time()
    if kind == "chunk":
        await clock.run()
    client_s = float(await client.stdout.readline())
    per = 1e6 / _count(kind, num_connections)
    print(json.dumps(((time.process_time() - began_s) * per, client_s * per)))
    await client.wait()
    await server.stop()


class Clock:
    """Wakes all streams at once, as one step of an engine does."""

    def __init__(self) -> None:
        self._tick = asyncio.Event()

    async def run(self) -> None:
        for _ in range(NUM_CHUNKS):
            due, self._tick = self._tick, asyncio.Event()
            due.set()
            await asyncio.sleep(TICK_S)

    async def __call__(self, scope: dict[str, Any], receive: object, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(NUM_CHUNKS):
            await self._tick.wait()
            await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def answer(scope: dict[str, Any], receive: object, send: Send) -> None:
    """A small whole answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})


class Connection(asyncio.Protocol):
    """One keep-alive connection of the client's."""

    transport: asyncio.Transport

    def __init__(self, kind: Kind) -> None:
        self._end = _END[kind]
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith(self._end) and not self.whole.done():
            self.whole.set_result(None)

    async def ask(self, times: int) -> None:
        for _ in range(times):
            self.whole = asyncio.get_running_loop().create_future()
            self.transport.write(_REQUEST)
            await self.whole


async def read(kind: Kind, num_connections: int, port: int) -> None:
    """Be the client: say when it is connected, then how many seconds of CPU reading took."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Connection(kind), "127.0.0.1", port) for _ in range(num_connections)]
    asking = asyncio.gather(*(each.ask(1 if kind == "chunk" else NUM_ANSWERS // num_connections) for _, each in made))
    await asyncio.sleep(0.5)  # every stream waits for the first tick
    print("connected", flush=True)
    began_s = time.process_time()
    await asking
    print(time.process_time() - began_s, flush=True)


if __name__ == "__main__":
    way, kind, number, *port = sys.argv[1:]
    run_kind = cast(Kind, kind)
    uvloop.run(read(run_kind, int(number), int(port[0])) if port else serve(way, run_kind, int(number)))
