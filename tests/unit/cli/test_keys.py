from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serving.cli.main import app
from serving.router.access.auth import Authenticator
from serving.router.access.keys_file import read_keys
from serving.settings.tenants import Priority, Tenant


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def keys(command: str, file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", command, "--file", str(file), *arguments])


def create(file: Path, *arguments: str) -> str:
    result = keys("create", file, "--tenant", "acme", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_a_key_is_shown_once_and_lets_its_tenant_in(file: Path) -> None:
    key = create(file, "--rpm", "600", "--tpm", "90000", "--concurrent", "8", "--priority", "high", "--name", "CI")
    assert re.fullmatch(r"sk-[0-9a-f]{16}-[A-Za-z0-9_-]{43}", key)
    assert key.rpartition("-")[2] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    identity = Authenticator(file).identify({b"authorization": b"Bearer " + key.encode()})
    assert identity.tenant_id == "acme"
    assert identity.tenant == Tenant(
        requests_per_minute=600, tokens_per_minute=90000, max_concurrent=8, priority=Priority.HIGH
    )
    assert not identity.is_admin


def test_a_second_key_keeps_what_is_there(file: Path) -> None:
    first = create(file, "--rpm", "600", "--models", "nano, deepseek-ai/DeepSeek-OCR", "--budget", "12.5")
    second = create(file, "--admin", "--expires", "30", "--concurrent", "4")
    content = read_keys(file)
    assert content.tenants["acme"] == Tenant(
        requests_per_minute=600,
        max_concurrent=4,
        models=("nano", "deepseek-ai/DeepSeek-OCR"),
        monthly_budget=Decimal("12.5"),
    )
    assert [key.is_admin for key in content.keys] == [False, True]
    assert content.keys[1].expires is not None
    assert (content.keys[1].expires - content.keys[1].created).days == 30
    for key in (first, second):
        Authenticator(file).identify({b"authorization": b"Bearer " + key.encode()})


def test_keys_are_listed_without_anything_secret(file: Path) -> None:
    create(file, "--rpm", "600", "--name", "laptop")
    create(file, "--admin", "--expires", "30")
    (first, second) = read_keys(file).keys
    result = keys("list", file)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "acme: requests_per_minute=600"
    assert first.id in lines[1]
    assert lines[1].endswith("laptop")
    assert "expires" in lines[2]
    assert "admin" in lines[2]
    for key in (first, second):
        assert key.hash not in result.output
        assert key.salt not in result.output


def test_a_revoked_key_is_gone(file: Path) -> None:
    create(file)
    create(file)
    (first, second) = read_keys(file).keys
    assert keys("revoke", file, first.id).exit_code == 0
    assert read_keys(file).keys == (second,)
    assert "acme" in read_keys(file).tenants
    again = keys("revoke", file, first.id)
    assert again.exit_code == 2
    assert "no key with this id" in again.stderr


def test_limits_are_changed_and_taken_away(file: Path) -> None:
    create(file, "--rpm", "600", "--tpm", "5", "--models", "nano", "--budget", "0")
    result = keys("tenant", file, "acme", "--rpm", "0", "--priority", "low", "--models", "all", "--budget", "-1")
    assert result.exit_code == 0, result.output
    assert result.stdout == "acme: tokens_per_minute=5, priority=low\n"
    assert read_keys(file).tenants["acme"] == Tenant(tokens_per_minute=5, priority=Priority.LOW)
    assert len(read_keys(file).keys) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("acme",), "at least one limit"),
        (("other", "--rpm", "1"), "no tenant 'other'"),
        (("acme", "--models", "a b"), "models"),
        (("acme", "--budget", "0.0000001"), "monthly_budget"),
    ],
)
def test_changes_that_cannot_be_meant_are_refused(file: Path, arguments: tuple[str, ...], complaint: str) -> None:
    create(file, "--rpm", "600")
    before = file.read_bytes()
    result = keys("tenant", file, *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert file.read_bytes() == before


def test_a_tenant_without_a_name_is_refused(file: Path) -> None:
    result = keys("create", file, "--tenant", "a b")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not file.exists()


@pytest.mark.parametrize("command", ["list", "revoke"])
def test_a_file_that_is_missing_or_broken_is_told(file: Path, command: str) -> None:
    arguments = ("x",) if command == "revoke" else ()
    assert "cannot be read" in keys(command, file, *arguments).stderr
    file.write_text("keys: [")
    result = keys(command, file, *arguments)
    assert result.exit_code == 2
    assert "is not YAML" in result.stderr


@pytest.mark.parametrize("command", ["create", "list", "revoke", "tenant"])
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, ["keys", command, "--help"])
    assert result.exit_code == 0
    assert "--file" in result.stdout
