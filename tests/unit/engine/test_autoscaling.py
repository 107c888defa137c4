from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from serving.cluster.directory import EMPTY, ReplicaRecord, ReplicaState, RouterReport, Snapshot
from serving.engine.autoscaling import ModelLoad, WorkPolicy, build_autoscaling, measure_load
from serving.settings.stack import AutoscalingSettings, ModelSettings, Settings

READY = ReplicaRecord("a", "m", "http://127.0.0.1:1", ReplicaState.READY, capacity_tokens=1000)
SNAPSHOT = Snapshot(
    (1, 1),
    (
        READY,
        dataclasses.replace(READY, replica_id="b", capacity_tokens=3000),
        dataclasses.replace(READY, replica_id="leaving", state=ReplicaState.DRAINING),
        dataclasses.replace(READY, replica_id="coming", state=ReplicaState.STARTING, capacity_tokens=0),
        dataclasses.replace(READY, replica_id="other", model="other"),
    ),
)
REPORTS = (
    RouterReport("r1", (("m", 100), ("other", 7)), (("a", 400), ("leaving", 50), ("other", 9))),
    RouterReport("r2", (), (("a", 100), ("b", 1000), ("gone", 5))),
)


def test_the_load_is_what_waits_and_what_ready_replicas_have_under_way() -> None:
    load = measure_load("m", SNAPSHOT, REPORTS, None)
    assert load == ModelLoad(work=1600, capacity=2000)
    assert load.wanted_replicas(0.5) == pytest.approx(1.6)
    assert measure_load("m", SNAPSHOT, REPORTS, work_per_replica=800) == ModelLoad(1600, 800)


@pytest.mark.parametrize(
    ("snapshot", "reports"),
    [(SNAPSHOT, ()), (EMPTY, REPORTS), (Snapshot((1, 1), (dataclasses.replace(READY, capacity_tokens=0),)), REPORTS)],
)
def test_a_load_that_nobody_can_know_is_not_guessed(snapshot: Snapshot, reports: tuple[RouterReport, ...]) -> None:
    assert measure_load("m", snapshot, reports, None) is None


class Directory:
    """Stands in for Ray and the directory's actor: answers when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: int | None = 0
        self.is_answered = True
        self.is_there = True
        self.num_asked = 0
        monkeypatch.setattr(ray, "get_actor", self.get_actor)
        monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs if self.is_answered else [], []))
        monkeypatch.setattr(ray, "get", self.get)

    def get_actor(self, name: str, namespace: str) -> SimpleNamespace:
        assert (name, namespace) == ("replica-directory", "ns")
        if not self.is_there:
            raise ValueError("no such actor")
        self.num_asked += 1
        return SimpleNamespace(survey=SimpleNamespace(remote=object))

    def get(self, ref: object) -> tuple[Snapshot, tuple[RouterReport, ...]]:
        if self.work is None:
            raise ray.exceptions.ActorDiedError
        return Snapshot((1, 1), (READY,)), (RouterReport("r", (("m", self.work),)),)


Tick = Callable[[float], float]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Directory:
    return Directory(monkeypatch)


@pytest.fixture
def tick(directory: Directory) -> Tick:
    """Calls the policy as Serve's controller does, at a time; 7 replicas are there."""
    policy = WorkPolicy("m", "ns", target_load=0.5, window_s=4, work_per_replica=None)

    def tick(now_s: float) -> float:
        wanted, state = policy(SimpleNamespace(current_time=now_s, target_num_replicas=7))
        assert state == {}
        return wanted

    return tick


def test_the_policy_wants_what_the_mean_of_its_window_needs(directory: Directory, tick: Tick) -> None:
    directory.work = 1000
    assert tick(100) == 7, "nothing is known yet"
    assert tick(101) == pytest.approx(2)
    directory.work = 3000
    assert tick(102) == pytest.approx((2 + 6) / 2)
    assert tick(107) == pytest.approx(6), "what was before the window is forgotten"


def test_the_policy_asks_no_more_than_twice_a_second_and_never_waits(directory: Directory, tick: Tick) -> None:
    for number in range(100):
        tick(100 + number / 10)
    assert 15 <= directory.num_asked <= 20
    directory.is_answered, asked = False, directory.num_asked
    for number in range(100):
        tick(200 + number / 10)
    assert directory.num_asked <= asked + 1


def test_without_news_there_are_as_many_replicas_as_before(directory: Directory, tick: Tick) -> None:
    directory.is_there = False
    assert [tick(100), tick(101)] == [7, 7]
    directory.is_there, directory.work = True, 500
    assert [tick(102), tick(103)] == [7, pytest.approx(1)]
    directory.work = None
    assert tick(104) == pytest.approx(1)
    assert tick(109) == 7, "what was known is too old"
    directory.work = 500
    tick(110)
    assert tick(111) == pytest.approx(1)


def test_serve_gets_the_settings_and_a_policy_that_it_can_make() -> None:
    scaling = AutoscalingSettings(min_replicas=2, max_replicas=5, upscale_delay_s=3, downscale_delay_s=60)
    settings = Settings(models={"m": ModelSettings(checkpoint="x", autoscaling=scaling)})
    config = build_autoscaling("m", scaling, settings)
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (3, 60)
    made: Any = pickle.loads(config.policy.get_serialized_policy_def())(**config.policy.policy_kwargs)
    assert made(SimpleNamespace(current_time=0.0, target_num_replicas=3)) == (3, {})
    assert config == build_autoscaling("m", scaling, settings), "the same settings change no deployment"
