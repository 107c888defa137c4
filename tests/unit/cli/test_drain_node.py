from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from serving.cli import drain_node
from serving.cli.drain_node import Node

COMMAND = ["/x/raylet", "--node_id=abc", "--gcs-address=10.0.0.1:6379", "--head", "--labels=", "--a=b=c"]


def test_a_raylet_tells_its_node_and_cluster() -> None:
    assert drain_node.parse_raylet(7, COMMAND) == Node(7, "abc", "10.0.0.1:6379")
    with pytest.raises(ValueError, match="without --gcs-address"):
        drain_node.parse_raylet(7, COMMAND[:2])


@pytest.mark.parametrize(
    ("program", "number"), [("ray::ServeReplica:router:router", 1), ("/x/bin/haproxy", 1), ("ray::IDLE", 0)]
)
def test_what_serves_is_counted_on_the_nodes_own_raylet(program: str, number: int) -> None:
    child = subprocess.Popen(
        [program, "-c", "print(1, flush=True); input()"],
        executable=sys.executable,
        env={**os.environ, "RAY_RAYLET_PID": "4242"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    try:
        child.stdout.readline()
        assert drain_node.count_serving(Node(4242, "", "")) == number
        assert drain_node.count_serving(Node(4243, "", "")) == 0
    finally:
        child.communicate(b"\n")


def test_it_waits_until_nothing_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([2, 1, 0])
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(drain_node, "_POLL_S", 0.0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(drain_node, "count_serving", lambda node: next(counts))
    assert drain_node.drain(Node(1, "abc", "h:1"), 60.0)
    assert asked[0][-2:] == ["--deadline-remaining-seconds", "60"]
    assert "abc" in asked[0]
    monkeypatch.setattr(drain_node, "count_serving", lambda node: 1)
    assert not drain_node.drain(Node(1, "abc", "h:1"), 0.01)


def test_a_refusal_of_rays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no such node", stdout="")
    )
    with pytest.raises(ValueError, match="no such node"):
        drain_node.drain(Node(1, "abc", "h:1"), 1.0)
