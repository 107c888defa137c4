"""The stack's own costs and margins by model and tenant, in whole nanodollars. Pure.

A replica costs its model's dollars per hour from its start until it was last seen. Time without requests is idle; the
rest is split among tenants by the tokens computed for them. Parts add up to the whole exactly: what division leaves
over is distributed, nanodollar by nanodollar, to the largest remainders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serving.billing.periods import NS_PER_HOUR, Window

_MILLION = 10**6
_THOUSAND = 1000


@dataclass(frozen=True, slots=True)
class Uptime:
    """One replica's uptime within a window."""

    replica_id: str
    model: str
    up_ns: int
    busy_ns: int
    """The part of it with at least one request."""
    nanodollars_per_hour: int


@dataclass(frozen=True, slots=True)
class TenantWork:
    """The work that one model did for one tenant within a window."""

    model: str
    tenant_id: str
    num_requests: int = 0
    num_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    wasted_tokens: int = 0
    revenue_nanodollars: int = 0

    @property
    def computed_tokens(self) -> int:
        """The engine's work: cached tokens cost it nothing, wasted ones did."""
        return max(0, self.prompt_tokens - self.cached_tokens) + self.completion_tokens + self.wasted_tokens

    @property
    def tokens(self) -> int:
        """What the tenant received."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class CostLine:
    """Cost and revenue of a model, or of one tenant with it."""

    model: str
    tenant_id: str
    """Empty: all tenants, idle time included."""
    num_requests: int
    num_pages: int
    num_tokens: int
    revenue_nanodollars: int
    spend_nanodollars: int
    idle_nanodollars: int = 0
    """The part of it for idle time."""

    @property
    def margin_nanodollars(self) -> int:
        """Revenue minus spend; a loss if negative."""
        return self.revenue_nanodollars - self.spend_nanodollars

    @property
    def per_million_tokens_nanodollars(self) -> int | None:
        """Spend per million tokens; None without tokens."""
        return _divide(self.spend_nanodollars * _MILLION, self.num_tokens) if self.num_tokens else None

    @property
    def per_thousand_pages_nanodollars(self) -> int | None:
        """Spend per thousand pages; None without pages."""
        return _divide(self.spend_nanodollars * _THOUSAND, self.num_pages) if self.num_pages else None


def cost_of_time(duration_ns: int, nanodollars_per_hour: int) -> int:
    """The cost of a duration; half a nanodollar is rounded up."""
    return _divide(duration_ns * nanodollars_per_hour, NS_PER_HOUR)


def split(amount: int, weights: Sequence[int]) -> list[int]:
    """Split an amount by weights. The parts add up to it, and each differs from its exact share by less than 1.

    If all weights are 0, so are all parts.
    """
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    parts = [amount * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(amount * weights[i] % whole), i))
    for i in order[: amount - sum(parts)]:
        parts[i] += 1
    return parts


def report_costs(uptimes: Iterable[Uptime], work: Iterable[TenantWork]) -> list[CostLine]:
    """One line for every model and one for each of its tenants, in alphabetical order."""
    spend: defaultdict[str, int] = defaultdict(int)
    idle: defaultdict[str, int] = defaultdict(int)
    for uptime in uptimes:
        whole = cost_of_time(uptime.up_ns, uptime.nanodollars_per_hour)
        spend[uptime.model] += whole
        idle[uptime.model] += whole - min(whole, cost_of_time(uptime.busy_ns, uptime.nanodollars_per_hour))
    by_model: defaultdict[str, list[TenantWork]] = defaultdict(list)
    for item in sorted(work, key=lambda item: (item.model, item.tenant_id)):
        by_model[item.model].append(item)
    lines: list[CostLine] = []
    for model in sorted(spend.keys() | by_model.keys()):
        items = by_model[model]
        shares = split(spend[model] - idle[model], [item.computed_tokens for item in items])
        tenants = [_line(item, share) for item, share in zip(items, shares, strict=True)]
        lines += [_sum_up(model, tenants, spend[model], idle[model]), *tenants]
    return lines


def clip_lives(
    lives: Iterable[tuple[str, str, int, int, int]], busy_ns: Mapping[str, int], window: Window
) -> list[Uptime]:
    """Clip replicas' lifetimes (id, model, start, last seen, nanodollars per hour) to a window."""
    uptimes = []
    for replica_id, model, started_ns, seen_ns, rate in lives:
        up_ns = max(0, min(seen_ns, window.end_ns) - max(started_ns, window.begin_ns))
        if up_ns:
            uptimes.append(Uptime(replica_id, model, up_ns, min(up_ns, busy_ns.get(replica_id, 0)), rate))
    return uptimes


def _line(item: TenantWork, spend_nanodollars: int) -> CostLine:
    return CostLine(
        item.model,
        item.tenant_id,
        item.num_requests,
        item.num_pages,
        item.tokens,
        item.revenue_nanodollars,
        spend_nanodollars,
    )


def _sum_up(model: str, tenants: Sequence[CostLine], spend_nanodollars: int, idle_nanodollars: int) -> CostLine:
    return CostLine(
        model,
        "",
        sum(line.num_requests for line in tenants),
        sum(line.num_pages for line in tenants),
        sum(line.num_tokens for line in tenants),
        sum(line.revenue_nanodollars for line in tenants),
        spend_nanodollars,
        idle_nanodollars,
    )


def _divide(dividend: int, divisor: int) -> int:
    """Divide, rounded to the nearest whole number, half up."""
    return (2 * dividend + divisor) // (2 * divisor)
