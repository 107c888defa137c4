"""Deducts what a page was charged before from what it is charged when it has to be read again, so it is paid for once.

An OCR service may die before it has stored a page's answer. The ledger then has that request and the page's job does
not, so the service that takes over the job requests the page again. It looks up in the ledger what earlier requests for
the page were charged, and sends the amount in a header that it signs; the router deducts it, down to 0. The secret is
shared by the OCR services and routers of a stack, and known to no client.

The header also identifies a request as a service's; its amount is 0 if there is nothing to deduct. In the ledger such
requests have ids that begin with `SERVICE_MARK`, which no client's id can. Otherwise a tenant could pass off its own
chats as earlier tries of a page, and have their cost refunded.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

CREDIT_HEADER = "x-serving-credit"
SERVICE_MARK = "~"
"""Never part of an `x-request-id` accepted from a client (`serving.http.bodies.read_request_id`)."""
_CONTEXT = b"serving.billing.credits"
_VALUE = re.compile(r"([0-9]{1,18})\.([0-9a-f]{64})")


SignCredit = Callable[[str, int], str]
"""From a request's id and nanodollars to the value of `CREDIT_HEADER`."""


class CreditSigner:
    """Signs and verifies the header. Pure."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha256(_CONTEXT + secret).digest()

    def sign(self, request_id: str, nanodollars: int) -> str:
        """The header's value, valid for one request id (`x-request-id`) and one amount."""
        return f"{nanodollars}.{self._digest(request_id, nanodollars)}"

    def read(self, request_id: str, text: str) -> int | None:
        """The amount in nanodollars; None for anything not signed for this request with this secret."""
        found = _VALUE.fullmatch(text)
        if found is None:
            return None
        nanodollars = int(found[1])
        return nanodollars if hmac.compare_digest(found[2], self._digest(request_id, nanodollars)) else None

    def _digest(self, request_id: str, nanodollars: int) -> str:
        return hmac.new(self._key, f"{request_id} {nanodollars}".encode(), "sha256").hexdigest()


class CreditReader:
    """Verifies the header in a router, which may have started before the service that creates the secret's file."""

    def __init__(self, secret: SecretStr | None, file: Path) -> None:
        self._secret = secret
        self._file = file
        self._signer: CreditSigner | None = None

    def read(self, request_id: str, text: str) -> int | None:
        """The amount in nanodollars; None if no service of this stack has signed it."""
        found = self._signer.read(request_id, text) if self._signer is not None else None
        if found is not None:
            return found
        self._signer = find_signer(self._secret, self._file)  # the file may be new or have changed
        return self._signer.read(request_id, text) if self._signer is not None else None


def find_signer(secret: SecretStr | None, file: Path) -> CreditSigner | None:
    """The signer of the settings' secret, or of the one that an OCR service on this machine keeps in a file.

    None if there is neither; then nothing is deducted.
    """
    if secret is not None:
        return CreditSigner(secret.get_secret_value().encode())
    with contextlib.suppress(OSError):
        return CreditSigner(file.read_bytes())
    return None
