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

# None is part of the annotation itself; otherwise the check in `base.py` would not see that this is a number.
_MaybeDollars = Annotated[Decimal | None, Field(ge=0, le=10_000, decimal_places=6)]
_SCHEMES = ("sqlite", "sqlite+aiosqlite", "postgres", "postgresql", "postgresql+asyncpg")


class RateSettings(Frozen):
    """US dollars per million tokens, at most six decimals, so that a token's price is a whole number of picodollars."""

    input_per_million: Dollars
    output_per_million: Dollars
    cached_input_per_million: _MaybeDollars = None
    """Prompt tokens served from the prefix cache; None charges them like other prompt tokens."""
    image_per_million: _MaybeDollars = None
    """Prompt tokens of images; None charges them like text."""

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value not in (None, [], (), {})}


class DatedRates(RateSettings):
    """Rates that apply from the start of a day (UTC). They replace the earlier rates completely; nothing is
    inherited."""

    since: date


class PriceListSettings(RateSettings):
    """Rates, and the dated rates that replace them later."""

    changes: tuple[DatedRates, ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> PriceListSettings:
        for earlier, later in pairwise(self.changes):
            if later.since <= earlier.since:
                raise ValueError(f"changes must be in the order of their dates; {later.since} comes too late")
        return self


class TenantPriceSettings(PriceListSettings):
    """The price list of one tenant, used instead of the model's general list."""


class PriceSettings(PriceListSettings):
    """The price list of a model."""

    input_per_million: Dollars = Decimal("0.03")
    output_per_million: Dollars = Decimal("0.10")
    tenants: dict[Name, TenantPriceSettings] = Field(default_factory=dict)
    """By tenant id. Each entry is a complete price list of its own."""


class SpoolSettings(Frozen):
    """The journal on local disk that every router writes before records reach the database."""

    segment_bytes: Annotated[int, Field(ge=4096, le=2**30)] = 4 * 2**20
    fsync_ms: Annotated[int, Field(ge=1, le=60_000)] = 1000
    """How often the journal is synced to disk, so that it survives a power loss. It survives the death of its process
    at any time."""
    alarm_bytes: Annotated[int, Field(ge=4096)] = 256 * 2**20
    """Largest size of one journal. The default holds about half a million requests that wait for the database."""
    max_bytes: Annotated[int, Field(ge=4096)] = 4 * 2**30
    """Largest size of all journals in the folder together. Beyond it routers refuse generation requests with 503
    `ledger_full`; requests that are already running are still recorded."""
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The fraction of the space left by other tenants that one tenant's records may occupy; beyond it that tenant's
    requests are refused with 429."""
    adopt_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How often a router looks for journals left by routers that died."""

    @model_validator(mode="after")
    def _check_sizes(self) -> SpoolSettings:
        if not self.segment_bytes <= self.alarm_bytes <= self.max_bytes:
            raise ValueError("segment_bytes <= alarm_bytes <= max_bytes must hold")
        return self


class BudgetSettings(Frozen):
    """Monthly budgets of tenants (`monthly_budget` in the keys file)."""

    warn_percent: Annotated[int, Field(ge=1, le=100)] = 80
    refresh_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """How often a router reads what tenants have spent through the other routers."""


class BillingSettings(Frozen):
    """Where the ledger is stored, and what replicas cost."""

    directory: Path = Field(default=Path("data/billing"), validate_default=True)
    """Folder of the journals, and of the SQLite database if no other database is configured. It must be on a disk that
    outlives the router."""
    database_url: SecretStr | None = None
    """`postgresql://user:password@host/database`, or `sqlite:////absolute/file`; None is `ledger.db` in `directory`."""
    migrate_on_start: bool = True
    """Migrate the database to this version's schema at start. Otherwise run `serving billing migrate` first."""
    flush_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Longest time that a record waits to be written to the database together with others."""
    batch_rows: Annotated[int, Field(ge=1, le=512)] = 512
    write_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    replica_hour_dollars: dict[Name, Dollars] = Field(default_factory=dict)
    """Cost of one replica per hour in US dollars, by model name: its GPUs, or its share of a node."""
    spool: SpoolSettings = SpoolSettings()
    budget: BudgetSettings = BudgetSettings()

    @field_validator("directory")
    @classmethod
    def _resolve(cls, directory: Path) -> Path:
        """Make paths absolute: replicas run in another working directory than the command that read the settings."""
        return directory.expanduser().absolute()

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and url.get_secret_value().partition("://")[0] not in _SCHEMES:
            raise ValueError(f"must begin with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
        return url
