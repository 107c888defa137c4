"""Which web pages may use the API from a browser, and the headers that tell the browser so. Pure.

https://fetch.spec.whatwg.org/#http-cors-protocol. Without configured origins no page of another site may.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_Header = tuple[bytes, bytes]
_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")
_METHODS = b"GET, HEAD, POST, DELETE"
_MAX_AGE_S = b"600"
_VARY = (b"vary", b"origin")


class CorsRules:
    """The origins whose pages may use a service."""

    def __init__(self, origins: Collection[str]) -> None:
        """`*` stands for every origin."""
        self._any = "*" in origins
        self._origins = frozenset(origin.lower().rstrip("/").encode() for origin in origins)

    def allows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the request comes from a page that may use the service."""
        origin = headers.get(b"origin")
        return origin is not None and (self._any or origin.lower() in self._origins)

    def build_headers(self, headers: Mapping[bytes, bytes]) -> list[_Header]:
        """For the answer to an allowed request: the page may read it, and every header of it."""
        return [
            (b"access-control-allow-origin", headers[b"origin"]),
            (b"access-control-expose-headers", b"*"),
            _VARY,
        ]

    def build_preflight(self, headers: Mapping[bytes, bytes]) -> list[_Header]:
        """For the answer to a browser's question whether the page may send a request: with any header, since clients
        have many of their own (`x-stainless-*`), and `*` would not cover Authorization."""
        found: list[_Header] = [
            (b"access-control-allow-origin", headers[b"origin"]),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _MAX_AGE_S),
            _VARY,
        ]
        asked = headers.get(b"access-control-request-headers", b"")
        if _NAMES.fullmatch(asked):
            found.append((b"access-control-allow-headers", asked))
        return found
