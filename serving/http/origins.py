"""Which web pages may use a service that runs without API keys. Pure.

A browser sends any page's requests from the user's own machine, so an open service on loopback is exposed to every page
that the user visits. There are two ways to reach it, and headers that pages cannot forge reveal both:

- The page sends cross-site requests. Browsers mark them (`Origin`, `Sec-Fetch-Site`), and without the service's consent
  allow only a few body types (https://fetch.spec.whatwg.org/#cors-safelisted-request-header).
- The page's own host name is made to resolve to this machine (DNS rebinding). The browser then considers the service
  the page's own site, and `Host` contains the page's name.

Programs send neither an `Origin` nor a foreign `Host`. With API keys nothing is checked: pages do not know a key.
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
    """The names under which a service may be reached."""

    names: frozenset[str]
    """Host names in lower case."""
    trusted: frozenset[str]
    """The names among them whose pages may also send requests from other ports and schemes."""
    takes_addresses: bool
    """Whether every IP address is accepted as a host. A foreign name can be made to resolve here, an address cannot."""

    def is_known(self, host: str) -> bool:
        """Whether a host belongs to this service."""
        if host in self.names or host.endswith(".localhost") or is_loopback(host):
            return True
        return self.takes_addresses and _is_address(host)


def build_rules(host: str, allowed_hosts: Collection[str]) -> HostRules:
    """Build the rules of a service that listens on `host`: loopback names on loopback, otherwise every address and the
    machine's name; in both cases also the names that the settings allow."""
    trusted = frozenset(name.lower().rstrip(".") for name in allowed_hosts)
    if is_loopback(host):
        return HostRules(trusted, trusted, takes_addresses=False)
    own = socket.gethostname().lower()
    names = {host.lower(), own, own.partition(".")[0], own.partition(".")[0] + ".local"}
    return HostRules(trusted | names, trusted, takes_addresses=True)


def check_source(
    headers: Mapping[bytes, bytes], rules: HostRules, *, is_page: bool = False, is_trusted: bool = False
) -> None:
    """Refuse a request that a foreign web page may have sent.

    Args:
        headers: by lower-case name.
        rules: this service's rules.
        is_page: whether the request is for a page for people, which any site may link to.
        is_trusted: whether the settings allow the page that sent it (`router.cors_origins`).

    Raises:
        PermissionDeniedError: a foreign page may have sent the request.
    """
    given = headers.get(b"host")
    if given is not None and not rules.is_known(_split_host(given)):
        shown = _split_host(given)[:100]
        raise PermissionDeniedError(
            f"Without API keys this service does not answer under the name '{shown}'; the operator can add it to "
            "router.allowed_hosts, or set router.keys_file.",
            code="host_not_allowed",
        )
    if is_page or is_trusted:
        return
    origin = headers.get(b"origin")
    if headers.get(b"sec-fetch-site") == _FOREIGN or (origin is not None and not _is_own(origin, given, rules)):
        raise PermissionDeniedError(
            "Without API keys this service answers no requests of other web pages; the operator can add the host to "
            "router.allowed_hosts, or set router.keys_file.",
            code="origin_not_allowed",
        )


def check_content_type(headers: Mapping[bytes, bytes], *allowed: bytes) -> None:
    """Refuse a body of a type that any web page may send without a preflight request.

    Raises:
        InvalidRequestError: there is a body, and its type is not allowed.
    """
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if has_body and kind not in allowed:
        names = " or ".join(name.decode() for name in allowed)
        raise InvalidRequestError(
            f"Send the header 'Content-Type: {names}'; without API keys other bodies are refused.",
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
    """Return the name in a `Host` header, without the port."""
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
