"""The engines' own counters: read by `GET <replica>/usage`, and stored in files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from serving.billing.reconcile import CounterReading, Totals

_NAMES = ("started_ns", "prompt_tokens", "completion_tokens", "requests")


class CountersError(Exception):
    """Counters that cannot be read; the message names the replica or the file."""


@dataclass(frozen=True, slots=True)
class Readings:
    """All replicas' counters, read at about the same time."""

    time_ns: int
    """Taken before the first was read."""
    replicas: Mapping[str, CounterReading]


def parse_reading(given: Any, source: str) -> CounterReading:
    """Read a replica's JSON object.

    Raises:
        CountersError: it is none.
    """
    numbers: list[Any] = [given.get(name) for name in _NAMES] if isinstance(given, dict) else []
    if len(numbers) != len(_NAMES) or any(type(number) is not int or number < 0 for number in numbers):
        raise CountersError(f"{source} does not return the counts {', '.join(_NAMES)}")
    started_ns, prompt_tokens, completion_tokens, requests = numbers
    return CounterReading(started_ns, Totals(prompt_tokens, completion_tokens, requests))


async def fetch_readings(
    base_urls: Mapping[str, str], *, time_ns: int, api_key: str | None = None, timeout_s: float = 10.0
) -> Readings:
    """Fetch the counters of every replica, by id.

    Raises:
        CountersError: one cannot be asked.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        readings = await asyncio.gather(*(_fetch(session, name, url) for name, url in base_urls.items()))
    return Readings(time_ns, dict(zip(base_urls, readings, strict=True)))


async def _fetch(session: aiohttp.ClientSession, replica_id: str, base_url: str) -> CounterReading:
    url = f"{base_url.rstrip('/')}/usage"
    try:
        async with session.get(url) as answer:
            text = await answer.read()
            if answer.status != 200:
                raise CountersError(f"{replica_id} ({url}) answers {answer.status}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CountersError(f"{replica_id} ({url}) cannot be reached: {error!r}") from error
    try:
        return parse_reading(orjson.loads(text), f"{replica_id} ({url})")
    except orjson.JSONDecodeError as error:
        raise CountersError(f"{replica_id} ({url}) does not answer with JSON") from error


def load_readings(file: Path) -> Readings:
    """Load what `save_readings` has written.

    Raises:
        CountersError: the file holds none.
    """
    try:
        given = orjson.loads(file.read_bytes())
        replicas = {name: parse_reading(part, f"{file}: {name}") for name, part in given["replicas"].items()}
        return Readings(int(given["time_ns"]), replicas)
    except OSError as error:
        raise CountersError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CountersError(f"{file}: holds no readings of counters") from error


def save_readings(file: Path, readings: Readings) -> None:
    """Save readings, as the baseline of a later comparison."""
    replicas = {
        name: {"started_ns": reading.started_ns, **asdict(reading.totals)}
        for name, reading in readings.replicas.items()
    }
    file.write_text(json.dumps({"time_ns": readings.time_ns, "replicas": replicas}, indent=2) + "\n")
