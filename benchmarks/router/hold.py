"""`python -m benchmarks.router.hold URL N`: opens N streams, says "open" when each has its first token, and waits."""

from __future__ import annotations

import asyncio
import sys
from urllib.parse import urlsplit

import uvloop

from benchmarks.router.load import build_request

_AT_ONCE = 100


async def hold(url: str, number: int) -> None:
    """Open them and wait to be killed."""
    parts = urlsplit(url)
    request = build_request(url, 256)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def open_one() -> asyncio.StreamWriter:
        async with gate:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(request)
            await reader.readuntil(b'"content":" the"')
            return writer

    writers = await asyncio.gather(*(open_one() for _ in range(number)))
    print("open", flush=True)
    await asyncio.sleep(600)
    del writers


if __name__ == "__main__":
    uvloop.run(hold(sys.argv[1], int(sys.argv[2])))
