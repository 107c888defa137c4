"""Whether the journals have room for another request. Rows are never dropped: requests are refused before they cost.

The bound is for all journals in the folder: those of this router, of others beside it and of routers that have died,
which wait there for as long as the database is away. Requests under way when it is reached are still written, so it is
passed by as many rows as there are requests at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from serving.billing.records import RequestRecord
from serving.errors import OverloadedError, RateLimitError
from serving.settings.billing import BillingSettings

FULL = "ledger_full"
OWN_FULL = "tenant_ledger_full"
REFUSED_FOR_ROOM = frozenset({FULL, OWN_FULL})
"""Codes of requests that are not recorded: their rows would be what there is no room for."""
_RETRY_S = 30.0


class JournalRoom:
    """One per ledger. `own_bytes` is what this router's journal holds that the database does not."""

    def __init__(self, settings: BillingSettings) -> None:
        self._settings = settings.spool
        self._root = settings.directory / "spool"
        self._refused = settings.directory / "refused"
        self._others_bytes = 0
        self._num_rows: Counter[str] = Counter()
        self._num_all = 0
        self.is_disk_failing = False
        """Whether the disk did not take what was written last."""

    def look(self, own: Path) -> None:
        """Count what lies in the folder beside one's own journal. Blocks on the disk.

        Raises:
            OSError: it cannot be read.
        """
        num_bytes = _size_of(self._refused)
        for path in self._root.glob("*/*"):
            if path.parent != own:
                num_bytes += _size_of(path)
        self._others_bytes = num_bytes

    def add(self, tenant_id: str) -> None:
        """A row waits for the database."""
        self._num_rows[tenant_id] += 1
        self._num_all += 1

    def remove(self, records: Iterable[RequestRecord]) -> None:
        """These are in the database."""
        for record in records:
            self._num_all -= 1
            self._num_rows[record.tenant_id] -= 1
            if self._num_rows[record.tenant_id] <= 0:
                del self._num_rows[record.tenant_id]

    def used_ratio(self, own_bytes: int) -> float:
        """Part of the bound that is used; 1 while the disk takes nothing."""
        used = (self._others_bytes + own_bytes) / self._settings.max_bytes
        return max(1.0, used) if self.is_disk_failing else used

    def check(self, tenant_id: str, own_bytes: int, *, is_one_of_many: bool) -> None:
        """Whether a tenant's request may be taken.

        Raises:
            RateLimitError: rows of the tenant's take up its share. Rows are taken to be of one size.
            OverloadedError: there is no room for anybody's.
        """
        mine = own_bytes * self._num_rows[tenant_id] / max(1, self._num_all)
        left = self._settings.max_bytes - self._others_bytes - (own_bytes - mine)
        if is_one_of_many and mine and mine >= self._settings.tenant_share * left:
            raise RateLimitError(
                "Your requests wait in the ledger's journal for its database, and take as much of it as one tenant's"
                " may; try again later.",
                _RETRY_S,
                code=OWN_FULL,
            )
        if self.used_ratio(own_bytes) >= 1:
            raise OverloadedError(
                "The ledger has no room for further requests until its database can be reached; try again later.",
                _RETRY_S,
                code=FULL,
            )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
