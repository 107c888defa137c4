"""Encryption of the API keys and passwords that jobs keep beyond the request that submitted them, until they end."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

from serving.billing.credits import CreditSigner
from serving.errors import SettingsError

_CONTEXT = b"serving.ocr.jobs.model"


@dataclass(frozen=True, slots=True)
class JobSecrets:
    """What a job needs to be read."""

    api_key: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    """Opens the document."""


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

    def seal(self, secrets: JobSecrets) -> str:
        """The encrypted secrets as text for the database; empty if there are none."""
        if secrets.api_key is None and secrets.password is None:
            return ""
        text = secrets.api_key or ""
        if secrets.password is not None:
            text += f"\n{secrets.password}"  # keys have no line breaks
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> JobSecrets:
        """Decrypt a job's secrets.

        Raises:
            SettingsError: it was encrypted with another secret.
        """
        if not sealed:
            return JobSecrets()
        try:
            api_key, line_break, password = self._fernet.decrypt(sealed.encode()).decode().partition("\n")
            return JobSecrets(api_key or None, password if line_break else None)
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
