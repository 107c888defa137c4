from __future__ import annotations

import socket

import pytest

from serving.errors import InvalidRequestError, PermissionDeniedError
from serving.http.origins import FORM, JSON, build_rules, check_content_type, check_source

LOCAL = build_rules("127.0.0.1", ())
OPEN = build_rules("0.0.0.0", ("OCR.example",))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "localhost.", "[::1]:8000", "127.0.0.2", "app.localhost"]
)
def test_loopback_is_answered(host: str) -> None:
    check_source({b"host": host.encode()}, LOCAL)
    check_source({b"host": host.encode()}, OPEN)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "192.168.0.7:8000", "127.0.0.1.evil.net", ""])
def test_a_name_that_was_pointed_here_is_refused(host: str) -> None:
    with pytest.raises(PermissionDeniedError, match="allowed_hosts") as caught:
        check_source({b"host": host.encode()}, LOCAL)
    assert caught.value.code == "host_not_allowed"


def test_who_listens_for_others_is_known_by_addresses_and_by_its_names() -> None:
    for host in ("192.168.0.7:8000", "[fe80::1]", socket.gethostname(), "ocr.example:8000"):
        check_source({b"host": host.encode()}, OPEN)
    with pytest.raises(PermissionDeniedError):
        check_source({b"host": b"evil.example"}, OPEN)


def test_programs_say_nothing() -> None:
    check_source({}, LOCAL)  # HTTP/1.0
    check_source({b"host": b"localhost:8000", b"user-agent": b"curl/8"}, LOCAL)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (b"http://localhost:8000", b"localhost:8000"),
        (b"http://127.0.0.1", b"127.0.0.1"),
        (b"HTTP://LOCALHOST:8000", b"localhost:8000"),
        (b"https://ocr.example", b"10.0.0.1:8000"),  # a proxy in front that says another host
    ],
)
def test_its_own_pages_may_ask(origin: bytes, host: bytes) -> None:
    check_source({b"host": host, b"origin": origin, b"sec-fetch-site": b"same-origin"}, OPEN)


@pytest.mark.parametrize(
    "headers",
    [
        {b"origin": b"https://evil.example"},
        {b"origin": b"null"},
        {b"origin": b"http://localhost:3000"},
        {b"origin": b"http://localhost:8000@evil.example"},
        {b"origin": b"http://["},
        {b"origin": b"file://localhost:8000"},
        {b"origin": b""},
        {b"sec-fetch-site": b"cross-site"},
    ],
)
def test_other_pages_may_not(headers: dict[bytes, bytes]) -> None:
    given = {b"host": b"localhost:8000", **headers}
    with pytest.raises(PermissionDeniedError) as caught:
        check_source(given, OPEN)
    assert caught.value.code == "origin_not_allowed"
    check_source(given, OPEN, is_page=True)  # a link to the page for people


@pytest.mark.parametrize(
    "kind", [b"application/json", b"Application/JSON; charset=utf-8", b"multipart/form-data; boundary=x"]
)
def test_bodies_that_browsers_ask_for_first_are_read(kind: bytes) -> None:
    check_content_type({b"content-length": b"2", b"content-type": kind}, JSON, FORM)


@pytest.mark.parametrize(
    "kind", [b"text/plain", b"application/x-www-form-urlencoded", b"", b"text/plain;application/json"]
)
def test_other_bodies_are_refused_with_the_header_to_send(kind: bytes) -> None:
    for framing in ({b"content-length": b"2"}, {b"transfer-encoding": b"chunked"}):
        with pytest.raises(InvalidRequestError, match="'Content-Type: application/json'") as caught:
            check_content_type({**framing, b"content-type": kind}, JSON)
        assert caught.value.param == "content-type"
    check_content_type({b"content-length": b"0", b"content-type": kind}, JSON)
    check_content_type({}, JSON)
