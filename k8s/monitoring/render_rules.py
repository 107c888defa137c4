"""Write prometheusrule.yaml, in which the Prometheus Operator wants the rules: a copy that a test keeps true.

python k8s/monitoring/render_rules.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
OUT = HERE / "prometheusrule.yaml"
_HEAD = "# Made by render_rules.py from rules/*.yml; change those.\n"


def render_rules() -> str:
    """All groups of all rule files, in the order of their names."""
    groups: list[dict[str, Any]] = []
    for file in sorted((HERE / "rules").glob("*.yml")):
        groups += yaml.safe_load(file.read_text())["groups"]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "serving"},
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.safe_dump(resource, sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    OUT.write_text(render_rules())
