"""Which web pages may use a service that asks for no key. Pure.

A browser runs any page's requests with its own machine's reach, so a service on loopback that anybody may use is open
to every page that its user looks at. Two ways lead there, and both can be told by headers that no page can forge:

- The page sends requests to another site than its own. Browsers say so (`Origin`, `Sec-Fetch-Site`), and let it send
  bodies of a few types only unless the service agrees first (https://fetch.spec.whatwg.org/#cors-safelisted-request-header).
- The page's own name is made to point to this machine ("DNS rebinding"). To the browser it is the page's own site then;
  the page's name stands in `Host`.

Programs send neither an `Origin` nor a foreign `Host`. Where keys are asked for none of this is looked at: no page
knows a key.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from serving.errors import InvalidRequestError, PermissionDeniedError
from serving.settings.base import is_loopback

JSON = b"application/json"
FORM = b"multipart/form-data"
_FOREIGN = b"cross-site"


@dataclass(frozen=True, slots=True)
class HostRules:
    """Under which names a service is reached."""

    names: frozenset[str]
    """Of hosts, in small letters."""
    trusted: frozenset[str]
    """Those of them whose pages may send requests from other ports and schemes, too."""
    takes_addresses: bool
    """Whether any IP address is one: a name can be pointed here by somebody else, an address cannot."""

    def is_known(self, host: str) -> bool:
        """Whether a request's host is one of this service's."""
        if host in self.names or host.endswith(".localhost") or is_loopback(host):
            return True
        return self.takes_addresses and _is_address(host)


def build_rules(host: str, allowed_hosts: Collection[str]) -> HostRules:
    """The rules of a service that listens on `host`: on loopback only loopback's names, else every address and this
    machine's name; and those that the settings allow."""
    trusted = frozenset(name.lower().rstrip(".") for name in allowed_hosts)
    if is_loopback(host):
        return HostRules(trusted, trusted, takes_addresses=False)
    own = socket.gethostname().lower()
    names = {host.lower(), own, own.partition(".")[0], own.partition(".")[0] + ".local"}
    return HostRules(trusted | names, trusted, takes_addresses=True)


def check_source(headers: Mapping[bytes, bytes], rules: HostRules, *, is_page: bool = False) -> None:
    """Refuse what a foreign web page may have sent.

    Args:
        headers: names in small letters.
        rules: of this service.
        is_page: whether what is asked for is a page for people, to which links may lead from anywhere.

    Raises:
        PermissionDeniedError: it may be one's.
    """
    given = headers.get(b"host")
    if given is not None and not rules.is_known(_split_host(given)):
        shown = _split_host(given)[:100]
        raise PermissionDeniedError(
            f"Without API keys nothing is answered under the name '{shown}'; the operator can add it to "
            "router.allowed_hosts, or set router.keys_file.",
            code="host_not_allowed",
        )
    if is_page:
        return
    origin = headers.get(b"origin")
    if headers.get(b"sec-fetch-site") == _FOREIGN or (origin is not None and not _is_own(origin, given, rules)):
        raise PermissionDeniedError(
            "Without API keys no other web page's requests are answered; the operator can add its host to "
            "router.allowed_hosts, or set router.keys_file.",
            code="origin_not_allowed",
        )


def check_content_type(headers: Mapping[bytes, bytes], *allowed: bytes) -> None:
    """Refuse a body of a type that any web page may send without asking.

    Raises:
        InvalidRequestError: there is a body, of none of the allowed types.
    """
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if has_body and kind not in allowed:
        names = " or ".join(name.decode() for name in allowed)
        raise InvalidRequestError(
            f"Send the header 'Content-Type: {names}'; without API keys no other body is read.",
            param="content-type",
            code="invalid_content_type",
        )


def _is_own(origin: bytes, host: bytes | None, rules: HostRules) -> bool:
    try:
        found = urlsplit(origin.decode("latin-1").lower())
        name = found.hostname
    except ValueError:
        return False
    if found.scheme not in ("http", "https") or name is None:
        return False
    is_same = host is not None and found.netloc == host.decode("latin-1").lower()
    return is_same or name.rstrip(".") in rules.trusted


def _split_host(value: bytes) -> str:
    """The name of a `Host` header, without its port."""
    text = value.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
