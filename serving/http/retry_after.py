"""Reads how long a server asks a client to wait before retrying (RFC 9110, section 10.2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait (`retry-after-ms` takes precedence over `Retry-After`), or None if neither is
    given."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) / scale
        except (KeyError, ValueError):
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    return None
