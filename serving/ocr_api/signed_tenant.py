"""The router's signed statement of whose key a request carries, so that an OCR service need not ask for it.

By the time the router relays a request it has checked the key. It states the tenant in a header and signs it with the
secret that routers and OCR services of one stack share. The signature covers the request's method, path, id and
`Authorization` header too and expires, so the header is of no use with any other request. Routers drop the header from
what clients send. A service that cannot verify it trusts nothing in it and asks a router about the key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

TENANT_HEADER = "x-serving-tenant"
VALID_S = 60
"""How long a signature is valid. Clocks that differ by more make services ask, as without a signature."""
_CONTEXT = b"serving.ocr_api.signed_tenant"


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """The request that a signature is bound to."""

    method: str
    path: str
    """In its canonical form, as the router sends it."""
    request_id: str
    authorization: str = ""
    """The whole header; empty without one."""


@dataclass(frozen=True, slots=True)
class SignedTenant:
    """Whose request it is."""

    tenant_id: str
    key_id: str
    """Empty where the router asks for no keys."""
    expires_s: int
    """Seconds since 1970."""


class TenantSigner:
    """Signs and verifies with the secret of the settings, or else with the one in a file.

    The file is read again when it has changed: the service that makes it may start after the router, and an operator
    may replace it. Without a secret nothing is signed and nothing is valid.
    """

    def __init__(self, secret: SecretStr | None, file: Path) -> None:
        self._given = secret.get_secret_value().encode() if secret is not None else None
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._secret = b""

    def sign(self, tenant: SignedTenant, request: SignedRequest) -> str | None:
        """The header's value; None without a secret."""
        secret = self._read_secret()
        if not secret:
            return None
        fields = [tenant.tenant_id, tenant.key_id, tenant.expires_s]
        payload = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()
        return f"{payload}.{_digest(secret, payload, request)}"

    def read(self, value: str, request: SignedRequest, now_s: float) -> SignedTenant | None:
        """The tenant that a header names; None unless it was signed for this request and is valid at `now_s`."""
        secret = self._read_secret()
        payload, _, digest = value.partition(".")
        if not secret or not hmac.compare_digest(digest.encode(), _digest(secret, payload, request).encode()):
            return None
        tenant_id, key_id, expires_s = json.loads(base64.urlsafe_b64decode(payload))
        # A time further ahead than any router signs is a clock that is wrong.
        return SignedTenant(tenant_id, key_id, expires_s) if now_s < expires_s <= now_s + 2 * VALID_S else None

    def _read_secret(self) -> bytes:
        if self._given is not None:
            return self._given
        try:
            found = self._file.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                self._secret, self._seen = self._file.read_bytes(), seen
        except OSError:
            self._secret, self._seen = b"", None
        return self._secret


def _digest(secret: bytes, payload: str, request: SignedRequest) -> str:
    key = hashlib.sha256(_CONTEXT + secret).digest()
    covered = [payload, request.method, request.path, request.request_id, request.authorization]
    return hmac.new(key, json.dumps(covered).encode(), "sha256").hexdigest()
