"""A policy for Ray Serve's autoscaler that uses the load which routers report to the directory.

Requests bypass Ray Serve, so it has nothing to count. The routers also know more: requests differ in work, and a page
with a long answer takes hundreds of times as much as one with a short answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.cluster.directory import RouterReport, Snapshot
from serving.cluster.directory_actor import DIRECTORY_NAME
from serving.settings.stack import AutoscalingSettings, Settings

_SURVEY_S = 0.5
_MIN_WINDOW_S = 1.0


@dataclass(frozen=True)
class ModelLoad:
    """A model's work, queued and in progress, and the capacity of one of its replicas, both in tokens."""

    work: float
    capacity: float

    def wanted_replicas(self, target_load: float) -> float:
        """Return how many replicas this work would fill to the target. Serve rounds up and applies the bounds."""
        return self.work / (self.capacity * target_load)


def measure_load(
    model: str, snapshot: Snapshot, reports: Iterable[RouterReport], work_per_replica: int | None
) -> ModelLoad | None:
    """Return the load of a model, or None if it is unknown: no router has reported, or no replica is ready.

    Work on draining replicas is excluded: it needs no other replica.
    """
    ready = {record.replica_id: record for record in snapshot.ready(model)}
    told = list(reports)
    capacities = [work_per_replica or record.capacity_tokens for record in ready.values()]
    if not told or not any(capacities):
        return None
    work = sum(tokens for report in told for name, tokens in report.queued_work if name == model)
    work += sum(tokens for report in told for replica_id, tokens in report.replica_work if replica_id in ready)
    return ModelLoad(work, sum(capacities) / len(capacities))


class WorkPolicy:
    """The policy. Serve's controller calls it at every tick, so it never blocks: it uses the latest snapshot and
    requests the next one.

    Serve applies the delays and bounds of the deployment's autoscaling configuration to the result.
    """

    def __init__(
        self, model: str, namespace: str, target_load: float, window_s: float, work_per_replica: int | None
    ) -> None:
        self._model = model
        self._namespace = namespace
        self._target_load = target_load
        self._window_s = window_s
        self._work_per_replica = work_per_replica
        self._asked: Any = None
        self._asked_s = 0.0
        self._loads: deque[tuple[float, ModelLoad]] = deque()

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the desired number of replicas (the current number if the load is unknown) and an empty state."""
        now_s = float(context.current_time or 0.0)
        self._take_answer(now_s)
        self._ask(now_s)
        while self._loads and self._loads[0][0] < now_s - self._window_s:
            self._loads.popleft()
        if not self._loads:
            return context.target_num_replicas, {}
        mean = sum(load.work for _, load in self._loads) / len(self._loads)
        return ModelLoad(mean, self._loads[-1][1].capacity).wanted_replicas(self._target_load), {}

    def _ask(self, now_s: float) -> None:
        if self._asked is not None or now_s - self._asked_s < _SURVEY_S:
            return
        self._asked_s = now_s
        try:
            self._asked = ray.get_actor(DIRECTORY_NAME, self._namespace).survey.remote()
        except ValueError:  # the directory does not exist (yet)
            return

    def _take_answer(self, now_s: float) -> None:
        if self._asked is None or not ray.wait([self._asked], timeout=0)[0]:
            return
        asked, self._asked = self._asked, None
        try:
            snapshot, reports = ray.get(asked)
        except ray.exceptions.RayError:  # the directory died; Ray restarts it
            return
        load = measure_load(self._model, snapshot, reports, self._work_per_replica)
        if load is not None:
            self._loads.append((now_s, load))


def build_autoscaling(name: str, autoscaling: AutoscalingSettings, settings: Settings) -> AutoscalingConfig:
    """Return Serve's autoscaling configuration for a model's deployment."""
    policy = AutoscalingPolicy(
        policy_function=f"{__name__}:{WorkPolicy.__name__}",
        policy_kwargs={
            "model": name,
            "namespace": settings.ray.namespace,
            "target_load": autoscaling.target_load,
            "window_s": max(_MIN_WINDOW_S, autoscaling.upscale_delay_s),
            "work_per_replica": settings.router.admission.work_per_replica,
        },
    )
    return AutoscalingConfig(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        upscale_delay_s=autoscaling.upscale_delay_s,
        downscale_delay_s=autoscaling.downscale_delay_s,
        policy=policy,
    )
