"""Tenants' limits: requests and tokens per minute, and concurrent requests. Pure; the clock is passed in.

`requests_per_minute` is one allowance for all kinds: a request that generates counts as one, and so does a document
(each of its pages comes back from the OCR service as another), a quote or a report; polling a job counts as a tenth.

`max_concurrent` applies to each kind separately: requests that generate, documents, and lookups. Otherwise a document
would wait for its own pages, and polling a job would be refused while its pages are read.

Every router keeps its own buckets and debits what the other routers report to have admitted, so that a limit holds for
all of them together, to within what a tenant sends in one report interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from serving.cluster.directory import RouterReport, TenantUse
from serving.errors import RateLimitError
from serving.settings.tenants import Identity, Tenant

_MINUTE_S = 60.0
_FORGET_S = 600.0
_SWEEP_S = 60.0
_POLL_WEIGHT = 0.1
_CONCURRENT_RETRY_S = 1.0  # it is unknown when one of the tenant's requests will end


class RequestKind(StrEnum):
    """Kinds of concurrent requests; `max_concurrent` applies to each. The value is part of a refusal's message."""

    GENERATION = "requests"
    DOCUMENT = "documents"
    LOOKUP = "lookups"


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request counts as."""

    kind: RequestKind
    weight: float = 1.0
    """Requests that it counts as, against the requests per minute."""


GENERATION = Charge(RequestKind.GENERATION)
DOCUMENT = Charge(RequestKind.DOCUMENT)
COUNTED_DOCUMENT = Charge(RequestKind.DOCUMENT, weight=0.0)
"""One whose request was counted before its body was read, as something else."""
LOOKUP = Charge(RequestKind.LOOKUP)
POLL = Charge(RequestKind.LOOKUP, _POLL_WEIGHT)


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one minute's allowance. It counts what is missing, so that a changed limit keeps the
    debt."""

    limit: int
    """Per minute, and the size of the bucket."""
    as_of_s: float
    used: float = 0.0
    """Missing from a full bucket; above `limit` the bucket is in debt, from requests that turned out larger than
    expected."""

    def take(self, n: float, now_s: float) -> float:
        """Take n out if they are available.

        More than the whole limit is allowed if the bucket is full, since it would never be otherwise; the debt keeps
        the tenant to its rate.

        Returns:
            0 if they were taken; otherwise nothing is taken, and the seconds until they are available are returned.
        """
        self._refill(now_s)
        missing = min(self.used, self.used + n - self.limit)
        if missing > 0:
            return missing * _MINUTE_S / self.limit
        self.used += n
        return 0.0

    def debit(self, n: float, now_s: float) -> None:
        """Take n out, available or not; a negative n puts them back, as far as they fit."""
        self._refill(now_s)
        self.used = max(0.0, self.used + n)

    def remaining(self, now_s: float) -> int:
        self._refill(now_s)
        return max(0, int(self.limit - self.used))

    def reset_s(self, now_s: float) -> float:
        """Seconds until it is full again if nothing more is taken."""
        self._refill(now_s)
        return self.used * _MINUTE_S / self.limit

    def _refill(self, now_s: float) -> None:
        if now_s > self.as_of_s:
            self.used = max(0.0, self.used - (now_s - self.as_of_s) * self.limit / _MINUTE_S)
            self.as_of_s = now_s


@dataclass(slots=True)
class _State:
    """One tenant in this router."""

    last_seen_s: float
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: Counter[RequestKind] = field(default_factory=Counter)
    num_requests: float = 0
    num_charged: int = 0
    """Tokens that were reserved or, once known, actually used."""
    num_reported: int = 0
    """The maximum of `num_charged` so far: it decreases when a reservation was too high, but totals in reports never
    do."""

    def fit(self, tenant: Tenant, now_s: float) -> None:
        """Adopt the tenant's current limits."""
        self.last_seen_s = now_s
        self.requests = _fit(self.requests, tenant.requests_per_minute, now_s)
        self.tokens = _fit(self.tokens, tenant.tokens_per_minute, now_s)

    def is_forgettable(self, now_s: float) -> bool:
        is_full = all(bucket is None or not bucket.reset_s(now_s) for bucket in (self.requests, self.tokens))
        return is_full and not self.running.total() and now_s - self.last_seen_s > _FORGET_S

    def charge(self, num_tokens: int) -> None:
        self.num_charged += num_tokens
        self.num_reported = max(self.num_reported, self.num_charged)


def _fit(bucket: Bucket | None, limit: int | None, now_s: float) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, now_s)
    if bucket.limit != limit:
        bucket.debit(0, now_s)  # it filled at the old rate until now
        bucket.limit = limit
    return bucket


@dataclass(slots=True)
class TenantLimits:
    """The limits of all tenants in one router. `clock` is the one that every `now_s` comes from."""

    clock: Callable[[], float]
    _states: dict[str, _State] = field(default_factory=dict)
    _seen: dict[str, dict[str, TenantUse]] = field(default_factory=dict)
    """By router and tenant: the last reports."""
    _running_elsewhere: Counter[tuple[str, RequestKind]] = field(default_factory=Counter)
    _swept_s: float = 0.0

    def admit(self, identity: Identity, now_s: float, charge: Charge = GENERATION) -> None:
        """Count an arriving request; `leave` with the same charge must follow.

        Raises:
            RateLimitError: the tenant has too many requests at once or in this minute; nothing was counted.
        """
        state = self._state(identity, now_s)
        most, kind = identity.tenant.max_concurrent, charge.kind
        if most is not None and state.running[kind] + self._running_elsewhere[identity.tenant_id, kind] >= most:
            raise RateLimitError(f"Rate limit reached: {most} {kind} at once.", _CONCURRENT_RETRY_S)
        if state.requests is not None:
            wait_s = state.requests.take(charge.weight, now_s)
            if wait_s > 0:
                raise RateLimitError(f"Rate limit reached: {state.requests.limit} requests per minute.", wait_s)
        state.running[kind] += 1
        state.num_requests += charge.weight

    def reserve_tokens(self, identity: Identity, n: int, now_s: float) -> None:
        """Take the tokens that a request is expected to use. `settle` must follow.

        Raises:
            RateLimitError: the tenant has used up this minute's tokens; nothing was taken.
        """
        state = self._state(identity, now_s)
        if state.tokens is not None:
            wait_s = state.tokens.take(n, now_s)
            if wait_s > 0:
                message = f"Rate limit reached: {state.tokens.limit} tokens per minute, about {n} asked for."
                raise RateLimitError(message, wait_s)
        state.charge(n)

    def settle(self, identity: Identity, reserved: int, used: int, now_s: float) -> None:
        """Replace what was reserved for a request by what it actually used."""
        state = self._state(identity, now_s)
        if state.tokens is not None:
            state.tokens.debit(used - reserved, now_s)
        state.charge(used - reserved)

    def leave(self, identity: Identity, charge: Charge = GENERATION) -> None:
        """An admitted request has ended, in whatever way."""
        state = self._states.get(identity.tenant_id)
        if state is not None and state.running[charge.kind] > 0:
            state.running[charge.kind] -= 1

    def headers(self, identity: Identity, now_s: float) -> list[tuple[bytes, bytes]]:
        """The rate limit headers that OpenAI's clients know; a limit that is not set has none.

        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
        """
        tenant = identity.tenant
        if tenant.requests_per_minute is None and tenant.tokens_per_minute is None:
            return []
        state = self._state(identity, now_s)
        found: list[tuple[bytes, bytes]] = []
        for kind, bucket in ((b"requests", state.requests), (b"tokens", state.tokens)):
            if bucket is not None:
                found += [
                    (b"x-ratelimit-limit-" + kind, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + kind, b"%d" % bucket.remaining(now_s)),
                    (b"x-ratelimit-reset-" + kind, format_duration(bucket.reset_s(now_s)).encode()),
                ]
        return found

    def uses(self) -> tuple[tuple[str, TenantUse], ...]:
        """Every tenant's totals, for this router's report."""
        self._sweep(self.clock())
        return tuple(
            (
                tenant_id,
                TenantUse(state.num_requests, state.num_reported, *(state.running[kind] for kind in RequestKind)),
            )
            for tenant_id, state in self._states.items()
        )

    def absorb(self, reports: tuple[RouterReport, ...]) -> None:
        """Debit what the other routers have admitted since their last reports.

        A router's first report is a baseline. A total that has decreased belongs to a tenant that the other router
        forgot and saw again. A tenant that this router has never seen has no bucket yet and starts with a full one.
        """
        now_s = self.clock()
        seen: dict[str, dict[str, TenantUse]] = {}
        running: Counter[tuple[str, RequestKind]] = Counter()
        for report in reports:
            known = self._seen.get(report.router_id)
            seen[report.router_id] = dict(report.tenants)
            for tenant_id, use in report.tenants:
                for kind, number in zip(
                    RequestKind, (use.num_running, use.num_documents, use.num_lookups), strict=True
                ):
                    running[tenant_id, kind] += number
                if known is not None:
                    self._debit(tenant_id, known.get(tenant_id, TenantUse()), use, now_s)
        self._seen, self._running_elsewhere = seen, running

    def _debit(self, tenant_id: str, before: TenantUse, now: TenantUse, now_s: float) -> None:
        state = self._states.get(tenant_id)
        if state is None:
            return
        if now.num_requests < before.num_requests or now.num_tokens < before.num_tokens:
            before = TenantUse()
        if state.requests is not None and now.num_requests > before.num_requests:
            state.requests.debit(now.num_requests - before.num_requests, now_s)
        if state.tokens is not None and now.num_tokens > before.num_tokens:
            state.tokens.debit(now.num_tokens - before.num_tokens, now_s)

    def _state(self, identity: Identity, now_s: float) -> _State:
        state = self._states.get(identity.tenant_id)
        if state is None:
            state = self._states[identity.tenant_id] = _State(now_s)
        state.fit(identity.tenant, now_s)
        return state

    def _sweep(self, now_s: float) -> None:
        if now_s - self._swept_s < _SWEEP_S:
            return
        self._swept_s = now_s
        for tenant_id in [key for key, state in self._states.items() if state.is_forgettable(now_s)]:
            del self._states[tenant_id]


def format_duration(seconds: float) -> str:
    """A duration as OpenAI writes it, in Go's format: `0s`, `120ms`, `1s`, `1.5s`, `6m0s`, `1h0m0s`; rounded up to the
    millisecond, so that a client that waits for it has waited long enough."""
    millis = math.ceil(round(seconds * 1000, 3))  # not 1101 ms for 1.1 s, which is slightly more in binary
    if millis <= 0:
        return "0s"
    if millis < 1000:
        return f"{millis}ms"
    whole, rest = divmod(millis, 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{whole}.{rest:03d}".rstrip("0") if rest else str(whole)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"
