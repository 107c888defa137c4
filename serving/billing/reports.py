"""Usage reports as JSON, as CSV, and as OpenAI's usage pages. Pure.

OpenAI's format: https://platform.openai.com/docs/api-reference/usage/completions
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from enum import StrEnum
from typing import Any

from serving.billing.periods import NS_PER_DAY, NS_PER_S, Window, day_of, start_of_day_ns
from serving.billing.prices import format_dollars, to_dollars
from serving.billing.stack_costs import CostLine


class GroupBy(StrEnum):
    """What usage can be grouped by. The values are the words in `--by` and `group_by=`."""

    DAY = "day"
    MODEL = "model"
    MODE = "mode"
    KEY = "key"
    TENANT = "tenant"
    OUTCOME = "outcome"


_GROUP_NAMES = tuple(group.value for group in GroupBy)
_OPENAI_GROUPS = {"model": GroupBy.MODEL, "api_key_id": GroupBy.KEY, "project_id": GroupBy.TENANT}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of requests with the same values of the groups. Groups that were not requested are None."""

    day: str | None = None
    """`2026-11-23`, UTC."""
    model: str | None = None
    mode: str | None = None
    """Empty for requests without images, `mixed` for those with several."""
    key: str | None = None
    tenant: str | None = None
    outcome: str | None = None
    num_requests: int = 0
    num_pages: int = 0
    prompt_tokens: int = 0
    """Including image and cached tokens."""
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    wasted_tokens: int = 0
    cost_nanodollars: int = 0

    @classmethod
    def of(cls, group_by: Sequence[GroupBy], values: Sequence[Any], numbers: Sequence[int]) -> UsageRow:
        """Build it from a database row: the groups' values, then the sums in the order of the fields."""
        names = [field.name for field in fields(cls)][len(GroupBy) :]
        groups = {
            group.value: day_of(int(value) * NS_PER_DAY) if group is GroupBy.DAY else str(value)
            for group, value in zip(group_by, values, strict=True)
        }
        return cls(**groups, **dict(zip(names, numbers, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage within a window, by groups."""

    window: Window
    group_by: tuple[GroupBy, ...]
    rows: tuple[UsageRow, ...]

    @property
    def total(self) -> UsageRow:
        """The sum of all rows."""
        names = [field.name for field in fields(UsageRow)][len(GroupBy) :]
        return UsageRow(**{name: sum(getattr(row, name) for row in self.rows) for name in names})


def parse_groups(text: str) -> tuple[GroupBy, ...]:
    """Parse comma-separated groups such as `day,model`; an empty text means no groups.

    Raises:
        ValueError: a word is not a group, or is given twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in _GROUP_NAMES:
            raise ValueError(f"cannot group by {word[:40]!r}; choose from {', '.join(_GROUP_NAMES)}")
    if len(set(words)) != len(words):
        raise ValueError("a group is given twice")
    return tuple(GroupBy(word) for word in words)


def usage_to_json(report: UsageReport) -> dict[str, Any]:
    """For `GET /v1/usage`: amounts in nanodollars and as decimal text in dollars, both exact."""
    return {
        "object": "usage",
        "start_time": report.window.begin_ns // NS_PER_S,
        "end_time": report.window.end_ns // NS_PER_S,
        "group_by": [group.value for group in report.group_by],
        "data": [_row_to_json(row, report.group_by) for row in report.rows],
        "total": _row_to_json(report.total, ()),
    }


def _row_to_json(row: UsageRow, group_by: Iterable[GroupBy]) -> dict[str, Any]:
    values = asdict(row)
    groups = {group.value: values[group.value] for group in group_by}
    sums = {name: value for name, value in values.items() if name not in _GROUP_NAMES}
    return {**groups, **sums, "cost_dollars": format_dollars(row.cost_nanodollars)}


def usage_to_csv(report: UsageReport) -> str:
    """One line per row, after a header line."""
    rows = [_row_to_json(row, report.group_by) for row in report.rows]
    names = list(_row_to_json(UsageRow(), report.group_by))
    return _to_csv(names, rows)


def costs_to_json(window: Window, lines: Iterable[CostLine]) -> dict[str, Any]:
    """The stack's costs, for its operators."""
    return {
        "object": "costs",
        "start_time": window.begin_ns // NS_PER_S,
        "end_time": window.end_ns // NS_PER_S,
        "data": [cost_to_json(line) for line in lines],
    }


def cost_to_json(line: CostLine) -> dict[str, Any]:
    """One line with derived figures; an empty tenant stands for all of them."""
    return {
        **asdict(line),
        "margin_nanodollars": line.margin_nanodollars,
        "per_million_tokens_nanodollars": line.per_million_tokens_nanodollars,
        "per_thousand_pages_nanodollars": line.per_thousand_pages_nanodollars,
    }


def costs_to_csv(lines: Iterable[CostLine]) -> str:
    """The costs as CSV."""
    names = list(cost_to_json(CostLine("", "", 0, 0, 0, 0, 0)))
    return _to_csv(names, [cost_to_json(line) for line in lines])


def openai_groups(names: Iterable[str]) -> tuple[GroupBy, ...]:
    """Our groups for OpenAI's `group_by`: a project is a tenant.

    Raises:
        ValueError: one that the ledger does not know.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in _OPENAI_GROUPS:
            raise ValueError(f"cannot group by {name[:40]!r}; choose from {', '.join(_OPENAI_GROUPS)}")
    return tuple(_OPENAI_GROUPS[name] for name in names)


def usage_to_openai(report: UsageReport) -> dict[str, Any]:
    """OpenAI's page of daily buckets. The report must be grouped by day, and its window consist of whole days.

    Every day has its bucket, one without requests an empty one. All days come on one page.
    """
    by_day: dict[str, list[UsageRow]] = {}
    for row in report.rows:
        by_day.setdefault(row.day or "", []).append(row)
    buckets = []
    for begin_ns in range(report.window.begin_ns, report.window.end_ns, NS_PER_DAY):
        results = [_to_openai_result(row) for row in by_day.get(day_of(begin_ns), ())]
        times = {"start_time": begin_ns // NS_PER_S, "end_time": (begin_ns + NS_PER_DAY) // NS_PER_S}
        buckets.append({"object": "bucket", **times, "results": results})
    return {"object": "page", "data": buckets, "has_more": False, "next_page": None}


def whole_days(window: Window) -> Window:
    """The whole days that a window overlaps."""
    first = start_of_day_ns(date.fromisoformat(day_of(window.begin_ns)))
    return Window(first, window.end_ns + -window.end_ns % NS_PER_DAY)


def _to_openai_result(row: UsageRow) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row.prompt_tokens,
        "output_tokens": row.completion_tokens,
        "input_cached_tokens": row.cached_tokens,
        "num_model_requests": row.num_requests,
        "project_id": row.tenant,
        "api_key_id": row.key,
        "user_id": None,
        "model": row.model,
        "batch": None,
        "service_tier": None,
        # Not OpenAI's: its clients ignore unknown fields.
        "image_tokens": row.image_tokens,
        "num_pages": row.num_pages,
        "cost": {"value": to_dollars(row.cost_nanodollars), "currency": "usd"},
    }


def _to_csv(names: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _defuse(value) for name, value in row.items()})
    return text.getvalue()


def _defuse(value: Any) -> Any:
    """Escape text that begins like a formula, which spreadsheets would run: names of keys and tenants are user
    input."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
