from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import AuthenticationError, PermissionDeniedError, SettingsError
from serving.router.access.auth import Authenticator, check_model_allowed
from serving.router.access.keys_file import (
    KeyRecord,
    KeysFile,
    make_key,
    read_keys,
    split_key,
    verify_secret,
    write_keys,
)
from serving.settings.tenants import ANONYMOUS, Identity, Priority, Tenant

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
ACME = Tenant(requests_per_minute=5, priority=Priority.HIGH)
KEY, RECORD = make_key("acme", created=NOW, name="CI")
ADMIN_KEY, ADMIN_RECORD = make_key("acme", created=NOW, is_admin=True, expires=NOW + timedelta(days=1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": ACME}, keys=(RECORD, ADMIN_RECORD)))
    return file


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {key}".encode()}


def at(moment: datetime) -> Callable[[], float]:
    return moment.timestamp


def test_everybody_is_let_in_where_no_keys_are_set() -> None:
    open_ = Authenticator(None)
    assert open_.is_open
    assert open_.identify({}) == ANONYMOUS
    assert open_.identify(bearer("whatever")) == ANONYMOUS
    assert not open_.reload_if_changed()


def test_a_key_leads_to_its_tenant(file: Path) -> None:
    keys = Authenticator(file, at(NOW))
    assert not keys.is_open
    assert keys.identify(bearer(KEY)) == Identity("acme", ACME, RECORD.id)
    assert keys.identify(bearer(ADMIN_KEY)) == Identity("acme", ACME, ADMIN_RECORD.id, is_admin=True)


@pytest.mark.parametrize("header", ["bearer {}", "BEARER {}", "Bearer  {} "])
def test_the_scheme_may_be_written_in_any_case(file: Path, header: str) -> None:
    assert Authenticator(file, at(NOW)).identify({b"authorization": header.format(KEY).encode()}).key_id == RECORD.id


def flip(text: str) -> str:
    return text[:-1] + ("A" if text[-1] != "A" else "B")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer sk-",
        b"Basic " + KEY.encode(),
        KEY.encode(),
        b"Bearer " + KEY.encode()[:-1],
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer " + flip(KEY).encode(),
        b"Bearer " + KEY.upper().encode(),
        b"Bearer sk-0000000000000000-" + KEY.rpartition("-")[2].encode().rjust(43, b"x")[:43],
        b"Bearer " + KEY.encode() + b"\n",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
        f"Bearer {RECORD.hash}".encode(),
        f"Bearer sk-{RECORD.id}-{RECORD.hash[:43]}".encode(),
    ],
    ids=lambda header: f"{len(header)} bytes",
)
def test_what_is_no_key_is_refused_and_not_sent_back(file: Path, header: bytes) -> None:
    if header.endswith(b"\n"):
        header = header.replace(b"sk-", b"sk_")  # a line break at the end is stripped with the spaces
    with pytest.raises(AuthenticationError) as caught:
        Authenticator(file, at(NOW)).identify({b"authorization": header})
    error = caught.value
    assert (error.http_status, error.code, error.message) == (401, "invalid_api_key", "Incorrect API key provided.")
    assert error.headers == {"www-authenticate": "Bearer"}


def test_no_key_at_all_is_told_how_to_give_one(file: Path) -> None:
    with pytest.raises(AuthenticationError, match="Authorization: Bearer"):
        Authenticator(file).identify({})


def test_a_key_ends_with_its_time(file: Path) -> None:
    assert Authenticator(file, at(NOW + timedelta(hours=23))).identify(bearer(ADMIN_KEY)).is_admin
    with pytest.raises(AuthenticationError) as caught:
        Authenticator(file, at(NOW + timedelta(days=1))).identify(bearer(ADMIN_KEY))
    assert caught.value.code == "expired_api_key"


def test_changes_are_taken_over_without_a_restart(file: Path) -> None:
    keys = Authenticator(file, at(NOW))
    assert not keys.reload_if_changed()
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(RECORD,)))
    assert keys.reload_if_changed()
    assert keys.identify(bearer(KEY)).tenant == Tenant()
    with pytest.raises(AuthenticationError):
        keys.identify(bearer(ADMIN_KEY))
    assert not keys.reload_if_changed()


def test_a_mounted_secret_changes_by_its_link(tmp_path: Path, file: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_keys(tmp_path / "one/keys.yaml", KeysFile(tenants={"acme": ACME}, keys=(RECORD,)))
    write_keys(tmp_path / "two/keys.yaml", KeysFile(tenants={"acme": ACME}, keys=(ADMIN_RECORD,)))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "mounted.yaml").symlink_to("..data/keys.yaml")
    keys = Authenticator(tmp_path / "mounted.yaml", at(NOW))
    assert keys.identify(bearer(KEY)).key_id == RECORD.id
    (tmp_path / "..new").symlink_to("two")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert keys.reload_if_changed()
    assert keys.identify(bearer(ADMIN_KEY)).is_admin


@pytest.mark.parametrize("text", ["", "keys: [", "keys: 3\n", "tenants: {a: {rpm: 1}}\n", None])
def test_a_broken_file_leaves_the_old_keys_in_force(
    file: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Authenticator(file, at(NOW))
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert not keys.reload_if_changed()
    assert keys.identify(bearer(KEY)).key_id == RECORD.id
    assert "the keys from before stay in force" in caplog.text
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(RECORD,)))
    assert keys.reload_if_changed()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tenants": {}}, "not under tenants"),
        ({"keys": [RECORD.model_dump(mode="json")] * 2}, "occurs 2 times"),
        ({"keys": [{**RECORD.model_dump(mode="json"), "hash": "00"}]}, "keys.0.hash"),
        ({"keys": [{**RECORD.model_dump(mode="json"), "secret": "x"}]}, "keys.0.secret"),
        ({"tenants": {"acme": {"requests_per_minute": 0}}}, "tenants.acme.requests_per_minute"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_at_the_start(
    file: Path, change: dict[str, object], complaint: str
) -> None:
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(SettingsError, match=complaint) as caught:
        Authenticator(file)
    assert RECORD.hash not in caught.value.message
    assert RECORD.salt not in caught.value.message


def test_a_file_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Authenticator(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("models", "is_allowed"),
    [(None, True), (("nano",), True), (("deepseek-ai/DeepSeek-OCR",), True), (("other",), False), ((), False)],
)
def test_a_tenant_may_use_its_own_models_only(models: tuple[str, ...] | None, is_allowed: bool) -> None:
    identity = Identity("acme", Tenant(models=models))
    if is_allowed:
        check_model_allowed(identity, "nano", "deepseek-ai/DeepSeek-OCR")
        return
    with pytest.raises(PermissionDeniedError) as caught:
        check_model_allowed(identity, "nano", "deepseek-ai/DeepSeek-OCR")
    assert (caught.value.http_status, caught.value.code, caught.value.param) == (403, "model_not_allowed", "model")


# The file and the keys themselves


def test_a_key_holds_256_bits_and_its_record_none_of_them() -> None:
    key_id, secret = split_key(KEY) or ("", "")
    assert key_id == RECORD.id
    assert len(secret) == 43
    assert secret not in RECORD.model_dump_json()
    assert verify_secret(RECORD, secret)
    assert not verify_secret(ADMIN_RECORD, secret)
    assert not verify_secret(None, secret)


def test_equal_secrets_do_not_show() -> None:
    assert len({make_key("acme", created=NOW)[1].hash for _ in range(10)}) == 10


def test_what_is_written_is_read_again_and_for_nobody_else(file: Path) -> None:
    assert read_keys(file) == KeysFile(tenants={"acme": ACME}, keys=(RECORD, ADMIN_RECORD))
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    write_keys(file, KeysFile())
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_keys(file) == KeysFile()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_link_stays_a_link(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    write_keys(link, KeysFile())
    assert link.is_symlink()
    assert read_keys(file) == KeysFile()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        write_keys(tmp_path / "none" / "keys.yaml", KeysFile())


@given(st.text() | st.from_regex(r"sk-[0-9a-f]{16}-[A-Za-z0-9_-]{43}", fullmatch=True))
def test_arbitrary_text_is_no_key(text: str) -> None:
    parts = split_key(text)
    assert parts is None or not verify_secret(RECORD, parts[1])


def test_a_record_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="timezone"):
        KeyRecord(**{**RECORD.model_dump(), "created": datetime(2026, 1, 1)})


@pytest.mark.parametrize("is_local", [True, False])
def test_without_keys_only_this_machine_is_an_admin(is_local: bool) -> None:
    assert Authenticator(None, is_local=is_local).identify({}).is_admin is is_local
