from __future__ import annotations

from random import Random

import pytest

from benchmarks import balance_sim
from benchmarks.balance_sim import PEERS, Ours, Policy, build_pages, build_rows, run, simulate


@pytest.fixture(autouse=True)
def _few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance_sim, "SIZES", (2, 8))
    monkeypatch.setattr(balance_sim, "PAGES_PER_REPLICA", {2: 200, 8: 100})


@pytest.mark.parametrize("policy", [Ours, *PEERS])
def test_every_page_runs_after_it_came(policy: type[Policy]) -> None:
    pages = build_pages(2, Random(3))
    figures = simulate(policy(2, Random(3)), pages)
    assert all(page.started_s >= page.arrived_s for page in pages)
    assert 0 < figures.utilisation <= 1
    assert figures.p50_s <= figures.p99_s


def test_the_same_seed_gives_the_same_figures() -> None:
    first, again = run(5), run(5)
    assert first == again
    rows = build_rows(first)
    assert len(rows) == 2 * 3 * len(PEERS)
    assert all(row.ratio is not None and row.ratio > 0 for row in rows)
