"""The dashboards' files, as far as they can be judged without a Prometheus; `e2e/test_dashboards.py` asks one."""

from __future__ import annotations

import re

import promql_parser
import pytest
import yaml
from render_dashboards import DASHBOARDS, FOLDER, RATE, Panel, render_dashboards

from monitoring.test_rules import RULES
from serving.telemetry import catalogue

OURS = (*catalogue.ROUTER, *catalogue.ENGINE, *catalogue.OCR)
PANELS = [(name, panel) for name, panels in DASHBOARDS.items() for panel in panels]


def known_names() -> set[str]:
    rules = [yaml.safe_load(file.read_text()) for file in RULES.glob("*.yml")]
    recorded = {
        rule["record"] for file in rules for group in file["groups"] for rule in group["rules"] if "record" in rule
    }
    own = {metric.name for metric in OURS}
    return own | recorded | {f"{name}_bucket" for name in own} | {"up"}


def test_the_files_are_those_that_the_module_makes() -> None:
    rendered = render_dashboards()
    assert set(FOLDER.glob("*.json")) == set(rendered)
    for file, text in rendered.items():
        assert file.read_text() == text, "run: python k8s/monitoring/render_dashboards.py"


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=lambda part: part.title if isinstance(part, Panel) else part)
def test_every_expression_is_promql_of_metrics_that_there_are(name: str, panel: Panel) -> None:
    for expression, _ in panel.queries:
        promql_parser.parse(expression.replace(RATE, "1m"))
        for metric in re.findall(r"\b[\w:]*serving_[\w:]+", expression):
            assert metric in known_names(), f"{name}: {metric}"


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    text = "".join(file.read_text() for file in (*RULES.glob("*.yml"), *FOLDER.glob("*.json")))
    missing = [metric.name for metric in OURS if not re.search(rf"\b{metric.name}(_bucket|_sum|_count)?\b", text)]
    assert missing == []
