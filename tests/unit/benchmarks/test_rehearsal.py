from __future__ import annotations

import pytest
import yaml

from benchmarks.rehearsal.__main__ import Kill, subtract
from benchmarks.rehearsal.overlay import OVERLAY, read_overlay

SEEN = {"streams": {"complete": 9, "told": 2}, "whole": {"complete": 12, "refused": 1}, "lost": 0}


def test_the_overlay_is_taken_to_the_letter() -> None:
    overlay = read_overlay()
    patch = yaml.safe_load((OVERLAY / "applications.yaml").read_text())
    assert overlay.serve_config == patch["spec"]["serveConfigV2"]
    assert "--num-cpus=0" in overlay.head_flags
    assert [group.name for group in overlay.groups] == ["cpu", "engines"]
    assert '--resources={"cpu-node": 100}' in overlay.groups[0].ray_flags
    assert yaml.safe_load(overlay.settings)["models"]["nano"]["num_replicas"] == 2


@pytest.mark.parametrize(
    ("victim", "streams", "lost", "is_clean"),
    [
        ("engines-0", {"complete": 9, "told": 2}, 0, True),
        ("engines-0", {"complete": 9, "silent": 1}, 0, False),
        ("cpu-0", {"complete": 9, "reset": 1}, 0, True),
        ("cpu-0", {"complete": 9, "silent": 1}, 0, False),
        ("head", {"complete": 9}, 0, True),
        ("head", {"complete": 9, "told": 1}, 0, False),
        ("head", {"complete": 9, "reset": 1}, 0, False),
        ("head", {"complete": 9}, 1, False),
    ],
)
def test_what_a_killed_node_excuses(victim: str, streams: dict[str, int], lost: int, is_clean: bool) -> None:
    kill = Kill(victim, 20.0, 3.0, {**SEEN, "streams": streams, "lost": lost})
    assert kill.is_clean is is_clean


def test_counts_between_two_readings() -> None:
    before = {"streams": {"complete": 4}, "whole": {"complete": 5}, "lost": 0}
    assert subtract(SEEN, before) == {
        "streams": {"complete": 5, "told": 2},
        "whole": {"complete": 7, "refused": 1},
        "lost": 0,
    }
