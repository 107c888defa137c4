"""The record of a request that has ended: the ledger's row, and what metrics count. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended. Every request has exactly one outcome."""

    COMPLETED = "completed"
    ABORTED = "aborted"
    """The client left; what had been generated is billed."""
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    """The stack failed it, possibly after some tokens."""
    REFUSED = "refused"
    """Not run by an engine; costs nothing."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one request as its engine counted them."""

    num_prompt_tokens: int = 0
    """The whole prompt, including image and cached tokens."""
    num_image_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LostTry:
    """What a replica counted for a request that it did not answer: reconciled with its counters, not billed."""

    replica_id: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, however it ended. Times are nanoseconds since the epoch (UTC)."""

    request_id: str
    """The answer's `x-request-id`, made unique by the router if the client chose it."""
    tenant_id: str
    key_id: str
    model: str
    """Canonical name; empty if the request named no existing model."""
    route: str
    """`/v1/chat/completions`, ..."""
    outcome: Outcome
    status: int
    """HTTP status that the client received, or 499 if it left before receiving one."""
    error_code: str = ""
    """OpenAI's error `code`; empty without an error."""
    modes: tuple[str, ...] = ()
    """Resolution mode of every image."""
    num_pages: int = 0
    """Number of images in the request."""
    tokens: TokenCounts = TokenCounts()
    is_estimated: bool = False
    """Whether `tokens` is an estimate, since the engine that counted them was lost."""
    num_wasted_tokens: int = 0
    """Generated in vain: by replicas that failed before a retry, and repetitions that were cut."""
    cost_nanodollars: int = 0
    price_version: str = ""
    replica_id: str = ""
    num_tries: int = 0
    finish_reason: str = ""
    """OpenAI's, of the first choice: `stop`, `length`, ..."""
    arrived_ns: int = 0
    first_byte_ns: int = 0
    """0 if no byte of an answer was sent."""
    ended_ns: int = 0
    queue_wait_ns: int = 0
    """How long it was queued for a replica."""
    priority: str = "normal"
    is_stream: bool = False
    router_id: str = ""
    """The router process that wrote it; a restarted router has a new id."""
    lost_tries: tuple[LostTry, ...] = ()
    """Tries before the last one, if their replicas survived to count them."""
    credit_nanodollars: int = 0
    """Deducted from its price, since earlier requests for the same page of a job were charged that much: see
    `credits`."""
