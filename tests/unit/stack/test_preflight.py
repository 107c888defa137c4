from __future__ import annotations

import asyncio
import resource
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from serving.billing.database import Database
from serving.errors import SettingsError
from serving.settings.billing import BillingSettings
from serving.settings.stack import Settings
from serving.stack.preflight import check_before_start


def build(folder: Path, **sections: Any) -> Settings:
    models = {"m": {"checkpoint": "scripted", "script": {}}}
    return Settings.model_validate({"models": models, "billing": {"directory": folder / "billing"}, **sections})


def test_what_is_well_is_not_mentioned(tmp_path: Path) -> None:
    assert check_before_start(build(tmp_path)) == []
    assert list((tmp_path / "billing").iterdir()) == [], "nothing of the check stays"


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"billing": {"directory": "/proc/x/billing"}}, r"billing\.directory: /proc/x/billing"),
        ({"ocr": {"enabled": True, "directory": "/proc/x/ocr"}}, r"ocr\.directory: /proc/x/ocr"),
        ({"telemetry": {"targets_file": "/proc/x/targets.json"}}, r"telemetry\.targets_file: /proc/x"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_with_its_setting(
    tmp_path: Path, sections: dict[str, Any], name: str
) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} cannot be written to: \w"):
        check_before_start(build(tmp_path, **sections))


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))  # the same to a writer as a full disk
    try:
        with pytest.raises(SettingsError, match=r"^billing\.directory: .* cannot be written to: File too large"):
            check_before_start(build(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "billing").iterdir()) == []


def test_folders_of_a_cluster_that_is_joined_are_its_own(tmp_path: Path) -> None:
    settings = build(tmp_path, ray={"address": "auto"}, ocr={"enabled": True, "directory": "/proc/x/ocr"})
    assert check_before_start(settings) == []


def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(SettingsError, match="cut short"):
        check_before_start(build(tmp_path, models={"m": {"checkpoint": str(tmp_path)}}))
    assert check_before_start(build(tmp_path, models={"m": {"checkpoint": "deepseek-ai/DeepSeek-OCR"}})) == []


async def make_ledger(folder: Path) -> Path:
    database = Database(BillingSettings(directory=folder))
    await database.migrate()
    await database.close()
    return folder / "ledger.db"


async def test_a_ledger_that_is_damaged_is_told(tmp_path: Path) -> None:
    settings = build(tmp_path)
    file = await make_ledger(tmp_path / "billing")
    assert await asyncio.to_thread(check_before_start, settings) == []
    file.write_bytes(b"not a database, and long enough to be seen as none" * 100)
    (warning,) = await asyncio.to_thread(check_before_start, settings)
    assert warning.startswith(f"the ledger {file} cannot be read: file is not a database.")
    assert "tenants with a budget are refused" in warning


async def test_a_ledger_that_is_new_or_old_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "billing").mkdir()
    sqlite3.connect(tmp_path / "billing/ledger.db").close()
    assert await asyncio.to_thread(check_before_start, build(tmp_path)) == []


def test_a_database_that_does_not_answer_is_told_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://serving:hush@127.0.0.1:9/serving"
    settings = build(tmp_path, billing={"directory": tmp_path / "billing", "database_url": url})
    (warning,) = check_before_start(settings)
    assert "hush" not in warning
    assert "127.0.0.1:9/serving cannot be read: " in warning
