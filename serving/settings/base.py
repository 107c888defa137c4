"""What every section of the settings is made of."""

from __future__ import annotations

import ipaddress
from decimal import Decimal
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
Dollars = Annotated[Decimal, Field(ge=0, le=10_000, decimal_places=6)]
"""US dollars in whole microdollars."""
Amount = Annotated[float, Field(gt=0)]
"""An amount of a Ray resource."""


class Frozen(BaseModel):
    """A section of the settings: immutable, refuses unknown keys, and refuses infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's `yes` and `no` for numbers: they are parsed as bools, which Python treats as 1 and 0."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and {int, float, Decimal} & {field.annotation, *get_args(field.annotation)}:
            raise ValueError("must be a number")
        return value


ANY_ADDRESS = ("0.0.0.0", "::")
"""Addresses that bind a server to every interface of its machine."""


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
