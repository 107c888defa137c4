"""The clients, in a namespace of their own: a stand-in for the Kubernetes Service, and a load through it.

The stand-in does what a Service does: it spreads connections over the nodes whose readiness probe succeeds (that of the
overlay: Serve's health route, every 5 s there, every second here), and knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Annotated, TextIO

import aiohttp
import typer

from benchmarks.faults.client import Load

_PORT = 8000
_PROBE_S = 1.0


class Service:
    """TCP from 127.0.0.1 to one of the ready nodes."""

    def __init__(self, endpoints: Path) -> None:
        self._endpoints = endpoints
        self.ready: list[str] = []
        self._turn = count()

    async def probe_forever(self) -> None:
        timeout = aiohttp.ClientTimeout(4)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                ips = self._endpoints.read_text().split()
                answers = await asyncio.gather(*(self._is_ready(session, ip) for ip in ips))
                self.ready = [ip for ip, is_ready in zip(ips, answers, strict=True) if is_ready]
                await asyncio.sleep(_PROBE_S)

    async def _is_ready(self, session: aiohttp.ClientSession, ip: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with session.get(f"http://{ip}:{_PORT}/-/healthz") as answer:
                return answer.status == 200
        return False

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, until either side ends it."""
        ready = list(self.ready)
        if not ready:
            writer.transport.abort()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection(ready[next(self._turn) % len(ready)], _PORT)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pump(reader, back_writer), _pump(back_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
    except OSError:
        writer.transport.abort()


async def run(endpoints: Path, load: Load, counts: Path) -> None:
    """Apply the load until SIGTERM, telling the counts every second."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    service = Service(endpoints)
    probing = asyncio.create_task(service.probe_forever())
    server = await asyncio.start_server(service.connect, "127.0.0.1", _PORT)
    running: asyncio.Task[None] | None = None
    with counts.open("w") as out:
        while not stop.is_set():
            if running is None and service.ready:
                running = asyncio.create_task(load.run())
            _tell(out, load, service)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
        load.stop()
        if running is not None:
            await running
        _tell(out, load, service)
    probing.cancel()
    server.close()


def _tell(out: TextIO, load: Load, service: Service) -> None:
    line = {
        "at_s": time.time(),
        "streams": {seen.name.lower(): number for seen, number in load.streams.items()},
        "whole": {seen.name.lower(): number for seen, number in load.whole.items()},
        "lost": load.lost,
        "ready": len(service.ready),
    }
    print(json.dumps(line), file=out, flush=True)


def main(
    endpoints: Annotated[Path, typer.Option(help="File with the worker nodes' addresses, a line each; read anew.")],
    counts: Annotated[Path, typer.Option(help="File for the counts.")],
    told: Annotated[Path, typer.Option(help="File for what answers told of themselves: id, tokens, cost.")],
    key_file: Annotated[Path, typer.Option(help="File with the key of the router's.")],
    streams: Annotated[int, typer.Option()] = 4,
    whole: Annotated[int, typer.Option()] = 4,
    tokens: Annotated[int, typer.Option()] = 60,
) -> None:
    """Apply a load to the nodes until SIGTERM."""
    load = Load(
        f"http://127.0.0.1:{_PORT}",
        "nano",
        num_streams=streams,
        num_whole=whole,
        tokens=tokens,
        headers={"authorization": f"Bearer {key_file.read_text().strip()}"},
        extra={"ignore_eos": True},
    )
    asyncio.run(run(endpoints, load, counts))
    told.write_text(json.dumps([asdict(each) for each in load.told]))


if __name__ == "__main__":
    typer.run(main)
