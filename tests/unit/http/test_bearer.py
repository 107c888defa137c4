from __future__ import annotations

import pytest
from pydantic import SecretStr

from serving.http.bearer import BearerKey


def scope(*values: bytes) -> dict[str, object]:
    return {"headers": [(b"host", b"x"), *((b"authorization", value) for value in values)]}


@pytest.mark.parametrize("key", ["abc", SecretStr("abc")])
def test_the_key_is_a_bearer_token(key: str | SecretStr) -> None:
    guard = BearerKey(key)
    assert guard.lets_in(scope(b"Bearer abc"))
    assert guard.lets_in(scope(b"bearer  abc"))
    for values in ((), (b"",), (b"abc",), (b"Basic abc",), (b"Bearer abd",), (b"Bearer ab",), (b"Bearer \xff",)):
        assert not guard.lets_in(scope(*values))


def test_of_two_keys_none_counts() -> None:
    assert not BearerKey("abc").lets_in(scope(b"Bearer abc", b"Bearer other"))
    assert not BearerKey("abc").lets_in(scope(b"Bearer abc", b"Bearer abc"))


def test_without_a_key_everyone_is_let_in() -> None:
    assert BearerKey(None).lets_in(scope())
    assert BearerKey(None).lets_in(scope(b"Bearer abc", b"Bearer other"))
