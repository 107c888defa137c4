"""One request over HTTP, timed at each event as it is read. For gevent: Locust's processes are its only users.

The client is the one under Locust's FastHttpUser, used directly: that class stops its clock at the headers of a stream,
and its way to read lines waits for full kilobytes, which would hide every gap between tokens.
"""

from __future__ import annotations

import time
from http.client import HTTPException
from typing import Any

import orjson
from geventhttpclient.client import HTTPClientPool
from geventhttpclient.url import URL

from benchmarks.load.people import Manner, Step
from benchmarks.load.tally import Answer, Outcome

_EVENT_END = b"\n\n"
_DATA = b"data: "
_REFUSALS = (429, 503)
_PATH = "/v1/chat/completions"
FAILURES = (OSError, HTTPException, ValueError)
"""What a connection that breaks raises here: sockets' errors, the HTTP parser's, and half a JSON document."""


class PagesClient:
    """Connections to one address, kept and shared by all users of this process."""

    def __init__(self, base_url: str, api_key: str = "", *, timeout_s: float = 120.0) -> None:
        self._url = URL(base_url)
        # As many connections as users: a pool that makes them wait would measure itself.
        self._pool = HTTPClientPool(concurrency=100_000, network_timeout=timeout_s, connection_timeout=10.0)
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def ask(self, body: bytes, step: Step) -> Answer:
        """Send it and see it through to its end, or to where its user leaves. Never raises for what a server does."""
        sent_s = time.perf_counter()
        try:
            response = self._pool.get_client(self._url).request("POST", _PATH, body=body, headers=self._headers)
            with response:
                if response.status_code != 200:
                    return _refused(step.manner, response, time.perf_counter() - sent_s)
                if step.manner is Manner.WHOLE:
                    return _read_whole(response, sent_s)
                return _read_stream(response, step, sent_s)
        except FAILURES as error:
            return Answer(step.manner, Outcome.ERROR, time.perf_counter() - sent_s, reason=type(error).__name__)


def _refused(manner: Manner, response: Any, took_s: float) -> Answer:
    status = response.status_code
    try:
        code = orjson.loads(bytes(response.read()))["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        code = "without a code"
    is_refusal = status in _REFUSALS and response.get("retry-after") is not None
    return Answer(manner, Outcome.REFUSED if is_refusal else Outcome.ERROR, took_s, reason=f"{status} {code}")


def _read_whole(response: Any, sent_s: float) -> Answer:
    found = orjson.loads(bytes(response.read()))
    return _complete(Manner.WHOLE, time.perf_counter() - sent_s, found["usage"])


def _read_stream(response: Any, step: Step, sent_s: float) -> Answer:
    first_s: float | None = None
    last_s, gaps_s, usage, is_done = sent_s, [], None, False
    while event := response.readline(_EVENT_END):
        now_s = time.perf_counter()
        data = bytes(event).strip().removeprefix(_DATA)
        if data == b"[DONE]":
            is_done = True
            continue
        found = orjson.loads(data)
        if "error" in found:
            reason = f"told in the stream: {found['error'].get('code')}"
            return Answer(step.manner, Outcome.ERROR, now_s - sent_s, reason=reason)
        usage = found.get("usage") or usage
        if any(choice["delta"].get("content") for choice in found["choices"]):
            if first_s is None:
                first_s = now_s - sent_s
            else:
                gaps_s.append(now_s - last_s)
            last_s = now_s
            if step.manner is Manner.LEAVES and len(gaps_s) + 1 >= step.leaves_after:
                return Answer(step.manner, Outcome.LEFT, now_s - sent_s, first_s, tuple(gaps_s))
    whole_s = time.perf_counter() - sent_s
    if not is_done or usage is None:
        return Answer(step.manner, Outcome.ERROR, whole_s, reason="the stream ended without [DONE]")
    return _complete(step.manner, whole_s, usage, first_s, tuple(gaps_s))


def _complete(
    manner: Manner, whole_s: float, usage: dict[str, Any], first_s: float | None = None, gaps_s: tuple[float, ...] = ()
) -> Answer:
    num_pages = 0 if manner is Manner.TEXT else 1
    dollars = float(usage.get("estimated_cost") or 0.0)  # a bare vLLM server knows no prices
    return Answer(
        manner, Outcome.COMPLETE, whole_s, first_s, gaps_s, usage["completion_tokens"], num_pages, dollars
    )  # fmt: skip
