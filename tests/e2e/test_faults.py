"""Parts of a running stack are killed under 32 streams and 32 whole requests; what each client saw is judged.

One kill of each part; `make soak` does many.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.__main__ import VICTIMS, build_settings, kill_under_load
from benchmarks.faults.stack import RunningStack, run_stack

REPLICAS, ROUTERS = 2, 2


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with run_stack(build_settings(REPLICAS, ROUTERS), tmp_path_factory.mktemp("faults")) as stack:
        yield stack


@pytest.mark.parametrize("victim", VICTIMS)
async def test_a_kill_under_load_loses_nothing(victim: str, running: RunningStack) -> None:
    result = await kill_under_load(running, victim, REPLICAS, ROUTERS)
    assert result.is_clean, result


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_an_engine_process_of_vllms_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    with run_stack(build_settings(REPLICAS, ROUTERS, has_vllm=True), tmp_path) as stack:
        result = await kill_under_load(stack, "engine", REPLICAS, ROUTERS, healed_within_s=300)
        assert result.is_clean, result
        assert sum(result.streams.values()) > 32
        assert len(stack.find("core")) == REPLICAS
