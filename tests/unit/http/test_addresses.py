from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from serving.http.addresses import http_url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "2001:db8::7"])
def test_a_url_is_split_into_the_host_and_port_that_it_was_made_of(host: str) -> None:
    parts = urlsplit(http_url(host, 8000))
    assert (parts.scheme, parts.hostname, parts.port, parts.path) == ("http", host, 8000, "")
