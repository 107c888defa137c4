"""What a page was charged before it has to be read again, taken off the new charge: so it is paid for once.

An OCR service may die with a page's answer in its hands. The ledger has that request and the page's job does not, so
the page is asked for anew by whoever takes the job over. That service looks up in the ledger what earlier requests for
the page were charged, and says so in a header that it signs; the router takes as much off as the new request comes to.
The secret is shared by the OCR services and the routers of one stack, and known to no client.

The header also says that a request is a service's at all, with an amount of 0 when there is nothing to take off. Such
requests stand in the ledger under ids that begin with `SERVICE_MARK`, which no client's id can: else a tenant could
have its own chats taken for a page's earlier tries, and have what they cost given back.
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
"""Stands in no `x-request-id` that is taken from a client (`serving.http.bodies.read_request_id`)."""
_CONTEXT = b"serving.billing.credits"
_VALUE = re.compile(r"([0-9]{1,18})\.([0-9a-f]{64})")


SignCredit = Callable[[str, int], str]
"""From a request's id and nanodollars to the value of `CREDIT_HEADER`."""


class CreditSigner:
    """Signs and reads the header. Pure."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha256(_CONTEXT + secret).digest()

    def sign(self, request_id: str, nanodollars: int) -> str:
        """The header's value, good for one request id (`x-request-id`) and one amount."""
        return f"{nanodollars}.{self._digest(request_id, nanodollars)}"

    def read(self, request_id: str, text: str) -> int | None:
        """The amount in nanodollars; None for whatever was not signed for this request with this secret."""
        found = _VALUE.fullmatch(text)
        if found is None:
            return None
        nanodollars = int(found[1])
        return nanodollars if hmac.compare_digest(found[2], self._digest(request_id, nanodollars)) else None

    def _digest(self, request_id: str, nanodollars: int) -> str:
        return hmac.new(self._key, f"{request_id} {nanodollars}".encode(), "sha256").hexdigest()


class CreditReader:
    """Reads the header in a router, which may have started before the service that makes the secret's file."""

    def __init__(self, secret: SecretStr | None, file: Path) -> None:
        self._secret = secret
        self._file = file
        self._signer: CreditSigner | None = None

    def read(self, request_id: str, text: str) -> int | None:
        """The amount in nanodollars; None when no service of the stack's has signed it."""
        found = self._signer.read(request_id, text) if self._signer is not None else None
        if found is not None:
            return found
        self._signer = find_signer(self._secret, self._file)  # the file may be new, or another one
        return self._signer.read(request_id, text) if self._signer is not None else None


def find_signer(secret: SecretStr | None, file: Path) -> CreditSigner | None:
    """The signer of the settings' secret, or of the one that an OCR service on this machine keeps in a file.

    None where there is neither: then nothing is taken off.
    """
    if secret is not None:
        return CreditSigner(secret.get_secret_value().encode())
    with contextlib.suppress(OSError):
        return CreditSigner(file.read_bytes())
    return None
