from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serving.ocr_api.options import ReadOptions
from serving.ocr_api.shapes import JobPages
from serving.ocr_client import requests
from serving.ocr_client.errors import ConnectionLostError
from serving.ocr_client.requests import Follower
from serving.ocr_client.wire import Document

PAPER = Document(b"x", "x.pdf")


def pages(*seqs: int, has_more: bool = False) -> JobPages:
    data = [{"index": seq, "number": seq + 1, "status": "completed", "seq": seq} for seq in seqs]
    return JobPages.model_validate({"data": data, "has_more": has_more})


def test_a_follower_goes_on_after_the_last_page_that_it_saw() -> None:
    follower = Follower(0)
    assert [page.seq for page in follower.take(pages(1, 2, has_more=True))] == [1, 2]
    assert (follower.after, follower.has_more) == (2, True)
    assert not follower.take(pages())
    assert (follower.after, follower.has_more) == (2, False)


def test_a_service_that_promises_more_and_gives_none_is_not_asked_for_ever() -> None:
    follower = Follower(4)
    follower.take(pages(has_more=True))
    assert (follower.after, follower.has_more) == (4, False)


def test_what_costs_money_is_not_sent_twice_unless_it_has_a_key() -> None:
    assert not requests.read(PAPER, ReadOptions("nano")).is_repeatable
    assert not requests.stream(PAPER, ReadOptions("nano")).is_repeatable
    one, other = (requests.submit(PAPER, ReadOptions("nano"), None) for _ in range(2))
    assert one.is_repeatable
    assert one.arguments["headers"]["idempotency-key"] != other.arguments["headers"]["idempotency-key"]
    assert requests.submit(PAPER, ReadOptions("nano"), "mine").arguments["headers"] == {"idempotency-key": "mine"}


def test_a_document_is_open_only_while_it_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "x.pdf"
    file.write_bytes(b"%PDF")
    contents = []

    def send() -> None:
        with requests.read(file, ReadOptions("nano")).opened() as request:
            contents.append(request["files"]["file"][1])
            assert contents[0].read() == b"%PDF"
            raise httpx.ReadError("gone")

    with pytest.raises(ConnectionLostError):
        send()
    assert contents[0].closed
    with pytest.raises(FileNotFoundError), requests.read(tmp_path / "none", ReadOptions("nano")).opened():
        pass
