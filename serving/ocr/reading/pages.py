"""Reads one page: a client of the OpenAI API that retries where a retry can help.

A page on which the model started to repeat itself (`finish_reason` "length", `stop_reason` "repetition") is read again
in another resolution mode. A request that was refused temporarily, or whose answer broke off, is repeated. Every
attempt is charged, but only once: what a page was charged before its service died is deducted.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from serving.billing.credits import CREDIT_HEADER, SignCredit
from serving.errors import ModeNotSupportedError
from serving.http.retry_after import read_retry_after
from serving.ocr.reading.request import ReadRequest
from serving.ocr.rendering.pool import DrawnPage
from serving.ocr_api.options import RESOLUTION_MODES
from serving.settings.ocr import ReadSettings

NANO_PER_DOLLAR = 10**9

_ONE_MODE = ModeNotSupportedError.default_code
_REPETITION = "repetition"
_TRANSIENT = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Statuses that are worth a retry."""
_FIRST_PAUSE_S = 0.25
_MAX_FRAME_BYTES = 2**20
_DATA = b"data:"
_DONE = b"[DONE]"
_FRAMING = re.compile("<｜(?:begin▁of▁sentence|end▁of▁sentence|▁pad▁)｜>")
"""Special tokens that are not part of a page. vLLM omits the one that ends an answer; other servers may not."""


@dataclass(frozen=True, slots=True)
class PageUsage:
    """Tokens and cost of a page; the cost is in whole nanodollars so that sums are exact."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    cost_nanodollars: int = 0

    def __add__(self, other: PageUsage) -> PageUsage:
        return PageUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.image_tokens + other.image_tokens,
            self.cost_nanodollars + other.cost_nanodollars,
        )


@dataclass(frozen=True, slots=True)
class PageFailure:
    """Why a page failed."""

    code: str
    message: str
    status: int | None = None
    """HTTP status of the router's answer; None when there was no answer."""


@dataclass(frozen=True, slots=True)
class TryStarted:
    """An attempt starts. It invalidates all earlier deltas."""

    number: int
    """Counted from 1."""
    mode: str | None


@dataclass(frozen=True, slots=True)
class Delta:
    text: str


@dataclass(frozen=True, slots=True)
class PageReading:
    """The end of a page: its text, or the failure with the text of the last attempt as far as it got."""

    texts: tuple[str, ...]
    """What was read of each part of the page; most pages have one."""
    usage: PageUsage
    """Sum over all attempts that reported usage; one that broke off reports none. Includes the page's credit."""
    num_tries: int
    """Attempts at all parts together."""
    mode: str | None
    """Resolution mode of the last attempt: as reported by the router, or else as requested."""
    is_cut: bool = False
    """Whether the answer ended because it reached a limit on its length."""
    failure: PageFailure | None = None
    credit_nanodollars: int = 0
    """What is left of the page's credit for further parts of it."""

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "\n\n".join(self.texts)

    @property
    def num_retries(self) -> int:
        """Attempts beyond the first of each part."""
        return max(0, self.num_tries - len(self.texts))


Event = TryStarted | Delta | PageReading


@dataclass(slots=True)
class _Try:
    """The result of one request so far."""

    texts: list[str] = field(default_factory=list)
    usage: PageUsage = field(default_factory=PageUsage)
    credited_nanodollars: int = 0
    mode: str | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    failure: PageFailure | None = None
    is_transient: bool = False
    """Whether another attempt may succeed."""
    wait_s: float | None = None
    """Wait that the router asked for (`Retry-After`)."""
    is_refused: bool = False
    """Whether the request was refused because the tenant or the stack is busy, and nothing was attempted."""

    def fail(self, code: str, message: str, *, status: int | None = None, is_transient: bool) -> None:
        self.failure, self.is_transient = PageFailure(code, message, status), is_transient

    @property
    def has_looped(self) -> bool:
        return self.finish_reason == "length" and self.stop_reason == _REPETITION


class PageReader:
    """Reads pages through one router. Use it inside one event loop, as an async context."""

    def __init__(
        self,
        base_url: str | Callable[[], str],
        settings: ReadSettings,
        *,
        max_connections: int = 64,
        sign_credit: SignCredit | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            base_url: the router's, without `/v1`; or a function that chooses one for each attempt.
            settings: limits on attempts and times.
            max_connections: concurrent requests; further pages wait.
            sign_credit: signs what a page was charged before, which also proves to the router that the request comes
                from a service of its stack. Without it the router treats the request as any client's.
        """
        self._sign_credit = sign_credit
        self._choose_router = base_url if callable(base_url) else lambda: base_url
        self._settings = settings
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> PageReader:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self._settings.silence_timeout_s),
            read_bufsize=_MAX_FRAME_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def read(
        self, image: DrawnPage, request: ReadRequest, index: int, before: PageReading | None = None
    ) -> AsyncGenerator[Event]:
        """Read one page; the last event is its PageReading. Closing the generator cancels the request.

        Args:
            image: the page, or a part of it.
            request: what is read, and how.
            index: the page's, counted from 0.
            before: the reading of the parts of the same page that precede this one. The last event includes it.
        """
        deadline_s = asyncio.get_running_loop().time() + self._settings.page_timeout_s
        url = image.as_url()
        mode: str | None = request.options.mode
        credit_nanodollars = request.charged.get(index, 0) if before is None else before.credit_nanodollars
        spent = PageUsage(cost_nanodollars=credit_nanodollars) if before is None else before.usage
        num_before = before.num_tries if before is not None else 0
        tried_modes: list[str] = []
        num_refusals = 0
        looped: _Try | None = None
        for number in itertools.count(1):
            yield TryStarted(num_before + number, mode)
            attempt = _Try(mode=mode)
            headers = self._build_headers(request, index, num_before + number, credit_nanodollars)
            async for text in self._ask(build_body(url, request, mode), headers, attempt, deadline_s):
                yield Delta(text)
            spent += attempt.usage
            credit_nanodollars -= attempt.credited_nanodollars
            if looped is not None and attempt.failure is not None and attempt.failure.code == _ONE_MODE:
                attempt = looped  # there is no other mode to try
                break
            num_refusals += attempt.is_refused
            another = self._plan(attempt, mode, tried_modes, number - num_refusals, deadline_s)
            if another is None:
                break
            pause_s, mode = another
            looped = attempt if attempt.has_looped else looped
            await asyncio.sleep(pause_s)
        text, is_cut = "".join(attempt.texts), attempt.finish_reason == "length"
        texts = (*before.texts, text) if before is not None else (text,)
        is_cut = is_cut or (before is not None and before.is_cut)
        yield PageReading(
            texts, spent, num_before + number, attempt.mode, is_cut, attempt.failure, max(0, credit_nanodollars)
        )

    def _plan(
        self, attempt: _Try, mode: str | None, tried_modes: list[str], number: int, deadline_s: float
    ) -> tuple[float, str | None] | None:
        """The pause before the next attempt, and its mode; None when this attempt was the last.

        `number` excludes refusals: they cost nothing, and are limited by the page's time only.
        """
        if attempt.failure is None and attempt.has_looped:
            attempt.fail("repetition", "The model kept repeating itself on this page.", is_transient=True)
            if attempt.mode is not None:
                tried_modes.append(attempt.mode)
            mode = find_other_mode(attempt.mode, tried_modes)
            if mode is None:
                return None
            pause_s = 0.0
        elif attempt.failure is None or not attempt.is_transient:
            return None
        else:
            # Random, so that pages that were refused together do not all retry together.
            own_s = _FIRST_PAUSE_S * 2 ** max(0, number - 1) * random.uniform(0.5, 1.0)
            pause_s = own_s if attempt.wait_s is None else attempt.wait_s + own_s
        left_s = deadline_s - asyncio.get_running_loop().time()
        if number >= self._settings.max_tries or (attempt.wait_s or 0) > self._settings.max_wait_s or pause_s >= left_s:
            return None
        return pause_s, mode

    async def _ask(
        self, body: bytes, headers: Mapping[str, str], attempt: _Try, deadline_s: float
    ) -> AsyncGenerator[str]:
        """Send one request: yields pieces of text as they arrive, and stores the rest in `attempt`."""
        assert self._session is not None
        url = self._choose_router().rstrip("/") + "/v1/chat/completions"
        try:
            async with asyncio.timeout_at(deadline_s):
                content = io.BytesIO(body)  # aiohttp would send bytes in one write and block the event loop
                async with self._session.post(url, data=content, headers=headers, allow_redirects=False) as answer:
                    if answer.status != 200:
                        _note_refusal(
                            attempt, answer.status, answer.headers, await answer.content.read(_MAX_FRAME_BYTES)
                        )
                        return
                    is_done = False
                    async for line in answer.content:
                        is_done = is_done or line[len(_DATA) :].strip() == _DONE
                        text = _take_frame(line, attempt)
                        if text:
                            attempt.texts.append(text)
                            yield text
                    if attempt.failure is None and not is_done:
                        attempt.fail("connection_lost", "The answer broke off.", is_transient=True)
        except TimeoutError:
            is_over = asyncio.get_running_loop().time() >= deadline_s
            attempt.fail("timeout", "The page was not read within its time limit.", is_transient=not is_over)
        except (aiohttp.ClientError, OSError):
            attempt.fail(
                "connection_lost", "The router could not be reached, or its answer broke off.", is_transient=True
            )
        except ValueError:
            attempt.fail("bad_answer", "The router's answer is not one of the OpenAI API.", is_transient=False)

    def _build_headers(self, request: ReadRequest, index: int, number: int, credit_nanodollars: int) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if request.api_key is not None:
            headers["authorization"] = f"Bearer {request.api_key}"
        headers["x-request-id"] = request_id = f"{request.request_id}-p{index + 1}-t{number}"
        if self._sign_credit is not None:
            headers[CREDIT_HEADER] = self._sign_credit(request_id, credit_nanodollars)
        return headers


def find_other_mode(mode: str | None, tried: list[str]) -> str | None:
    """The mode in which to retry a page with repetitions: first those with more tokens, then those with fewer."""
    modes: tuple[str, ...] = RESOLUTION_MODES
    start = modes.index(mode) if mode in modes else len(modes) - 1
    order = (*modes[start + 1 :], *reversed(modes[:start]))
    return next((name for name in order if name not in tried), None)


def build_body(url: str, request: ReadRequest, mode: str | None) -> bytes:
    """The chat request that reads the page at this URL. With a mode of None the server chooses."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.prompt}]
    body: dict[str, Any] = {
        "model": request.options.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Box markup consists of special tokens, and in some tokenizers table cells do too. Other servers omit special
        # tokens by default.
        "skip_special_tokens": False,
    }
    if mode is not None:
        body["mm_processor_kwargs"] = {"mode": mode}
    if request.options.max_tokens is not None:
        body["max_tokens"] = request.options.max_tokens
    return orjson.dumps(body)


def _note_refusal(attempt: _Try, status: int, headers: Mapping[str, str], body: bytes) -> None:
    try:
        error = orjson.loads(body)["error"]
        code, message = str(error["code"] or error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "bad_answer", f"The router answered {status}."
    # An exhausted budget is a 429 too, but waiting does not help.
    attempt.fail(code, message, status=status, is_transient=status in _TRANSIENT and code != "insufficient_quota")
    attempt.wait_s = read_retry_after(headers)
    attempt.is_refused = attempt.is_transient and status in (429, 503) and attempt.wait_s is not None


def _take_frame(line: bytes, attempt: _Try) -> str:
    """The text in one line of the stream. Everything else in the line is stored in `attempt`.

    Raises:
        ValueError: the line does not follow the OpenAI API.
    """
    if not line.startswith(_DATA) or line[len(_DATA) :].strip() == _DONE:
        return ""
    try:
        frame = orjson.loads(line[len(_DATA) :])
        if frame.get("error") is not None:
            error = frame["error"]
            attempt.fail(str(error.get("code")), str(error.get("message")), is_transient=True)
            return ""
        if isinstance(frame.get("usage"), dict):
            _take_usage(frame["usage"], attempt)
        if not frame.get("choices"):
            return ""
        choice = frame["choices"][0]
        attempt.finish_reason = choice.get("finish_reason") or attempt.finish_reason
        attempt.stop_reason = choice.get("stop_reason") or attempt.stop_reason
        return _FRAMING.sub("", str((choice.get("delta") or {}).get("content") or ""))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("not a frame") from error


def _take_usage(usage: dict[str, Any], attempt: _Try) -> None:
    details = usage.get("prompt_tokens_details") or {}
    modes = details.get("image_modes") or ()
    attempt.mode = modes[0] if modes else attempt.mode
    attempt.usage = PageUsage(
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        int(details.get("image_tokens") or 0),
        _read_nanodollars(usage, "estimated_cost"),
    )
    attempt.credited_nanodollars = _read_nanodollars(usage, "credited_cost")


def _read_nanodollars(usage: dict[str, Any], name: str) -> int:
    """The router sends whole nanodollars as a float of dollars."""
    return round(float(usage.get(name) or 0) * NANO_PER_DOLLAR)
