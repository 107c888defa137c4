"""Clients that read pages: in a closed loop, or at given moments whatever the stack does."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from benchmarks.fastpath.images import draw_page
from benchmarks.planning.comparison import Reading
from serving.nano.pages import CORE, sample_page

_CHAT = "/v1/chat/completions"
_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Reader:
    """A stack, and the pages that it is given to read."""

    url: str
    model: str
    images: Iterator[str]
    """Data URLs, one after the other."""
    mode: str | None = None
    """Resolution mode; None leaves it to the server."""
    api_key: str | None = None

    async def ask(self, session: aiohttp.ClientSession, num_output: int) -> Reading:
        """A page with an answer of exactly so many tokens.

        Raises:
            RuntimeError: it was not answered so.
        """
        body = self._body(num_output)
        asked_s = time.perf_counter()
        async with session.post(self.url + _CHAT, json=body) as answer:
            told = await answer.json()
        took_s = time.perf_counter() - asked_s
        if answer.status != 200 or told["usage"]["completion_tokens"] != num_output:
            raise RuntimeError(f"{num_output} tokens were asked for, the answer is {answer.status} {str(told)[:500]}")
        return Reading(asked_s, took_s, num_output, told["usage"]["prompt_tokens"])

    def session(self) -> aiohttp.ClientSession:
        """For `ask`; as many connections as there are requests."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(_TIMEOUT_S), headers=headers
        )

    def _body(self, num_output: int) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": next(self.images)}},
            {"type": "text", "text": "Free OCR."},
        ]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": num_output, "ignore_eos": True, "temperature": 0, "vllm_xargs": {"repeated_tokens": 0}}
        if self.mode is not None:
            body["mm_processor_kwargs"] = {"mode": self.mode}
        return body


async def read_closed(reader: Reader, concurrency: int, lengths: Sequence[int]) -> list[Reading]:
    """So many clients, each of whom asks again as soon as it has its answer, until all lengths have been asked for."""
    left, readings = iter(lengths), list[Reading]()

    async def ask_on(session: aiohttp.ClientSession) -> None:
        for num_output in left:
            readings.append(await reader.ask(session, num_output))

    async with reader.session() as session:
        await asyncio.gather(*(ask_on(session) for _ in range(concurrency)))
    return readings


async def read_trace(reader: Reader, trace: Sequence[tuple[float, int]]) -> list[Reading]:
    """Pages after these gaps in seconds, with answers of these lengths; in the order in which they were asked for."""
    async with reader.session() as session:
        asking = []
        due_s = time.perf_counter()
        for gap_s, num_output in trace:
            due_s += gap_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            asking.append(asyncio.create_task(reader.ask(session, num_output)))
        return await asyncio.gather(*asking)


def nano_images(number: int = 24) -> Iterator[str]:
    """Pages that the nano checkpoint reads, over and over."""
    urls = []
    for index in range(number):
        file = io.BytesIO()
        Image.fromarray(np.asarray(sample_page(CORE, "test", 7, index).pixels)).save(file, "PNG")
        urls.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return cycle(urls)


def a4_images() -> Iterator[str]:
    """A page of text at 200 dpi."""
    return cycle([f"data:image/jpeg;base64,{base64.b64encode(draw_page()).decode()}"])
