"""Values for a router's metrics from parts that do not depend on metrics: the settings, the ledger, the budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from serving.billing.budgets import Budgets
from serving.billing.ledger import Ledger
from serving.settings.stack import Settings
from serving.telemetry import catalogue
from serving.telemetry.router_metrics import Reading


def read_settings(settings: Settings) -> Iterator[Reading]:
    """Yield the configured replicas and their cost. All routers export the same values: aggregate with max, not sum."""
    for name, model in settings.models.items():
        scaling = model.autoscaling
        wanted = scaling.min_replicas if scaling is not None else model.num_replicas
        yield catalogue.REPLICAS_WANTED, (name,), float(wanted)
        hour = settings.billing.replica_hour_dollars.get(name)
        if hour is not None:
            yield catalogue.REPLICA_HOUR, (name,), float(hour)


def read_ledger(ledger: Ledger) -> Iterator[Reading]:
    """Yield how far the database lags, and the number of records by outcome."""
    yield catalogue.SPOOL_RECORDS, (), float(ledger.depth)
    yield catalogue.SPOOL_BYTES, (), float(ledger.size_bytes)
    yield catalogue.SPOOL_USED, (), ledger.used_ratio
    yield catalogue.LEDGER_LAG, (), ledger.lag_s
    counts = ledger.counts
    for result, number in (
        ("recorded", counts.num_recorded),
        ("committed", counts.num_committed),
        ("repeated", counts.num_repeated),
        ("unspooled", counts.num_unspooled),
        ("refused", counts.num_refused),
        ("lost", counts.num_lost),
    ):
        yield catalogue.LEDGER_RECORDS, (result,), float(number)
    yield catalogue.LEDGER_FAILURES, (), float(counts.num_failures)


def read_budgets(budgets: Budgets, limits_nanodollars: Mapping[str, int], now_ns: int) -> Iterator[Reading]:
    """Yield what tenants have spent and may spend this month. All routers export nearly the same values.

    Args:
        budgets: the spending known to one router.
        limits_nanodollars: monthly budget by tenant, for tenants with a budget.
        now_ns: current time since the epoch.
    """
    for tenant_id, limit in limits_nanodollars.items():
        spent = budgets.status(tenant_id, limit_nanodollars=limit, now_ns=now_ns).spent_nanodollars
        yield catalogue.BUDGET_USED, (tenant_id,), spent / limit if limit else 1.0
