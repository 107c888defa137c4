"""Network addresses as text: building URLs, and telling public addresses from internal ones. Pure."""

from __future__ import annotations

import ipaddress

_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
"""Everything that IANA has assigned for global unicast. Other addresses are local, mapped, translated or reserved."""
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's host service: a public address that every machine there can reach
        "192.0.0.0/24",  # protocol assignments, among them Oracle's metadata service
        "192.88.99.0/24",  # relays to 6to4: RFC 7526
        "2001::/23",  # protocol assignments, Teredo among them: an IPv4 address inside
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation: RFC 9637
    )
)


def http_url(host: str, port: int) -> str:
    """Return `http://host:port`, with an IPv6 address in brackets (RFC 3986, section 3.2.2)."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_public_address(text: str) -> bool:
    """Whether an IP address is on the public internet, where a client could send requests itself.

    Python's `is_global` follows IANA's registries as they were when it was released. For IPv6 only assigned ranges are
    accepted, which excludes all forms that embed an IPv4 address (mapped, 6to4, NAT64, Teredo).
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if address.version == 6 and address not in _GLOBAL_V6:
        return False
    return not any(address in network for network in _REFUSED)
