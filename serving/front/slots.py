"""Which replica is in which of HAProxy's slots, and the commands that bring that in line with the list. Pure.

The state is HAProxy's own (`show servers state`); nothing is remembered here that could differ from it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from serving.directory import EMPTY, ReplicaRecord, ReplicaState, Snapshot
from serving.front.haproxy_config import BACKEND

Address = tuple[str, int]
"""A replica's IP address (or host's name, before it is looked up) and port."""

SHOW_SLOTS = f"show servers state {BACKEND}"
SHOW_LOAD = f"show stat {BACKEND} 2 -1"

# Of `srv_admin_state`: maintenance asked for, inherited or by name resolution; draining asked for or inherited.
_MAINT_BITS = 0x01 | 0x02 | 0x20
_DRAIN_BITS = 0x08 | 0x10


class SlotState(StrEnum):
    """HAProxy's words."""

    READY = "ready"
    DRAIN = "drain"
    """Gets no new requests; goes on with those it has."""
    MAINT = "maint"
    """Free. Streams that it still has go on nevertheless."""


@dataclass(frozen=True, slots=True)
class Slot:
    name: str
    address: Address
    state: SlotState
    unchanged_s: int
    """Since it last changed its state, or seemed to be up or down."""


def parse_slots(table: str) -> tuple[Slot, ...]:
    """Read the answer to `SHOW_SLOTS`.

    Raises:
        ValueError: that is not what it is.
    """
    lines = [line.split() for line in table.splitlines() if line.strip()]
    if len(lines) < 3 or lines[0] != ["1"]:
        raise ValueError(f"HAProxy does not tell its servers: {table[:200]!r}")
    names = lines[1][1:]  # after a '#'
    return tuple(_parse_slot(dict(zip(names, values, strict=True))) for values in lines[2:])


def _parse_slot(fields: Mapping[str, str]) -> Slot:
    bits = int(fields["srv_admin_state"])
    state = SlotState.MAINT if bits & _MAINT_BITS else SlotState.DRAIN if bits & _DRAIN_BITS else SlotState.READY
    return Slot(
        name=fields["srv_name"],
        address=(fields["srv_addr"], int(fields["srv_port"])),
        state=state,
        unchanged_s=int(fields["srv_time_since_last_change"]),
    )


def parse_load(table: str) -> int:
    """Requests that replicas work on, from the answer to `SHOW_LOAD`.

    Raises:
        ValueError: that is not what it is.
    """
    rows = list(csv.DictReader(io.StringIO(table.removeprefix("# "))))
    if len(rows) != 1 or "scur" not in rows[0]:
        raise ValueError(f"HAProxy does not tell its load: {table[:200]!r}")
    return int(rows[0]["scur"])


def plan(slots: Iterable[Slot], wanted: Mapping[Address, SlotState]) -> tuple[str, ...]:
    """The commands that put every wanted replica into a slot and free the others'; none when all is as it should be.

    A replica that drains is given no slot if it has none. Of the free slots those that have been free for longest are
    taken first. Replicas for which there is no slot are left out; `homeless` names them.
    """
    commands: list[str] = []
    free: list[Slot] = []
    homeless = dict(wanted)
    for slot in slots:
        if slot.state is SlotState.MAINT:
            free.append(slot)
            continue
        state = homeless.pop(slot.address, SlotState.MAINT)
        if state is not slot.state:
            commands.append(_set(slot, f"state {state}"))
    free.sort(key=lambda slot: -slot.unchanged_s)
    arrivals = [address for address, state in homeless.items() if state is SlotState.READY]
    for slot, (host, port) in zip(free, arrivals, strict=False):
        commands.append(_set(slot, f"addr {host} port {port}"))
        commands.append(_set(slot, f"state {SlotState.READY}"))
    return tuple(commands)


def homeless(slots: Iterable[Slot], wanted: Mapping[Address, SlotState]) -> tuple[Address, ...]:
    """Replicas that ought to get requests and have no slot."""
    housed = {slot.address for slot in slots if slot.state is not SlotState.MAINT}
    return tuple(address for address, state in wanted.items() if state is SlotState.READY and address not in housed)


def _set(slot: Slot, change: str) -> str:
    return f"set server {BACKEND}/{slot.name} {change}"


@dataclass(frozen=True, slots=True)
class Known:
    """The list, and what it replaced when the directory was restarted.

    A new directory starts with an empty list and learns of each replica by its next heartbeat. Until a lease has
    passed, a replica that it does not name is taken to be where it was.
    """

    snapshot: Snapshot = EMPTY
    kept: tuple[ReplicaRecord, ...] = ()
    kept_until_s: float = 0.0

    def follow(self, snapshot: Snapshot, now_s: float, lease_s: float) -> Known:
        """The same after the directory's next answer."""
        kept, kept_until_s = self.kept, self.kept_until_s
        if snapshot.version[0] != self.snapshot.version[0]:
            kept, kept_until_s = self.records, now_s + lease_s
        named = {record.replica_id for record in snapshot.records}
        kept = tuple(record for record in kept if record.replica_id not in named and now_s < kept_until_s)
        return Known(snapshot, kept, kept_until_s)

    @property
    def records(self) -> tuple[ReplicaRecord, ...]:
        return self.snapshot.records + self.kept

    def wanted(self, model: str) -> dict[Address, SlotState]:
        """A model's replicas that have an address, and what they may get."""
        states = {ReplicaState.READY: SlotState.READY, ReplicaState.DRAINING: SlotState.DRAIN}
        return {
            _address(record.front_url): states[record.state]
            for record in self.records
            if record.model == model and record.front_url and record.state in states
        }


def _address(url_text: str) -> Address:
    url = urlsplit(url_text)
    return url.hostname or "", url.port or 80
