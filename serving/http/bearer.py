"""One key for a port of the stack's own: an engine's, or a process's metrics. Tenants' keys are the router's."""

from __future__ import annotations

import hashlib
import secrets

from pydantic import SecretStr
from starlette.types import Scope

_AUTHORIZATION = b"authorization"


class BearerKey:
    """Compares in constant time. Without a key everyone is let in."""

    def __init__(self, key: SecretStr | str | None) -> None:
        text = key.get_secret_value() if isinstance(key, SecretStr) else key
        self._digest = None if text is None else _digest(text.encode())

    def lets_in(self, scope: Scope) -> bool:
        """Whether a request brings the key, as `Authorization: Bearer KEY`. Of several headers none counts."""
        if self._digest is None:
            return True
        given = [value for name, value in scope["headers"] if name == _AUTHORIZATION]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(_digest(key.strip()), self._digest)


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that the time of a comparison tells nothing."""
    return hashlib.sha256(key).digest()
