"""The part of the hostile corpus that only the engine can judge, against the real stack.

What the router refuses never gets further than the router, whose own test sends it.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest
from hostile.corpus import CORPUS, Entry, Judge, chat
from hostile.wire import send

from e2e.conftest import Stack

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def port(stack: Stack) -> int:
    return urlsplit(stack.url).port or 0


@pytest.mark.parametrize("entry", [e for e in CORPUS if e.judge is Judge.ENGINE], ids=lambda entry: entry.name)
async def test_what_the_engine_judges_is_never_a_failure_of_the_server(port: int, entry: Entry) -> None:
    answer = await send(port, entry.raw)
    if answer.status == 200:
        assert json.loads(answer.body)["choices"]
    else:
        assert 400 <= answer.status < 500, answer
        assert answer.error()["type"] == "invalid_request_error"


@pytest.mark.parametrize("entry", [e for e in CORPUS if e.judge is Judge.NOBODY], ids=lambda entry: entry.name)
async def test_what_only_looks_hostile_is_served(port: int, entry: Entry) -> None:
    answer = await send(port, entry.raw)
    assert answer.status == 200, answer


async def test_the_stack_is_alive_after_all_of_it(port: int) -> None:
    assert (await send(port, chat())).status == 200
