"""Tenants, their limits, and the identity behind a request. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from serving.settings.base import Frozen, Name


class Priority(StrEnum):
    """Priority classes, in the order in which queued requests are taken."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Tenant(Frozen):
    """What one tenant may do. None means no limit."""

    models: tuple[Name, ...] | None = None
    """Canonical model names or aliases; None allows every model."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests of all kinds per minute, counted by weight (`serving.router.access.limits`)."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Concurrent generation requests; the same number applies separately to documents and to lookups."""
    priority: Priority = Priority.NORMAL
    monthly_budget: Annotated[Decimal, Field(ge=0, decimal_places=6)] | None = None
    """US dollars per calendar month (UTC)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The tenant behind a request and the key that it was sent with."""

    tenant_id: str
    tenant: Tenant
    key_id: str = ""
    """Id of the key; empty without authentication."""
    is_admin: bool = False


ANONYMOUS = Identity(tenant_id="anonymous", tenant=Tenant(), is_admin=False)
"""The identity of every request when no keys are configured."""
