"""The keys file: tenants, and the hashes of their keys.

    tenants:
      acme: {requests_per_minute: 600, priority: high}
    keys:
      - {id: 5f0c9a3b7d21e846, tenant: acme, salt: ..., hash: ..., created: 2026-01-31T12:00:00Z}

A key has the form `sk-<id>-<secret>`. The id selects the entry and is not secret. The secret is 256 random bits; only
its SHA-256 with the entry's own salt is stored. Slow hashes (scrypt, Argon2) make guessing expensive for secrets short
enough to be guessed; 2**256 cannot be searched at any speed, and a slow hash per request would help an attacker to
overload the router. The salt hides equal secrets, should a file be written by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AwareDatetime, Field, StringConstraints, ValidationError, model_validator

from serving.errors import SettingsError
from serving.settings.base import Frozen, Name
from serving.settings.sources import read_yaml
from serving.settings.tenants import Tenant

_PREFIX = "sk-"
_KEY = re.compile(r"sk-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_SECTIONS = ("tenants", "keys")
_HEADING = "# Made by `serving keys`. Keys are kept as salted hashes and cannot be read out of this file.\n"


class KeyRecord(Frozen):
    """What is stored of a key. None of it grants access."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    tenant: Name
    salt: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    hash: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    is_admin: bool = False
    created: AwareDatetime
    name: Annotated[str, StringConstraints(max_length=200)] = ""
    expires: AwareDatetime | None = None

    def is_expired(self, now_s: float) -> bool:
        return self.expires is not None and self.expires.timestamp() <= now_s


class KeysFile(Frozen):
    """The whole file."""

    tenants: dict[Name, Tenant] = Field(default_factory=dict)
    keys: tuple[KeyRecord, ...] = ()

    @model_validator(mode="after")
    def _check_references(self) -> KeysFile:
        for key_id, count in Counter(key.id for key in self.keys).items():
            if count > 1:
                raise ValueError(f"the key {key_id} occurs {count} times")
        for key in self.keys:
            if key.tenant not in self.tenants:
                raise ValueError(f"the key {key.id} is of tenant {key.tenant!r}, which is not under tenants")
        return self


# Of the right lengths, so that comparing with a key that does not exist takes as long as with one that does.
_NO_SALT, _NO_HASH = bytes(16).hex(), bytes(32).hex()


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key; None if the text is not a key."""
    found = _KEY.fullmatch(text)
    return (found[1], found[2]) if found else None


def verify_secret(record: KeyRecord | None, secret: str) -> bool:
    """Whether this is the record's secret, in a time that reveals neither how much of it was right nor whether the
    record exists."""
    salt, expected = (record.salt, record.hash) if record is not None else (_NO_SALT, _NO_HASH)
    is_same = hmac.compare_digest(_hash(salt, secret), expected)
    return is_same and record is not None


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()


def make_key(
    tenant: str, *, created: datetime, name: str = "", is_admin: bool = False, expires: datetime | None = None
) -> tuple[str, KeyRecord]:
    """A new key: its text, which is stored nowhere, and the record to be stored."""
    key_id, salt, secret = secrets.token_hex(8), secrets.token_hex(16), secrets.token_urlsafe(32)
    record = KeyRecord(
        id=key_id,
        tenant=tenant,
        salt=salt,
        hash=_hash(salt, secret),
        is_admin=is_admin,
        created=created,
        name=name,
        expires=expires,
    )
    return f"{_PREFIX}{key_id}-{secret}", record


def read_keys(file: Path) -> KeysFile:
    """Read the file's content.

    Raises:
        SettingsError: with one line per error; no line contains a salt or a hash.
    """
    given = read_yaml(file, _SECTIONS)
    try:
        return KeysFile.model_validate(given)
    except ValidationError as error:
        lines = [
            f"{file}: {'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        raise SettingsError("\n".join(lines)) from None


def write_keys(file: Path, content: KeysFile) -> None:
    """Replace the file atomically, readable by its owner only: a reader sees the old content or the new.

    A symbolic link is kept, and its target replaced.

    Raises:
        SettingsError: it cannot be written.
    """
    file = file.resolve()
    shown = {"tenants": {}, "keys": [], **content.model_dump(mode="json", exclude_defaults=True)}
    text = _HEADING + yaml.safe_dump(shown, sort_keys=False)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # with mode 0600
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise SettingsError(f"{file}: cannot be written: {error.strerror}") from error
