from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.planning.commands import app


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_simulation_predicts_what_the_nano_stack_does() -> None:
    """Within 15%: medians, 95th percentiles and throughput of loads that it was not calibrated with."""
    result = CliRunner().invoke(app, ["check", "--rounds", "5"])
    assert result.exit_code == 0, result.output
