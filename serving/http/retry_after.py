"""How long an answer asks its client to wait before it asks again (RFC 9110, section 10.2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait (`retry-after-ms` before `Retry-After`); None when it doesn't say."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) / scale
        except (KeyError, ValueError):
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    return None
