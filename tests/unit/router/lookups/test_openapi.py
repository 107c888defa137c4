"""Requests made from the router's own OpenAPI document, good ones and broken ones: nothing it does not document."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from support.router_stack import MODEL, build_settings

from serving.cluster.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.engine.scripted.app import ScriptedEngine
from serving.http.server import HttpServer
from serving.router.app import RouterApp
from serving.router.lookups.openapi import build_document
from serving.settings.stack import ScriptSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own dependencies' deprecations
    import schemathesis
    from schemathesis import checks

SETTINGS = build_settings()
SCHEMA = schemathesis.openapi.from_dict(build_document(SETTINGS))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A router in front of a scripted engine, in a thread with an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine = ScriptedEngine(ScriptSettings(output_tokens=4), (MODEL,))

    async def start() -> tuple[RouterApp, HttpServer, HttpServer]:
        behind = HttpServer(engine, host="127.0.0.1", port=0, drain_s=1)
        await behind.start()
        base_url = f"http://127.0.0.1:{behind.port}"
        record = ReplicaRecord("a", MODEL, base_url, ReplicaState.READY, max_num_seqs=8, max_model_len=8192)
        snapshot = Snapshot((1, 1), (record,))
        app = RouterApp(SETTINGS, lambda: snapshot)
        front = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=SETTINGS.router.limits)
        await app.start()
        await front.start()
        return app, front, behind

    async def stop() -> None:
        await front.stop()
        await app.close()
        await behind.stop()

    app, front, behind = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{front.port}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# Whatever is not in the document it may refuse: its fields are those that clients need, not all that are let in.
@seed(0)
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@SCHEMA.parametrize()
def test_nothing_happens_that_is_not_documented(case: schemathesis.Case[Any], url: str) -> None:
    response = case.call(base_url=url, timeout=10)
    # The ledger is not kept here: reports are refused for now, which the document allows.
    is_report = case.path in ("/v1/usage", "/v1/organization/usage/completions", "/admin/costs")
    # A request may allow itself a millisecond, which a busy machine cannot keep.
    is_hurried = "x-request-timeout-ms" in (case.headers or {})
    is_excused = (is_report and response.status_code == 503) or (is_hurried and response.status_code in (503, 504))
    assert response.status_code < 500 or is_excused, response.text
    case.validate_response(
        response,
        checks=[checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance],
    )
