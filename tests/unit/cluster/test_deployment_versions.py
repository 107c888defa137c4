from __future__ import annotations

import warnings
from typing import Any

import pytest

from serving.cluster.deployment_versions import engine_version, ocr_version, router_version, surge_percent, with_version
from serving.settings.stack import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's import warns of itself
    from ray import serve

BASE: dict[str, Any] = {
    "models": {"m": {"checkpoint": "x"}, "other": {"checkpoint": "y"}},
    "engine": {"api_key": "sesame"},
    "router": {"allow_unauthenticated": True},
}


def build(**sections: Any) -> Settings:
    given = {name: dict(section) for name, section in BASE.items()}
    given["models"] = {name: dict(model) for name, model in BASE["models"].items()}
    for name, section in sections.items():
        (given["models"]["m"] if name == "model" else given.setdefault(name, {})).update(section)
    return Settings.model_validate(given)


@pytest.mark.parametrize(
    ("change", "changes_engine", "changes_router"),
    [
        ({}, False, False),
        ({"model": {"price": {"output_per_million": "1"}}}, False, True),
        ({"model": {"num_replicas": 3}}, False, False),
        ({"model": {"autoscaling": {"max_replicas": 3}}}, False, False),
        ({"router": {"num_replicas": 3}}, False, False),
        ({"router": {"max_tries": 7}}, False, True),
        ({"router": {"limits": {"max_image_pixels": 5}}}, True, True),
        ({"model": {"engine_args": {"max_model_len": 64}}}, True, False),
        ({"model": {"env": {"A": "b"}}}, True, False),
        ({"model": {"aliases": ["n"]}}, True, True),
        ({"engine": {"api_key": "sesam"}}, True, True),
        ({"telemetry": {"metrics_key": "scrape"}}, True, True),
        ({"telemetry": {"metrics_host": "auto"}}, True, True),
        ({"models": {"other": {"checkpoint": "z"}}}, False, True),
    ],
)
def test_a_version_changes_with_what_a_replica_does(
    change: dict[str, Any], changes_engine: bool, changes_router: bool
) -> None:
    before, after = build(), build(**change)
    assert (engine_version("m", before, "/x") != engine_version("m", after, "/x")) is changes_engine
    assert (router_version(before) != router_version(after)) is changes_router
    assert engine_version("m", before, "/x") != engine_version("m", before, "/y")
    assert "sesame" not in engine_version("m", before, "/x")


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        ({}, False),
        ({"router": {"max_tries": 7}}, False),
        ({"router": {"allowed_hosts": ["ocr.example"]}}, True),
        ({"router": {"limits": {"min_body_bytes_per_s": 5}}}, True),
        ({"ocr": {"pages_in_parallel": 3}}, True),
        ({"telemetry": {"metrics_key": "scrape"}}, True),
        ({"telemetry": {"metrics_host": "auto"}}, True),
    ],
)
def test_a_version_of_documents_changes_with_what_a_service_does(change: dict[str, Any], changes: bool) -> None:
    assert (ocr_version(build()) != ocr_version(build(**change))) is changes


@pytest.mark.parametrize(
    ("address", "num_replicas", "gpus", "percent"),
    [(None, 1, 0, 100), (None, 3, 0, 33), (None, 1000, 0, 1), (None, 2, 1, 0), ("auto", 2, 0, 0)],
)
def test_one_more_replica_starts_first_where_there_is_room(
    address: str | None, num_replicas: int, gpus: float, percent: int
) -> None:
    assert surge_percent(build(ray={"address": address}), num_replicas, gpus) == percent
    assert percent * num_replicas <= 100 or percent == 1, "one at a time"


def test_serve_keeps_the_version() -> None:
    class Replica:
        pass

    deployment = with_version(serve.deployment(Replica, name="a", num_replicas=2), "v1")
    assert deployment.version == "v1"
    assert (deployment.name, deployment.num_replicas) == ("a", 2)
