from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from serving.billing.credits import CreditSigner, find_signer

SIGNER = CreditSigner(b"secret")


@pytest.mark.parametrize("nanodollars", [1, 3_400, 10**17])
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
    assert SIGNER.read("job-1-p2-t1", text) == 0


def test_the_secret_is_of_the_settings_or_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert find_signer(None, file) is None
    file.write_bytes(b"secret")
    for signer in (find_signer(None, file), find_signer(SecretStr("secret"), tmp_path / "none")):
        assert signer is not None
        assert signer.read("x", SIGNER.sign("x", 7)) == 7
