"""Routers as far as the ledger sees them, killed one after another.

    python -m support.ledger_writer DIRECTORY DATABASE_URL NUM_LIVES

Each life writes records as fast as it may and says every one once it is in the books, until it is killed with SIGKILL.
Lives are forks of one process, which has loaded everything but started nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from pydantic import SecretStr

from serving.billing.ledger import Ledger
from serving.settings.billing import BillingSettings, SpoolSettings
from support.billing_samples import make_record


async def live(directory: str, url: str, life: int) -> None:
    settings = BillingSettings(
        directory=Path(directory),
        database_url=SecretStr(url) if url else None,
        flush_s=0.01,
        batch_rows=64,
        spool=SpoolSettings(segment_bytes=16_384, adopt_s=0.05),
    )
    ledger = Ledger(settings, f"router-{life}")
    await ledger.start()
    number = 0
    while True:
        for _ in range(5):
            request_id = f"{life}-{number}"
            ledger.record(make_record(request_id=request_id, router_id=ledger.router_id, arrived_ns=time.time_ns()))
            os.write(1, f"{request_id}\n".encode())
            number += 1
        await asyncio.sleep(0.001)


def main(directory: str, url: str, num_lives: str) -> None:
    dice = random.Random(6)
    for life in range(int(num_lives)):
        pid = os.fork()
        if not pid:
            asyncio.run(live(directory, url, life))
        while not any(Path(directory, "spool").glob(f"router-{life}/*.journal")):
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    main(*sys.argv[1:])
