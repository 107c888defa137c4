"""Asks replicas what their engines counted for a request whose answer did not say: it broke, or its client left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serving.billing.records import TokenCounts
from serving.cluster.directory import ReplicaRecord

FetchUsage = Callable[[ReplicaRecord, str], Awaitable[dict[str, Any] | None]]
"""Fetches a replica's counts for a request id; None if it has none or cannot be reached."""

_POLL_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses between polls: an engine notices at its next step that a request has been aborted."""


async def poll_counts(fetch_usage: FetchUsage, replica: ReplicaRecord, request_id: str) -> TokenCounts | None:
    """The replica's counts for a request that has ended or is about to; None if it cannot say."""
    for pause_s in _POLL_S:
        found = await fetch_usage(replica, request_id)
        if found is None:
            return None
        if found.get("is_finished"):
            return TokenCounts(
                num_prompt_tokens=int(found["prompt_tokens"]),
                num_image_tokens=int(found["image_tokens"]),
                num_cached_tokens=int(found["cached_tokens"]),
                num_completion_tokens=int(found["completion_tokens"]),
            )
        await asyncio.sleep(pause_s)
    return None
