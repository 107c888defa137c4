from __future__ import annotations

import pytest
from support.paths import ROOT

from serving.telemetry.catalogue import OCR, ROUTER, Metric, MetricKind, render_table, render_tables

UNBOUNDED = {"request_id", "key", "client", "ip", "path", "prompt"}
UNITS: tuple[str, ...] = ("_total", "_seconds", "_tokens", "_requests", "_records", "_ratio", "_replicas", "_state")
UNITS += ("_info", "_bytes", "_dollars", "_wanted", "_documents", "_jobs")


@pytest.mark.parametrize("metric", [*ROUTER, *OCR], ids=lambda metric: metric.name)
def test_names_and_labels_follow_the_rules(metric: Metric) -> None:
    assert metric.name.startswith("serving_")
    assert metric.name.endswith(UNITS)
    assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
    assert bool(metric.buckets) == (metric.kind is MetricKind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert not UNBOUNDED & set(metric.labels)
    assert metric.help
    assert not metric.help.endswith(".")


def test_no_name_stands_twice() -> None:
    # Both tell the build.
    assert len({metric.name for metric in (*ROUTER, *OCR)}) == len(ROUTER) + len(OCR) - 1


def test_the_table_has_a_row_for_each() -> None:
    lines = render_table().splitlines()
    assert len(lines) == 2 + len(ROUTER)
    assert all(line.count("|") == 5 for line in lines)


def test_the_readme_holds_the_catalogue() -> None:
    readme = ROOT / "README.md"
    assert render_tables() in readme.read_text(), "paste what `python -m serving.telemetry.catalogue` prints"
