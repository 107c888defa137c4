"""Checks before anything is started, so that mistakes are reported immediately and not after minutes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from serving.billing.database import Database, build_url
from serving.billing.periods import month_of
from serving.billing.queries import sum_month_by_tenant
from serving.engine.checkpoint import CHECKPOINTS_DIR, check_checkpoint, resolve_checkpoint
from serving.errors import SettingsError
from serving.settings.stack import NANO, Settings

_DATABASE_S = 5.0
_ROOM_BYTES = 64 * 1024
"""Size of the test file: a smaller one could still fit into a disk that is practically full."""


def check_before_start(settings: Settings) -> list[str]:
    """Check what the stack needs on this machine: folders, checkpoints, the ledger.

    If the stack joins an existing cluster, replicas may run on other machines, so their folders and checkpoints are not
    checked.

    Returns:
        Warnings, one line each: the stack can run, but someone should act.

    Raises:
        SettingsError: the stack cannot run; the message names the setting.
    """
    if settings.ray.address is None:
        for name, folder in _folders(settings):
            _check_folder(name, folder)
        for model in settings.models.values():
            if model.script is None and model.checkpoint != NANO:
                folder = Path(resolve_checkpoint(model.checkpoint))
                if folder.is_dir():
                    check_checkpoint(folder)
    return _look_at_ledger(settings)


def _folders(settings: Settings) -> Iterator[tuple[str, Path]]:
    yield "billing.directory", settings.billing.directory
    if settings.ocr.enabled:
        yield "ocr.directory", settings.ocr.directory
    if settings.telemetry.targets_file is not None:
        yield "telemetry.targets_file", settings.telemetry.targets_file.parent
    if any(model.checkpoint == NANO and model.script is None for model in settings.models.values()):
        yield f"the folder {CHECKPOINTS_DIR.absolute()}, for the nano checkpoint", CHECKPOINTS_DIR


def _check_folder(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, file = tempfile.mkstemp(prefix=".room-", dir=folder)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(bytes(_ROOM_BYTES))
        finally:
            Path(file).unlink()
    except OSError as error:
        raise SettingsError(f"{name}: {folder} cannot be written to: {error.strerror}") from None


def _look_at_ledger(settings: Settings) -> list[str]:
    """Yield a warning if the ledger cannot be read. A ledger that does not exist yet is fine."""
    url = build_url(settings.billing)
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and not Path(str(url.database)).exists():
        return []
    reason = asyncio.run(_read_ledger(settings))
    if not reason:
        return []
    place = url.database if is_sqlite else url.render_as_string(hide_password=True)
    return [
        f"the ledger {place} cannot be read: {reason}. Until it can be, rows wait in {settings.billing.directory} and "
        "tenants with a budget are refused. Restore it from a backup, or move it away to begin a new one."
    ]


async def _read_ledger(settings: Settings) -> str:
    """Return why the ledger cannot be read, or an empty string."""
    database = Database(settings.billing)
    try:
        async with asyncio.timeout(_DATABASE_S), database.reading() as connection:
            await sum_month_by_tenant(connection, month_of(time.time_ns()), except_router_id="")
        return ""
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0] or type(error).__name__
        if "no such table" in reason or "does not exist" in reason:  # the database is new, or has an older schema
            return ""
        return reason
    finally:
        with contextlib.suppress(SQLAlchemyError, OSError):
            await database.close()
