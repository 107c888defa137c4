"""A single bearer key for an internal port: an engine's, or a metrics port. The router checks tenants' keys itself."""

from __future__ import annotations

import hashlib
import secrets

from pydantic import SecretStr
from starlette.types import Scope

_AUTHORIZATION = b"authorization"


class BearerKey:
    """Checks a bearer key in constant time. Without a key every request is accepted."""

    def __init__(self, key: SecretStr | str | None) -> None:
        text = key.get_secret_value() if isinstance(key, SecretStr) else key
        self._digest = None if text is None else _digest(text.encode())

    def lets_in(self, scope: Scope) -> bool:
        """Whether a request has the header `Authorization: Bearer KEY`, exactly once and with the right key."""
        if self._digest is None:
            return True
        given = [value for name, value in scope["headers"] if name == _AUTHORIZATION]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(_digest(key.strip()), self._digest)


def _digest(key: bytes) -> bytes:
    """Hash to a fixed length, so that the time of a comparison reveals nothing about the key."""
    return hashlib.sha256(key).digest()
