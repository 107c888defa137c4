from __future__ import annotations

import pytest
import yaml

from benchmarks.rehearsal.connections import Spoken, Watch, judge, parse_sockets
from benchmarks.rehearsal.losses import End, Loss, subtract
from benchmarks.rehearsal.overlay import OVERLAY, Overlay, read_overlay
from benchmarks.rehearsal.policies import Peer

SEEN = {"streams": {"complete": 9, "told": 2}, "whole": {"complete": 12, "refused": 1}, "lost": 0}


@pytest.fixture(scope="module")
def overlay() -> Overlay:
    return read_overlay()


def test_the_overlay_is_taken_to_the_letter(overlay: Overlay) -> None:
    patch = yaml.safe_load((OVERLAY / "applications.yaml").read_text())
    assert overlay.serve_config == patch["spec"]["serveConfigV2"]
    assert "--num-cpus=0" in overlay.head_flags
    assert [group.name for group in overlay.groups] == ["cpu", "engines"]
    assert '--resources={"cpu-node": 100}' in overlay.groups[0].ray_flags
    assert overlay.groups[0].drain_hook[-2:] == ("--within", "900")
    assert yaml.safe_load(overlay.settings)["models"]["nano"]["num_replicas"] == 2


@pytest.mark.parametrize(
    ("victim", "end", "streams", "lost", "is_clean"),
    [
        ("engines-0", End.KILLED, {"complete": 9, "told": 2}, 0, True),
        ("engines-0", End.KILLED, {"complete": 9, "silent": 1}, 0, False),
        ("engines-0", End.KILLED, {"complete": 9, "failed": 1}, 0, False),
        ("cpu-0", End.KILLED, {"complete": 9, "reset": 1}, 0, True),
        ("cpu-0", End.KILLED, {"complete": 9, "failed": 1}, 0, True),
        ("cpu-0", End.KILLED, {"complete": 9, "silent": 1}, 0, False),
        ("head", End.KILLED, {"complete": 9}, 0, True),
        ("head", End.KILLED, {"complete": 9, "told": 1}, 0, False),
        ("head", End.KILLED, {"complete": 9, "reset": 1}, 0, False),
        ("head", End.KILLED, {"complete": 9, "failed": 1}, 0, False),
        ("head", End.KILLED, {"complete": 9}, 1, False),
        ("cpu-1", End.DRAINED, {"complete": 9, "refused": 1}, 0, True),
        ("cpu-1", End.DRAINED, {"complete": 9, "reset": 1}, 0, False),
        ("engines-1", End.DRAINED, {"complete": 9, "told": 1}, 0, False),
    ],
)
def test_what_a_nodes_end_excuses(victim: str, end: End, streams: dict[str, int], lost: int, is_clean: bool) -> None:
    loss = Loss(victim, end, 20.0, 3.0, {**SEEN, "streams": streams, "lost": lost})
    assert loss.is_clean is is_clean


def test_counts_between_two_readings() -> None:
    before = {"streams": {"complete": 4}, "whole": {"complete": 5}, "lost": 0}
    assert subtract(SEEN, before) == {
        "streams": {"complete": 5, "told": 2},
        "whole": {"complete": 7, "refused": 1},
        "lost": 0,
    }


@pytest.mark.parametrize(
    ("source", "target", "port", "ports"),
    [
        ("cpu", "engines", 40_000, (32_768, 60_999)),
        ("cpu", "head", 6379, (6379, 6383)),
        ("engines", "cpu", 30_001, (30_000, 31_000)),  # HAProxy of an engine's node to a router
        ("engines", "head", 8500, (8500, 8500)),  # HAProxy of a node to Serve's proxy behind the routers
        ("head", "redis", 6379, (6379, 6379)),
        ("client", "cpu", 8000, (8000, 8000)),
        ("client", "cpu", 40_000, None),
        ("client", "head", 8265, None),
        ("engines", "cpu", 40_000, None),
        ("cpu", "redis", 6379, None),
        ("engines", "engines", 40_000, None),
        ("redis", "head", 6379, None),
    ],
)
def test_policies_as_a_network_plugin_reads_them(
    overlay: Overlay, source: str, target: str, port: int, ports: tuple[int, int] | None
) -> None:
    assert overlay.policies.find_ports(overlay.peers[source], overlay.peers[target], port) == ports


def test_other_namespaces_get_in_by_their_name(overlay: Overlay) -> None:
    for namespace, port, ports in (("monitoring", 8080, (8080, 8080)), ("default", 8080, None)):
        assert overlay.policies.find_ports(Peer(namespace, {}), overlay.peers["cpu"], port) == ports


SOCKETS = """\
LISTEN    0 128          *:8000             *:*
LISTEN    0 128  127.0.0.1:41000      0.0.0.0:*
ESTAB     0 0    10.0.0.2:8000       10.0.0.9:52000
TIME-WAIT 0 0    [::ffff:10.0.0.2]:51000 [::ffff:10.0.0.3]:6379
ESTAB     0 0    127.0.0.1:8000      127.0.0.1:42000
ESTAB     0 0    10.0.0.2:41500      10.0.0.2:8000
"""


def test_sockets_as_ss_prints_them() -> None:
    listening, connections = parse_sockets(SOCKETS)
    assert listening == {8000, 41_000}
    assert connections == {("10.0.0.2", 8000, "10.0.0.9", 52_000), ("10.0.0.2", 51_000, "10.0.0.3", 6379)}


def test_connections_are_judged_whichever_end_was_seen(overlay: Overlay) -> None:
    watch = Watch(lambda: ())
    watch.look("10.0.0.2", SOCKETS)
    watch.look("10.0.0.3", "LISTEN 0 128 0.0.0.0:6379 0.0.0.0:*")
    assert watch.connections() == {("10.0.0.9", "10.0.0.2", 8000), ("10.0.0.2", "10.0.0.3", 6379)}
    kinds = {"10.0.0.2": "cpu", "10.0.0.3": "redis", "10.0.0.9": "client"}
    peers = {ip: (kind, overlay.peers[kind]) for ip, kind in kinds.items()}
    assert judge(watch.connections(), peers, overlay.policies) == [
        Spoken("client", "cpu", "8000", 1, is_allowed=True),
        Spoken("cpu", "redis", "6379", 1, is_allowed=False),
    ]
