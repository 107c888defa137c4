"""Writes records to the database, a batch at a time; one that the database refuses does not hold up the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from serving.billing.database import Database, is_data_fault
from serving.billing.journal_frames import clean_record, encode_frame
from serving.billing.records import RequestRecord
from serving.settings.billing import BillingSettings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LedgerCounts:
    """What one ledger has done since it started; all of them only grow."""

    num_recorded: int = 0
    num_committed: int = 0
    """Rows that this process inserted into the database, including those of adopted spools."""
    num_repeated: int = 0
    """Records that were already in the database: of a batch whose commit was not confirmed, or of a dead router."""
    num_unspooled: int = 0
    """Records that the disk refused: they are in memory until the database has them."""
    num_lost: int = 0
    """Records that exist only in the log: the disk refused them, and the database was unavailable when the router
    ended."""
    num_refused: int = 0
    """Records that the database refuses for good; they are in the file `refused`, beside the spools."""
    num_closed: int = 0
    """Requests that dead routers left open, and that have their records now."""
    num_failures: int = 0
    """Failures of the database."""


class RowWriter:
    """Writes to one database, and counts what has become of the records."""

    def __init__(self, database: Database, settings: BillingSettings, counts: LedgerCounts) -> None:
        self._database = database
        self._settings = settings
        self._counts = counts

    async def write(self, records: Sequence[RequestRecord]) -> None:
        """Commit a batch. Records that the database refuses for good go to the file `refused`.

        Raises:
            Exception: the database failed, with whatever its driver raises; nothing of the batch may be forgotten.
        """
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                num_new = await self._database.insert(records)
        except Exception as error:
            if not is_data_fault(error):
                raise
            num_new = await self._write_singly(records)
        self._counts.num_committed += num_new
        self._counts.num_repeated += len(records) - num_new

    async def _write_singly(self, records: Sequence[RequestRecord]) -> int:
        """Write a batch that the database refuses record by record, so that only the bad ones are left out."""
        num_new = 0
        for record in records:
            try:
                async with asyncio.timeout(self._settings.write_timeout_s):
                    num_new += await self._database.insert([clean_record(record)])
            except Exception as error:
                if not is_data_fault(error):
                    raise
                self._counts.num_refused += 1
                logger.exception("the database refuses a record: %s", describe(record))
                with (self._settings.directory / "refused").open("ab") as file:
                    file.write(encode_frame(record))
        return num_new


def describe(record: RequestRecord) -> str:
    """The whole record for the log, which may be the only place left for it. It holds no content and no key."""
    return repr(record)
