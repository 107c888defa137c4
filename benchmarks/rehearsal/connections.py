"""Who speaks to whom in the rehearsal's network, and whether the overlay's NetworkPolicies let them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from benchmarks.rehearsal.nodes import Node
from benchmarks.rehearsal.policies import Peer, Policies

_PERIOD_S = 10.0
"""A closed connection can be seen for a minute at the end that closed it."""


@dataclass(frozen=True, slots=True, order=True)
class Spoken:
    """Connections of one kind."""

    source: str
    target: str
    ports: str
    """Of the rule that allows them; without one their own."""
    number: int
    is_allowed: bool


def parse_sockets(text: str) -> tuple[set[int], set[tuple[str, int, str, int]]]:
    """Of `ss -Htan`: ports that are listened on, and own address, own port, other address, other port of the rest."""
    listening, connections = set[int](), set[tuple[str, int, str, int]]()
    for line in text.splitlines():
        state, _, _, own, other, *_ = line.split()
        address, port = _split(own)
        if state == "LISTEN":
            listening.add(int(port))
        elif (peer := _split(other))[0] != address:
            connections.add((address, int(port), peer[0], int(peer[1])))
    return listening, connections


def _split(end: str) -> tuple[str, str]:
    address, _, port = end.rpartition(":")
    return address.strip("[]").removeprefix("::ffff:").partition("%")[0], port


@dataclass
class Watch:
    """Looks at every node's sockets, again and again."""

    nodes: Callable[[], Iterable[Node]]
    _listening: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    _seen: set[tuple[str, int, str, int]] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            for node in [node for node in self.nodes() if node.process is not None]:
                self.look(node.ip, node.run(["ss", "-Htan"], 20).stdout)

    def look(self, ip: str, text: str) -> None:
        """Take in what `ss` says of a node."""
        listening, connections = parse_sockets(text)
        self._listening[ip] |= listening
        self._seen |= connections

    def connections(self) -> set[tuple[str, str, int]]:
        """Address that asked, address that was asked, and its port. A port is somebody's who was seen to listen on it;
        of connections to nobody neither end was."""
        found = set()
        for own, own_port, other, other_port in self._seen:
            if other_port in self._listening[other]:
                found.add((own, other, other_port))
            elif own_port in self._listening[own]:
                found.add((other, own, own_port))
        return found


def judge(
    connections: Iterable[tuple[str, str, int]], peers: dict[str, tuple[str, Peer]], rules: Policies
) -> list[Spoken]:
    """Connections by kind.

    Args:
        peers: by address, the kind of node and what the policies know of it.
    """
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for source, target, port in connections:
        (asks, source_peer), (answers, target_peer) = peers[source], peers[target]
        ports = rules.find_ports(source_peer, target_peer, port)
        first, last = ports or (port, port)
        counts[asks, answers, str(first) if first == last else f"{first}-{last}", ports is not None] += 1
    return sorted(
        Spoken(source, target, ports, number, is_allowed)
        for (source, target, ports, is_allowed), number in counts.items()
    )


def to_json(spoken: Iterable[Spoken]) -> list[dict[str, object]]:
    """For a file."""
    return [asdict(one) for one in spoken]
