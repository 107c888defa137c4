"""Encryption of the API keys that jobs keep beyond the request that submitted them, until they have ended."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

from serving.billing.credits import CreditSigner
from serving.errors import SettingsError

_CONTEXT = b"serving.ocr.jobs.model"


class KeySealer:
    """Encrypts keys with the secret in the settings, or with one in a file that only this user can read."""

    def __init__(self, secret: SecretStr | None, folder: Path) -> None:
        """Use the given secret, or the one in `folder`, which is created if missing.

        Raises:
            SettingsError: the file cannot be created, or others can read it.
        """
        given = secret.get_secret_value().encode() if secret is not None else _read_secret(folder / "secret")
        self._fernet = Fernet(base64.urlsafe_b64encode(hashlib.sha256(_CONTEXT + given).digest()))
        self.signer = CreditSigner(given)
        """Signs credits, so that routers trust them."""

    def seal(self, api_key: str | None) -> str:
        """The encrypted key as text for the database; empty without a key."""
        return self._fernet.encrypt(api_key.encode()).decode() if api_key is not None else ""

    def open(self, sealed: str) -> str | None:
        """Decrypt a key.

        Raises:
            SettingsError: it was encrypted with another secret.
        """
        if not sealed:
            return None
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken as error:
            raise SettingsError("the job's API key was encrypted with another ocr.secret than this one") from error


def _read_secret(file: Path) -> bytes:
    """The file's content. A missing file is created with random content; the first of several processes wins."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = file.with_name(f".secret-{os.getpid()}")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
            out.write(base64.b64encode(os.urandom(32)))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(new, file)
        finally:
            new.unlink()
        if file.stat().st_mode & 0o077:
            raise SettingsError(
                f"{file}: other users can read it; run chmod 600 on it, or delete it when no jobs are open"
            )
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be created or read: {error.strerror}") from error
