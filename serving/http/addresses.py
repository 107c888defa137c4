"""Addresses as text: URLs made of them, and which ones anybody on the internet can be at. Pure."""

from __future__ import annotations

import ipaddress

_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
"""All that IANA has given out for global unicast; what lies outside is local, mapped, translated or reserved."""
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's host, reached from every machine there, with a public address
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service is one of these
        "192.88.99.0/24",  # relays to 6to4: RFC 7526
        "2001::/23",  # protocol assignments, Teredo among them: an IPv4 address inside
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation: RFC 9637
    )
)


def http_url(host: str, port: int) -> str:
    """`http://host:port`, with an IPv6 address in the brackets that a URL wants (RFC 3986, 3.2.2)."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_public_address(text: str) -> bool:
    """Whether an IP address is a machine's on the public internet, so that asking it shows a client nothing that he
    could not see himself.

    Python's own `is_global` follows IANA's registries but for what its release did not know yet; so for IPv6 only what
    is given out passes, which leaves out every form that carries an IPv4 address inside (mapped, 6to4, NAT64, Teredo).
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
