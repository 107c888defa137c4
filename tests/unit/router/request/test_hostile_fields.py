"""Every hostile field of the corpus, refused or left out by the parser; the corpus sends only some over the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hostile.fields import FIELDS, LEFT_OUT
from support.router_stack import MODEL, build_settings

from serving.errors import ServingError
from serving.router.request.parsing import parse_request


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_hostile_field_is_refused(fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}
    with pytest.raises(ServingError) as caught:
        parse_request("/v1/chat/completions", json.dumps(body).encode(), build_settings())
    assert 400 <= caught.value.http_status < 500
    assert len(caught.value.message) < 4000


@pytest.mark.parametrize("fields", LEFT_OUT.values(), ids=LEFT_OUT)
def test_the_engine_does_not_get_a_field_without_effect(fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    request = parse_request("/v1/chat/completions", json.dumps({**body, **fields}).encode(), build_settings())
    assert json.loads(request.body) == body
    assert request.ignored == tuple(fields)
