"""What a page costs outside of the model, on this machine: CPU time and bytes, in every resolution mode.

The page is 1654 x 2339 pixels (A4 at 200 dpi) of text as JPEG. Costs are CPU time, the best of some rounds.
"""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import asyncpg
import cv2
import orjson
import torch
from pydantic import SecretStr

from benchmarks.fastpath.images import FORMATS, GREY, draw_page
from benchmarks.fastpath.rows import cpu_seconds
from benchmarks.ledger import make_record
from benchmarks.router.servers import Server, run_engine, run_gateway
from serving.billing.database import Database
from serving.billing.journal_frames import encode_frame
from serving.plugin.images.decoding import decode
from serving.plugin.images.page_views import WHITE, build_views
from serving.plugin.modes.selection import MODES
from serving.settings.billing import BillingSettings

REPEATS = 9
NUM_REQUESTS, CONCURRENCY, ROUNDS = 200, 8, 4
NUM_ROWS, ROWS_AT_ONCE = 20_000, 256
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Measured:
    measure: str
    value: float
    unit: str


def measure(database_url: str | None) -> Iterator[Measured]:
    """All of it; `database_url` is an empty PostgreSQL database, or None to leave that out."""
    data = draw_page()
    yield Measured("page, JPEG", len(data), "bytes")
    yield from measure_pages(data)
    with run_engine("--output-tokens", "257") as engine, run_gateway(engine) as router:
        yield from asyncio.run(measure_router(router, data))
    yield from asyncio.run(measure_rows(None, "SQLite"))
    if database_url is not None:
        yield from asyncio.run(measure_rows(database_url, "PostgreSQL"))
    yield Measured("ledger, journal", len(encode_frame(make_record(0))), "bytes per request")


def measure_pages(data: bytes) -> Iterator[Measured]:
    """From the file's bytes to model-ready pixels."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name, mode in MODES.items():
        times = [cpu_seconds(lambda mode=mode: build_views(decode(data, FORMATS, WHITE), mode, GREY))]  # type: ignore[misc]
        for _ in range(REPEATS):
            times.append(cpu_seconds(lambda mode=mode: build_views(decode(data, FORMATS, WHITE), mode, GREY)))  # type: ignore[misc]
        views = build_views(decode(data, FORMATS, WHITE), mode, GREY)
        yield Measured(f"page to pixels, {name}", min(times) * 1e3, "ms CPU")
        yield Measured(f"pixels to the engine, {name}", views.global_view.nbytes + views.tiles.nbytes, "bytes")


async def measure_router(router: Server, data: bytes) -> list[Measured]:
    """A request with the page through one router process, and what a streamed token's event weighs."""
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Free OCR."}]
    whole = orjson.dumps({"model": "nano", "max_tokens": 1, "messages": [{"role": "user", "content": content}]})
    costs = []
    async with aiohttp.ClientSession() as session:
        for _ in range(ROUNDS + 1):
            before_s = router.cpu_s()
            await asyncio.gather(
                *(_ask(session, router.url, whole, NUM_REQUESTS // CONCURRENCY) for _ in range(CONCURRENCY))
            )
            costs.append((router.cpu_s() - before_s) / NUM_REQUESTS)
        sizes = [await _stream_bytes(session, router.url, num_tokens) for num_tokens in (1, 257)]
    return [
        Measured("router, a whole request with the page", min(costs[1:]) * 1e3, "ms CPU"),
        Measured("request with the page", len(whole), "bytes"),
        Measured("streamed event", (sizes[1] - sizes[0]) / 256, "bytes per token"),
    ]


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, number: int) -> None:
    for _ in range(number):
        async with session.post(url + _CHAT, data=body, headers={"content-type": "application/json"}) as answer:
            await answer.read()
            answer.raise_for_status()


async def _stream_bytes(session: aiohttp.ClientSession, url: str, num_tokens: int) -> int:
    body = {"model": "nano", "max_tokens": num_tokens, "stream": True}
    body |= {"messages": [{"role": "user", "content": "Free OCR."}], "stream_options": {"include_usage": True}}
    async with session.post(url + _CHAT, json=body) as answer:
        answer.raise_for_status()
        return len(await answer.read())


async def measure_rows(url: str | None, name: str) -> list[Measured]:
    """What a request leaves in the database, indices included."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BillingSettings(directory=Path(folder), database_url=SecretStr(url) if url else None)
        database = Database(settings)
        await database.migrate()
        empty = await _size(url, Path(folder))
        for first in range(0, NUM_ROWS, ROWS_AT_ONCE):
            await database.insert([make_record(n) for n in range(first, min(NUM_ROWS, first + ROWS_AT_ONCE))])
        await database.close()
        size = (await _size(url, Path(folder)) - empty) / NUM_ROWS
    return [Measured(f"ledger, {name}", size, "bytes per request")]


async def _size(url: str | None, folder: Path) -> int:
    if url is None:
        return _folder_bytes(folder)
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
    finally:
        await connection.close()


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
