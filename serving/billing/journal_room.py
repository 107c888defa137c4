"""Decides whether the journals have room for another request. Rows are never dropped: requests are refused before they
cost anything.

The bound applies to all journals in the directory: this router's, those of others on the machine and of routers that
have died, which remain there for as long as the database is unavailable. Requests in flight when it is reached are
still written, so it may be exceeded by as many rows as there are concurrent requests.
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
"""Codes of refusals that are not recorded, since there is no room for their rows."""
_RETRY_S = 30.0


class JournalRoom:
    """One per ledger. `own_bytes` is the part of this router's journal that is not in the database yet."""

    def __init__(self, settings: BillingSettings) -> None:
        self._settings = settings.spool
        self._root = settings.directory / "spool"
        self._refused = settings.directory / "refused"
        self._others_bytes = 0
        self._num_rows: Counter[str] = Counter()
        self._num_all = 0
        self.is_disk_failing = False
        """Whether the last write to the disk failed."""

    def look(self, own: Path) -> None:
        """Measure the other files in the directory, without this router's journal. Blocks on the disk.

        Raises:
            OSError: it cannot be read.
        """
        num_bytes = _size_of(self._refused)
        for path in self._root.glob("*/*"):
            if path.parent != own:
                num_bytes += _size_of(path)
        self._others_bytes = num_bytes

    def add(self, tenant_id: str) -> None:
        """A row is waiting for the database."""
        self._num_rows[tenant_id] += 1
        self._num_all += 1

    def remove(self, records: Iterable[RequestRecord]) -> None:
        """These records are in the database."""
        for record in records:
            self._num_all -= 1
            self._num_rows[record.tenant_id] -= 1
            if self._num_rows[record.tenant_id] <= 0:
                del self._num_rows[record.tenant_id]

    def used_ratio(self, own_bytes: int) -> float:
        """Used part of the bound; at least 1 while writes to the disk fail."""
        used = (self._others_bytes + own_bytes) / self._settings.max_bytes
        return max(1.0, used) if self.is_disk_failing else used

    def check(self, tenant_id: str, own_bytes: int, *, is_one_of_many: bool) -> None:
        """Check that a tenant's request may be accepted.

        Raises:
            RateLimitError: the tenant's rows take up its whole share. Rows are assumed to have equal sizes.
            OverloadedError: there is no room for any row.
        """
        mine = own_bytes * self._num_rows[tenant_id] / max(1, self._num_all)
        left = self._settings.max_bytes - self._others_bytes - (own_bytes - mine)
        if is_one_of_many and mine and mine >= self._settings.tenant_share * left:
            raise RateLimitError(
                "Rows of your requests that wait for the ledger's database have reached your share of its journal; "
                "try again later.",
                _RETRY_S,
                code=OWN_FULL,
            )
        if self.used_ratio(own_bytes) >= 1:
            raise OverloadedError(
                "The ledger has no room for more requests until its database can be reached; try again later.",
                _RETRY_S,
                code=FULL,
            )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
