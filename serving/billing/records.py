"""What is known of one request when it has ended: the row of the ledger, and what metrics count. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended. Every request ends in exactly one of these."""

    COMPLETED = "completed"
    ABORTED = "aborted"
    """The client left; what was generated until then is billed."""
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    """The stack failed it, perhaps after some tokens."""
    REFUSED = "refused"
    """Never given to an engine: cost 0."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one request as its engine counted them."""

    num_prompt_tokens: int = 0
    """All of the prompt, image and cached tokens included."""
    num_image_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LostTry:
    """What a replica counted for a request that it did not answer: reconciled with its counters, billed to nobody."""

    replica_id: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, whatever its end. Times are nanoseconds since the epoch (UTC)."""

    request_id: str
    """The one that the answer's `x-request-id` shows, made unique by the router if the client repeats itself."""
    tenant_id: str
    key_id: str
    model: str
    """Canonical name; empty when the request named none that exists."""
    route: str
    """`/v1/chat/completions`, ..."""
    outcome: Outcome
    status: int
    """HTTP status that the client saw, or would have seen: 499 when it had left before any."""
    error_code: str = ""
    """OpenAI's `code` of the error, empty without one."""
    modes: tuple[str, ...] = ()
    """Resolution mode of every image."""
    num_pages: int = 0
    """Images of the request."""
    tokens: TokenCounts = TokenCounts()
    is_estimated: bool = False
    """Whether `tokens` is an estimate, since the engine that could have said so was lost."""
    num_wasted_tokens: int = 0
    """Generated for nobody: by replicas that failed before a retry, and repetitions that were cut."""
    cost_nanodollars: int = 0
    price_version: str = ""
    replica_id: str = ""
    num_tries: int = 0
    finish_reason: str = ""
    """OpenAI's, of the first choice: `stop`, `length`, ..."""
    arrived_ns: int = 0
    first_byte_ns: int = 0
    """0 when no byte of an answer came."""
    ended_ns: int = 0
    queue_wait_ns: int = 0
    """How long it waited for a replica with room."""
    priority: str = "normal"
    is_stream: bool = False
    router_id: str = ""
    """The life of the router that wrote it; another life of it has another id."""
    lost_tries: tuple[LostTry, ...] = ()
    """Tries before the last one whose replicas lived to count them."""
    credit_nanodollars: int = 0
    """Taken off its price, since earlier requests for the same page of a job were charged that much: see `credits`."""
