"""The overlay's NetworkPolicies, as a network plugin would judge a connection by them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NAMESPACE = "kubernetes.io/metadata.name"
_ALL_PORTS = (1, 65535)


@dataclass(frozen=True)
class Peer:
    """One end of a connection."""

    namespace: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Policies:
    """Of one namespace, in which everything is denied that no policy allows."""

    namespace: str
    specs: Sequence[Mapping[str, Any]]

    def find_ports(self, source: Peer, target: Peer, port: int) -> tuple[int, int] | None:
        """The first and the last port of the rule that lets this connection in, or, into other namespaces, out; None
        when it is denied at either end."""
        ends = [(source, target, "egress", "to"), (target, source, "ingress", "from")]
        found = [
            next(self._rules(own, other, direction, key, port), None)
            for own, other, direction, key in ends
            if own.namespace == self.namespace
        ]
        return None if None in found else found[-1]

    def _rules(self, own: Peer, other: Peer, direction: str, key: str, port: int) -> Iterator[tuple[int, int]]:
        for spec in self.specs:
            if direction.capitalize() in spec["policyTypes"] and _is_selected(own.labels, spec["podSelector"]):
                for rule in spec.get(direction, ()):
                    if key not in rule or any(self._is_peer(other, peer) for peer in rule[key]):
                        yield from (ports for ports in _ranges(rule) if ports[0] <= port <= ports[1])

    def _is_peer(self, other: Peer, peer: Mapping[str, Any]) -> bool:
        """Blocks of addresses mean what is outside of the cluster: no pod."""
        if "ipBlock" in peer:
            return False
        where = peer.get("namespaceSelector", {"matchLabels": {_NAMESPACE: self.namespace}})
        return _is_selected({_NAMESPACE: other.namespace}, where) and _is_selected(
            other.labels, peer.get("podSelector", {})
        )


def _ranges(rule: Mapping[str, Any]) -> list[tuple[int, int]]:
    ports = [port for port in rule.get("ports", ()) if port.get("protocol", "TCP") == "TCP"]
    return [(port["port"], port.get("endPort", port["port"])) for port in ports] if "ports" in rule else [_ALL_PORTS]


def _is_selected(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """As Kubernetes matches labels; `In` is the only operator of the overlay's."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", ()))
