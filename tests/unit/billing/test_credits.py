from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from serving.billing.credits import CREDIT_HEADER, SERVICE_MARK, CreditReader, CreditSigner, find_signer
from serving.errors import InvalidRequestError
from serving.http.bodies import read_headers, read_request_id

SIGNER = CreditSigner(b"secret")


@pytest.mark.parametrize("nanodollars", [0, 1, 3_400, 10**17])
def test_what_was_signed_is_read(nanodollars: int) -> None:
    assert SIGNER.read("job-1-p2-t1", SIGNER.sign("job-1-p2-t1", nanodollars)) == nanodollars


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3400",
        "3400.",
        "3400." + "0" * 64,
        "-1." + "0" * 64,
        "9" * 30 + "." + "0" * 64,
        SIGNER.sign("job-1-p3-t1", 3_400),
        CreditSigner(b"other").sign("job-1-p2-t1", 3_400),
        SIGNER.sign("job-1-p2-t1", 3_400).replace("3400.", "9999."),
        SIGNER.sign("job-1-p2-t1", 3_400) + " ",
        "\u0663." + "0" * 64,
    ],
)
def test_anything_else_is_worth_nothing(text: str) -> None:
    assert SIGNER.read("job-1-p2-t1", text) is None


def test_the_secret_is_of_the_settings_or_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert find_signer(None, file) is None
    file.write_bytes(b"secret")
    for signer in (find_signer(None, file), find_signer(SecretStr("secret"), tmp_path / "none")):
        assert signer is not None
        assert signer.read("x", SIGNER.sign("x", 7)) == 7


def test_a_secret_that_is_made_later_or_anew_is_found(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    reader = CreditReader(None, file)
    for secret in (b"first", b"second"):
        signed = CreditSigner(secret).sign("x", 7)
        assert reader.read("x", signed) is None
        file.write_bytes(secret)
        assert reader.read("x", signed) == 7
        assert reader.read("x", "7." + "0" * 64) is None
        assert reader.read("x", signed) == 7


def test_no_client_can_call_itself_a_service() -> None:
    assert read_request_id({b"x-request-id": f"{SERVICE_MARK}job-1-p1-t1".encode()}) != f"{SERVICE_MARK}job-1-p1-t1"
    signed = CREDIT_HEADER.encode()
    with pytest.raises(InvalidRequestError):
        read_headers({"headers": [(signed, b"1"), (signed, b"2")]})
