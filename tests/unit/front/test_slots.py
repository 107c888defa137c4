from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.front.slots import Address, Known, Slot, SlotState, homeless, parse_load, parse_slots, plan

READY, DRAIN, MAINT = SlotState
LEASE_S = 10.0
TABLE = """\
1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_time_since_last_change srv_port
3 replicas 1 slot1 127.0.0.1 2 4 7 9999
3 replicas 2 slot2 10.0.0.1 0 5 120 1
3 replicas 3 slot3 ::1 2 12 0 9998

"""


def slot(number: int, state: SlotState, port: int = 1, unchanged_s: int = 0) -> Slot:
    return Slot(f"slot{number}", ("10.0.0.1", port), state, unchanged_s)


def at(port: int) -> Address:
    return "10.0.0.1", port


def obey(slots: tuple[Slot, ...], commands: tuple[str, ...]) -> tuple[Slot, ...]:
    """What HAProxy does."""
    known = {one.name: one for one in slots}
    for command in commands:
        words = command.split()
        assert words[:2] == ["set", "server"]
        backend, _, name = words[2].partition("/")
        assert backend == "replicas"
        if words[3] == "addr":
            assert words[5] == "port"
            known[name] = dataclasses.replace(known[name], address=(words[4], int(words[6])))
        else:
            assert words[3] == "state"
            known[name] = dataclasses.replace(known[name], state=SlotState(words[4]))
    return tuple(known.values())


def test_the_table_is_read() -> None:
    assert parse_slots(TABLE) == (
        Slot("slot1", ("127.0.0.1", 9999), READY, 7),
        Slot("slot2", ("10.0.0.1", 1), MAINT, 120),
        Slot("slot3", ("::1", 9998), DRAIN, 0),
    )


@pytest.mark.parametrize("table", ["", "Unknown command.\n", "2\n# srv_name\n3", TABLE.replace(" 9999", "")])
def test_another_table_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match=r"HAProxy|argument"):
        parse_slots(table)


def test_the_load_is_read() -> None:
    assert parse_load("# pxname,svname,qcur,qmax,scur,smax,\nreplicas,BACKEND,0,0,12,15,\n\n") == 12
    for table in ("", "# pxname\n", "Unknown command.\n"):
        with pytest.raises(ValueError, match="load"):
            parse_load(table)


def test_nothing_is_done_when_all_is_as_it_should_be() -> None:
    slots = (slot(1, READY, 11), slot(2, DRAIN, 12), slot(3, MAINT, 13))
    assert plan(slots, {at(11): READY, at(12): DRAIN}) == ()


def test_a_new_replica_gets_its_address_before_its_first_request() -> None:
    assert plan((slot(1, READY, 11), slot(2, MAINT)), {at(11): READY, at(12): READY}) == (
        "set server replicas/slot2 addr 10.0.0.1 port 12",
        "set server replicas/slot2 state ready",
    )


def test_the_slot_that_was_free_for_longest_is_taken() -> None:
    slots = (slot(1, MAINT, unchanged_s=1), slot(2, MAINT, unchanged_s=9), slot(3, MAINT, unchanged_s=5))
    assert {command.split()[2] for command in plan(slots, {at(11): READY})} == {"replicas/slot2"}


def test_states_follow_the_replicas() -> None:
    slots = (slot(1, READY, 11), slot(2, READY, 12), slot(3, DRAIN, 13), slot(4, DRAIN, 14))
    assert plan(slots, {at(11): DRAIN, at(13): READY}) == (
        "set server replicas/slot1 state drain",
        "set server replicas/slot2 state maint",
        "set server replicas/slot3 state ready",
        "set server replicas/slot4 state maint",
    )


def test_a_draining_replica_is_given_no_slot() -> None:
    assert plan((slot(1, MAINT),), {at(11): DRAIN}) == ()


def test_a_slot_that_is_freed_now_is_not_taken_now() -> None:
    slots = (slot(1, READY, 11),)
    wanted = {at(12): READY}
    assert plan(slots, wanted) == ("set server replicas/slot1 state maint",)
    assert homeless(slots, wanted) == (at(12),)


_slots = st.lists(st.tuples(st.sampled_from(SlotState), st.integers(1, 9), st.integers(0, 99)), max_size=8).map(
    lambda found: tuple(slot(i, *rest) for i, rest in enumerate(found))
)
_wanted = st.dictionaries(st.integers(1, 9).map(at), st.sampled_from([READY, DRAIN]), max_size=8)


@given(_slots, _wanted)
def test_obeying_leads_to_what_is_wanted(slots: tuple[Slot, ...], wanted: dict[Address, SlotState]) -> None:
    for _ in range(2):  # slots that are freed the first time are taken the second
        slots = obey(slots, plan(slots, wanted))
    assert plan(slots, wanted) == ()
    active = {one.address: one.state for one in slots if one.state is not MAINT}
    assert len(active) == sum(one.state is not MAINT for one in slots)
    assert active.items() <= wanted.items()
    missing = {address for address, state in wanted.items() if state is READY} - active.keys()
    assert missing == set(homeless(slots, wanted))
    assert not missing or MAINT not in {one.state for one in slots}


def record(replica_id: str, state: ReplicaState = ReplicaState.READY, model: str = "nano") -> ReplicaRecord:
    url = f"http://10.0.0.1:{int(replica_id)}"
    return ReplicaRecord(replica_id, model, "http://10.0.0.1:9", state, front_url=url)


def test_the_models_replicas_are_wanted_by_their_state() -> None:
    starting = dataclasses.replace(record("3", ReplicaState.STARTING), front_url="")
    records = (record("1"), record("2", ReplicaState.DRAINING), starting, record("4", model="other"))
    known = Known().follow(Snapshot((1, 1), records), 0.0, LEASE_S)
    assert known.wanted("nano") == {at(1): READY, at(2): DRAIN}


@pytest.mark.parametrize(
    ("front_url", "address"), [("http://[::1]:81", ("::1", 81)), ("http://node-1:8000", ("node-1", 8000))]
)
def test_addresses_are_taken_from_urls(front_url: str, address: Address) -> None:
    known = Known(Snapshot((1, 1), (dataclasses.replace(record("1"), front_url=front_url),)))
    assert known.wanted("nano") == {address: READY}


def test_a_replica_that_leaves_is_gone() -> None:
    known = Known().follow(Snapshot((1, 1), (record("1"), record("2"))), 0.0, LEASE_S)
    assert known.follow(Snapshot((1, 2), (record("1"),)), 1.0, LEASE_S).wanted("nano") == {at(1): READY}


def test_a_directory_that_was_restarted_takes_no_replica_out_for_a_lease() -> None:
    known = Known().follow(Snapshot((1, 5), (record("1"), record("2"))), 0.0, LEASE_S)
    known = known.follow(Snapshot((2, 0)), 100.0, LEASE_S)
    assert known.wanted("nano") == {at(1): READY, at(2): READY}
    known = known.follow(Snapshot((2, 1), (record("1", ReplicaState.DRAINING),)), 101.0, LEASE_S)
    assert known.wanted("nano") == {at(1): DRAIN, at(2): READY}
    known = known.follow(Snapshot((2, 2)), 102.0, LEASE_S)  # the first has told the new directory, and left it
    assert known.wanted("nano") == {at(2): READY}
    assert known.follow(Snapshot((2, 2)), 110.0, LEASE_S).wanted("nano") == {}


def test_two_restarts_in_a_row_are_survived() -> None:
    known = Known().follow(Snapshot((1, 5), (record("1"),)), 0.0, LEASE_S)
    known = known.follow(Snapshot((2, 0)), 1.0, LEASE_S).follow(Snapshot((3, 0)), 2.0, LEASE_S)
    assert known.wanted("nano") == {at(1): READY}
    assert known.follow(Snapshot((3, 1), (record("1"),)), 20.0, LEASE_S).records == (record("1"),)
