"""Every alert fires when it should and not otherwise, by promtool's own clock."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

RULES = ROOT / "k8s/monitoring/rules"
PROMTOOL = shutil.which("promtool")
# CI installs it: there its absence is a failure, not a reason to skip.
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None and "CI" not in os.environ, reason="promtool is not installed (apt-get install prometheus)"
)

OK = 'serving_requests_total{model="m",outcome="completed",status="200"}'
FAILED = 'serving_requests_total{model="m",outcome="failed",status="502"}'
FAULTY = 'serving_requests_total{model="m",outcome="refused",status="400"}'
WANTED = 'serving_replicas_wanted{model="m"}'
READY = 'serving_replicas{model="m",state="ready"}'
LE_5 = 'serving_queue_wait_seconds_bucket{model="m",priority="high",le="5"}'
LE_10 = 'serving_queue_wait_seconds_bucket{model="m",priority="high",le="10"}'
LE_ALL = 'serving_queue_wait_seconds_bucket{model="m",priority="high",le="+Inf"}'
BREAKER = 'serving_breaker_state{model="m",replica="r"}'
LAG = 'serving_ledger_lag_seconds{router="a"}'
SPOOL = 'serving_ledger_spool_records{router="a"}'
SPOOL_USED = 'serving_ledger_spool_used_ratio{router="a"}'
LOST = 'serving_ledger_records_total{router="a",result="lost"}'
STORED = 'serving_ocr_storage_used_ratio{kind="documents"}'
JOB_LAG = "serving_ocr_job_lag_seconds"
PAGES_READ = 'serving_ocr_pages_total{status="completed",mode="base"}'
PAGES_FAILED = 'serving_ocr_pages_total{status="failed",mode="base"}'
DRAWING = 'serving_ocr_render_queue_requests{instance="a:1"}'
BUDGET = 'serving_budget_used_ratio{tenant="acme"}'
COST = 'serving_cost_dollars_total{tenant="acme",model="m"}'
UP = 'up{job="router",instance="a:1"}'

# alert: minute of the look, series of a stack that is ill, series of one that is well
CASES: dict[str, tuple[int, dict[str, str], dict[str, str]]] = {
    "ServingErrorBudgetBurnFast": (90, {OK: "0+98x100", FAILED: "0+2x100"}, {OK: "0+99x100", FAULTY: "0+50x100"}),
    "ServingErrorBudgetBurnSlow": (400, {OK: "0+992x420", FAILED: "0+8x420"}, {OK: "0+998x420", FAILED: "0+2x420"}),
    "ServingQueueWait": (
        15,
        {LE_5: "0+1x20", LE_10: "0+10x20", LE_ALL: "0+10x20"},
        {LE_5: "0+10x20", LE_10: "0+10x20", LE_ALL: "0+10x20"},
    ),
    "ServingReplicaMissing": (10, {WANTED: "2x20", READY: "1x20"}, {WANTED: "2x20", READY: "2x20"}),
    "ServingBreakerOpen": (5, {BREAKER: "2x20"}, {BREAKER: "1x20"}),
    "ServingLedgerLag": (10, {LAG: "300x20"}, {LAG: "2x20"}),
    "ServingSpoolGrowing": (40, {SPOOL: "9000+1000x50"}, {SPOOL: "60000-1000x50"}),
    "ServingSpoolNearlyFull": (10, {SPOOL_USED: "0.9x20"}, {SPOOL_USED: "0.1x20"}),
    "ServingLedgerLost": (30, {LOST: "0x10 1x40"}, {LOST: "1x50"}),
    "ServingOcrStorageNearlyFull": (20, {STORED: "0.95x30"}, {STORED: "0.5x30"}),
    "ServingOcrJobLag": (20, {JOB_LAG: "1000x30"}, {JOB_LAG: "60x30"}),
    "ServingOcrPagesFail": (
        50,
        {PAGES_READ: "0+8x60", PAGES_FAILED: "0+2x60"},
        {PAGES_READ: "0+80x60", PAGES_FAILED: "0+2x60"},
    ),
    "ServingOcrDrawingSaturated": (40, {DRAWING: "5x50"}, {DRAWING: "5x9 0x9 5x9 0x9 5x9"}),
    "ServingBudgetUsed": (2, {BUDGET: "0.8x5"}, {BUDGET: "0.79x5"}),
    "ServingCostAnomaly": (1500, {COST: "0+0.01x1440 15+1x100"}, {COST: "0+1x1600"}),
    "ServingTargetDown": (5, {UP: "0x10"}, {UP: "1x10"}),
    "ServingNoMetrics": (5, {UP: "0x10"}, {UP: "1x10"}),
}


def load_alerts() -> dict[str, Any]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def run_promtool(*arguments: str) -> str:
    assert PROMTOOL is not None, "CI must install promtool"
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def fires(alert: str, minute: int, series: dict[str, str], folder: Path) -> bool:
    """Whether it does at that minute: promtool is asked to find no such alert."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}],
    }
    file = folder / "test.yml"
    files = [str(file) for file in sorted(RULES.glob("*.yml"))]
    file.write_text(yaml.safe_dump({"rule_files": files, "evaluation_interval": "1m", "tests": [test]}))
    failure = run_promtool("test", "rules", str(file))
    assert not failure or f"alertname: {alert}" in failure, failure
    return bool(failure)


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(load_alerts())


@needs_promtool
def test_the_rules_are_valid() -> None:
    assert not run_promtool("check", "rules", *(str(file) for file in RULES.glob("*.yml")))


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_it_fires_on_a_stack_that_is_ill(alert: str, tmp_path: Path) -> None:
    minute, ill, _ = CASES[alert]
    assert fires(alert, minute, ill, tmp_path)


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_it_does_not_fire_on_a_stack_that_is_well(alert: str, tmp_path: Path) -> None:
    minute, _, well = CASES[alert]
    assert not fires(alert, minute, well, tmp_path)
