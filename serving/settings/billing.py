"""The billing section of the settings, and the prices of a model."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from serving.settings.base import Dollars, Frozen, Name

__all__ = [
    "BillingSettings",
    "BudgetSettings",
    "DatedRates",
    "PriceListSettings",
    "PriceSettings",
    "RateSettings",
    "SpoolSettings",
    "TenantPriceSettings",
]

# The None stands inside, or the check of frozen.py would not see that this is a number.
_MaybeDollars = Annotated[Decimal | None, Field(ge=0, le=10_000, decimal_places=6)]
_SCHEMES = ("sqlite", "sqlite+aiosqlite", "postgres", "postgresql", "postgresql+asyncpg")


class RateSettings(Frozen):
    """US dollars per million tokens, at most six decimals, so that a token's price is a whole number of picodollars."""

    input_per_million: Dollars
    output_per_million: Dollars
    cached_input_per_million: _MaybeDollars = None
    """Prompt tokens that were found in the prefix cache; None prices them like the others of their kind."""
    image_per_million: _MaybeDollars = None
    """Prompt tokens of images; None prices them like text."""

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value not in (None, [], (), {})}


class DatedRates(RateSettings):
    """Rates from the start of a day on, UTC. They are whole: nothing is taken over from those before."""

    since: date


class PriceListSettings(RateSettings):
    """Rates, and those that take their place later."""

    changes: tuple[DatedRates, ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> PriceListSettings:
        for earlier, later in pairwise(self.changes):
            if later.since <= earlier.since:
                raise ValueError(f"changes must be in the order of their dates; {later.since} comes too late")
        return self


class TenantPriceSettings(PriceListSettings):
    """What one tenant pays in the place of the list."""


class PriceSettings(PriceListSettings):
    """The price list of a model."""

    input_per_million: Dollars = Decimal("0.03")
    output_per_million: Dollars = Decimal("0.10")
    tenants: dict[Name, TenantPriceSettings] = Field(default_factory=dict)
    """By tenant id; each has a price list of its own, whole."""


class SpoolSettings(Frozen):
    """The journal on a local disk that every router writes before the database."""

    segment_bytes: Annotated[int, Field(ge=4096, le=2**30)] = 4 * 2**20
    fsync_ms: Annotated[int, Field(ge=1, le=60_000)] = 1000
    """How often it is made to survive a loss of power; the death of the process it survives from the first moment."""
    alarm_bytes: Annotated[int, Field(ge=4096)] = 256 * 2**20
    """About half a million requests that wait for the database."""
    max_bytes: Annotated[int, Field(ge=4096)] = 4 * 2**30
    """Of all journals in the folder together. Once it is reached, routers refuse requests that generate with 503
    `ledger_full`; those under way are still written."""
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of what other tenants leave of `max_bytes` that one tenant's records may take; then its requests are refused
    with 429."""
    adopt_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How often a router looks for journals whose router has died."""

    @model_validator(mode="after")
    def _check_sizes(self) -> SpoolSettings:
        if not self.segment_bytes <= self.alarm_bytes <= self.max_bytes:
            raise ValueError("segment_bytes <= alarm_bytes <= max_bytes must hold")
        return self


class BudgetSettings(Frozen):
    """Monthly budgets of tenants (`monthly_budget` in the keys file)."""

    warn_percent: Annotated[int, Field(ge=1, le=100)] = 80
    refresh_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """How often a router learns what the others have spent."""


class BillingSettings(Frozen):
    """Where the ledger is kept, and what replicas cost."""

    directory: Path = Field(default=Path("data/billing"), validate_default=True)
    """For the journals, and for the SQLite database when no other is named. On a disk that outlives the router."""
    database_url: SecretStr | None = None
    """`postgresql://user:password@host/database`, or `sqlite:////absolute/file`; None is `ledger.db` in `directory`."""
    migrate_on_start: bool = True
    """Bring the database to this version's schema; else `serving billing migrate` has to."""
    flush_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Longest time that a record waits for others to go into the database with."""
    batch_rows: Annotated[int, Field(ge=1, le=512)] = 512
    write_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    replica_hour_dollars: dict[Name, Dollars] = Field(default_factory=dict)
    """What one replica of a model costs an hour, by the model's name: its GPUs, or its part of a node."""
    spool: SpoolSettings = SpoolSettings()
    budget: BudgetSettings = BudgetSettings()

    @field_validator("directory")
    @classmethod
    def _resolve(cls, directory: Path) -> Path:
        """Replicas run elsewhere than the command that read the settings."""
        return directory.expanduser().absolute()

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and url.get_secret_value().partition("://")[0] not in _SCHEMES:
            raise ValueError(f"must begin with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
        return url
