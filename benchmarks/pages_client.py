"""Pages read through an OpenAI API, so many at a time: `python -m benchmarks.pages_client URL ...`, one line of JSON.

A closed loop: a new page is sent when an answer has come, as a batch job does it. Pages are those of the nano
checkpoint's card (unseen in training, all different) or A4 scans; answers are streams, each timed to its first token,
between its tokens, and to its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import orjson
import typer
import uvloop

from benchmarks.quantiles import quantile, thin
from serving.nano.pages import CORE, sample_page, with_chars

_SEED = 100
_DATA, _DONE = b"data: ", b"data: [DONE]"


@dataclass
class Seen:
    """What came, times in seconds."""

    took_s: float = 0.0
    num_pages: int = 0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between one event with text and the next of the same answer."""
    whole_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Rates, and each distribution as quantiles and as a curve."""
        rates = {"pages_per_s": self.num_pages / self.took_s, "tokens_per_s": self.num_tokens / self.took_s}
        times = {"first_s": self.first_s, "gap_s": self.gaps_s, "whole_s": self.whole_s}
        return {
            **rates,
            "num_pages": self.num_pages,
            **{
                name: {**{f"p{part:g}": quantile(values, part / 100) for part in (50, 90, 99)}, "curve": thin(values)}
                for name, values in times.items()
            },
        }


def build_bodies(model: str, pages: Sequence[str], extra: dict[str, Any]) -> list[bytes]:
    """One streamed request per page."""
    bodies = []
    for page in pages:
        content = [{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": "Free OCR."}]
        bodies.append(
            orjson.dumps(
                {
                    "model": model,
                    "messages": [{"role": "user", "content": content}],
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    **extra,
                }
            )
        )
    return bodies


def build_pages(number: int, kind: str) -> list[str]:
    """Data URLs of `card` (512 pixels, PNG) or `a4` pages (JPEG, 200 dpi)."""
    if kind == "a4":
        from benchmarks.fastpath.servers import build_pages as build_scans

        return build_scans(number)
    from benchmarks.fastpath.reading import encode

    return [encode(sample_page(with_chars(CORE, 100, 350), "test", _SEED, index), 1) for index in range(number)]


async def read_pages(url: str, bodies: Sequence[bytes], concurrency: int) -> Seen:
    """Send every body once.

    Raises:
        RuntimeError: an answer that is not whole.
    """
    seen, waiting = Seen(), iter(bodies)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    headers = {"content-type": "application/json"}
    if key := os.environ.get("SERVING_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def work() -> None:
            for body in waiting:
                await _read_one(session, f"{url}/v1/chat/completions", body, seen)

        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        seen.took_s = time.perf_counter() - began_s
    return seen


async def _read_one(session: aiohttp.ClientSession, url: str, body: bytes, seen: Seen) -> None:
    sent_s = last_s = time.perf_counter()
    is_first, is_done = True, False
    async with session.post(url, data=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if not line.startswith(_DATA):
                continue
            now_s = time.perf_counter()
            if line.startswith(_DONE):
                is_done = True
            elif b'"content":"' in line and b'"content":""' not in line:
                (seen.first_s if is_first else seen.gaps_s).append(now_s - (sent_s if is_first else last_s))
                is_first, last_s = False, now_s
            elif b'"usage":{' in line:
                seen.num_tokens += orjson.loads(line[len(_DATA) :])["usage"]["completion_tokens"]
    if not is_done:
        raise RuntimeError(f"{url} ended an answer without [DONE]")
    seen.whole_s.append(time.perf_counter() - sent_s)
    seen.num_pages += 1


def run_client(
    url: str, model: str, *, num_pages: int, concurrency: int, kind: str = "card", extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The same from a process of its own: the summary of `Seen`.

    Raises:
        RuntimeError: an answer was not whole.
    """
    command = [sys.executable, "-m", "benchmarks.pages_client", url, "--model", model, "--kind", kind]
    command += ["--pages", str(num_pages), "--concurrency", str(concurrency), "--extra", json.dumps(extra or {})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the pages sent to {url} were not read: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(
    url: str,
    model: Annotated[str, typer.Option()] = "nano",
    pages: Annotated[int, typer.Option(min=1)] = 16,
    concurrency: Annotated[int, typer.Option(min=1)] = 4,
    kind: Annotated[str, typer.Option(help="card or a4.")] = "card",
    extra: Annotated[str, typer.Option(help="More of every request's body, as JSON.")] = "{}",
) -> None:
    """Read pages and print what came."""
    bodies = build_bodies(model, build_pages(pages, kind), json.loads(extra))
    print(json.dumps(uvloop.run(read_pages(url, bodies, concurrency)).summary()))


if __name__ == "__main__":
    typer.run(main)
