"""Who asks: tenants, their limits, and the identity of a request. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from serving.settings.base import Frozen, Name


class Priority(StrEnum):
    """Classes in the order in which waiting requests are taken."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Tenant(Frozen):
    """What one tenant may do. A limit that is None does not exist."""

    models: tuple[Name, ...] | None = None
    """Canonical names or aliases; None allows every model."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Of any kind, by their weight (`serving.router.access.limits`)."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests that generate at once, and as many documents and as many lookups besides."""
    priority: Priority = Priority.NORMAL
    monthly_budget: Annotated[Decimal, Field(ge=0, decimal_places=6)] | None = None
    """US dollars per calendar month, UTC."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Behind a request: its tenant and the key that it came with."""

    tenant_id: str
    tenant: Tenant
    key_id: str = ""
    """Empty without authentication."""
    is_admin: bool = False


NOBODY = Identity(tenant_id="anonymous", tenant=Tenant(), is_admin=False)
"""Who asks when no keys are set: everybody."""
