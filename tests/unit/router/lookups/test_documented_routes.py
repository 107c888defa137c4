"""`GET /openapi.json` lacks no route that a client can call."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.routing import Route
from support.ocr_service import build_service_settings
from support.router_stack import build_settings

from serving.ocr.api.app import OcrApp
from serving.ocr.api.service import OcrService
from serving.ocr.reading.router_client import Routers
from serving.router.app import METHODS
from serving.router.lookups.openapi import build_document

NOT_LISTED = {"/openapi.json", "/v1/tokenize", "/v1/detokenize"}
"""The document itself, and other names of routes that are in it."""


def test_every_route_of_the_router_is_documented() -> None:
    documented = {
        (path, method.upper()) for path, item in build_document(build_settings())["paths"].items() for method in item
    }
    assert {(path, method) for path, method in METHODS.items() if path not in NOT_LISTED} <= documented


def test_every_route_of_the_ocr_service_is_documented(tmp_path: Path) -> None:
    settings = build_service_settings(tmp_path)
    app = OcrApp(OcrService(settings, Routers("http://127.0.0.1:9")))
    served = {re.sub(r"{\w+}", "{}", route.path) for route in app.routes if isinstance(route, Route)}
    documented = {re.sub(r"{\w+}", "{}", path) for path in build_document(settings)["paths"]}
    assert len(served) > 5
    assert served <= documented
