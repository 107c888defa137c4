from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.billing_samples import make_record

from serving.billing import spool as spools
from serving.billing.journal_frames import encode_frame
from serving.billing.records import RequestRecord
from serving.billing.spool import Spool, adopt_spool, open_spool, read_spools, sync_and_close
from serving.settings.billing import SpoolSettings

SIZE = len(encode_frame(make_record(0)))
SETTINGS = SpoolSettings(segment_bytes=4096, alarm_bytes=8192, max_bytes=2**20)


def take(spool: Spool, limit: int = 3) -> list[RequestRecord]:
    """Everything that is in it, committed."""
    taken = []
    while records := spool.read(limit):
        taken += records
        spool.commit()
    return taken


def fill(spool: Spool, count: int, begin: int = 0) -> list[RequestRecord]:
    records = [make_record(number) for number in range(begin, begin + count)]
    for record in records:
        assert spool.append(record) > 0
    return records


def die(spool: Spool) -> None:
    """What the system does for a process that is killed: its descriptors are closed, and nothing else is done."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            if link.readlink().is_relative_to(spool.directory.resolve()):
                os.close(int(link.name))


def append_bytes(spool: Spool, data: bytes) -> None:
    """A write that its process did not live to finish."""
    with max(spool.directory.glob("*.journal")).open("ab") as file:
        file.write(data)


def journals(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.journal"))


def test_records_come_out_in_their_order_and_once(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    records = fill(spool, 30)
    assert spool.read(2) == records[:2]
    assert spool.read(3) == records[:3]
    spool.commit()
    assert spool.read(2) == records[3:5]
    assert take(spool) == records[3:]
    assert spool.is_empty
    more = fill(spool, 3, 30)
    assert take(spool) == more
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_segment_is_deleted_when_all_of_it_is_committed(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    fill(spool, 4096 // SIZE + 2)
    assert len(journals(tmp_path)) == 2
    spool.read(4096 // SIZE)
    spool.commit()
    assert len(journals(tmp_path)) == 2
    spool.read(1)
    assert len(journals(tmp_path)) == 2
    spool.commit()
    assert len(journals(tmp_path)) == 1
    assert spool.size_bytes == SIZE
    spool.close()


@given(st.lists(st.tuples(st.sampled_from(("append", "read", "commit")), st.integers(1, 12)), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_in_memory_and_what_is_not_come_out_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(spools, "_MAX_KEPT", 20)  # a segment takes about as many
    spool = open_spool(tmp_path, "r", SETTINGS)
    waiting: list[RequestRecord] = []
    num_made = num_read = 0
    for step, count in steps:
        if step == "append":
            waiting += fill(spool, count, num_made)
            num_made += count
        elif step == "read":
            found = spool.read(count)
            assert found == waiting[: len(found)]
            assert found or not waiting
            num_read = len(found)
        else:
            spool.commit()
            del waiting[:num_read]
            num_read = 0
        assert spool.size_bytes >= len(waiting)
    spool.read(1)
    assert take(spool) == waiting
    assert spool.is_empty
    spool.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_committed", [0, 3, 40])
def test_whoever_comes_reads_what_a_dead_one_has_left(tmp_path: Path, num_committed: int) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    records = fill(spool, 40)
    if num_committed:
        spool.read(num_committed)
        spool.commit()
    assert adopt_spool(tmp_path, SETTINGS) is None
    die(spool)
    orphan = adopt_spool(tmp_path, SETTINGS)
    assert orphan is not None
    assert adopt_spool(tmp_path, SETTINGS) is None
    again = take(orphan)
    # What was committed may come again, as long as its segment was there; nothing else may be missing.
    assert again == records[len(records) - len(again) :]
    assert len(again) >= 40 - num_committed
    orphan.close()
    assert list(tmp_path.iterdir()) == []


def test_an_adopter_that_dies_too_leaves_the_rest(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    records = fill(spool, 5)
    die(spool)
    for _ in range(2):
        orphan = adopt_spool(tmp_path, SETTINGS)
        assert orphan is not None
        assert orphan.read(2) == records[:2]
        orphan.close()
    orphan = adopt_spool(tmp_path, SETTINGS)
    assert orphan is not None
    assert take(orphan) == records
    orphan.close()


def test_names_in_use_or_not_read_to_the_end_are_passed_by(tmp_path: Path) -> None:
    first = open_spool(tmp_path, "r", SETTINGS)
    second = open_spool(tmp_path, "r", SETTINGS)
    assert (first.directory.name, second.directory.name) == ("r", "r~2")
    fill(first, 1)
    die(first)
    third = open_spool(tmp_path, "r", SETTINGS)
    assert third.directory.name == "r~3"
    for spool in (second, third):
        spool.close()
    assert [path.parent.name for path in journals(tmp_path)] == ["r"]


def test_an_owners_name_cannot_lead_out_of_the_root(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "root", "../../x", SETTINGS)
    assert spool.directory.parent == tmp_path / "root"
    spool.close()


def test_a_torn_tail_is_no_loss(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    records = fill(spool, 3)
    append_bytes(spool, encode_frame(make_record(3))[:-5])
    die(spool)
    orphan = adopt_spool(tmp_path, SETTINGS)
    assert orphan is not None
    assert take(orphan) == records
    assert (orphan.damaged_bytes, orphan.size_bytes) == (0, 0)
    orphan.close()
    assert list(tmp_path.iterdir()) == []


def test_damage_is_counted_and_kept_for_a_person(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    records = fill(spool, 4)
    os.pwrite(os.open(journals(tmp_path)[0], os.O_RDWR), b"\0\0", SIZE + 20)
    die(spool)
    orphan = adopt_spool(tmp_path, SETTINGS)
    assert orphan is not None
    assert orphan.read(1) == records[:1]
    assert take(orphan) == [records[0], *records[2:]]
    assert orphan.damaged_bytes == SIZE
    orphan.close()
    assert [path.suffix for path in (tmp_path / "r").iterdir()] == [".damaged"]
    assert adopt_spool(tmp_path, SETTINGS) is None


def test_a_spool_takes_what_is_under_way_when_its_bound_is_reached(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SpoolSettings(segment_bytes=4096, alarm_bytes=4096, max_bytes=4096))
    records = fill(spool, 3 * 4096 // SIZE)
    assert spool.size_bytes > 2 * 4096
    assert take(spool) == records
    spool.close()


def test_a_disk_that_takes_half_a_record_keeps_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    fill(spool, 1)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="No space left") as caught:
            spool.append(make_record(1))
    assert caught.value.errno == errno.ENOSPC
    spool.append(make_record(2))
    assert take(spool) == [make_record(0), make_record(2)]
    spool.close()


def test_what_was_written_is_synced_once(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, "r", SETTINGS)
    assert spool.take_unsynced() == ()
    fill(spool, 20)
    fds = spool.take_unsynced()
    assert len(fds) == len(journals(tmp_path)) + 1
    sync_and_close(fds)
    assert spool.take_unsynced() == ()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(fds[0])
    fill(spool, 1)
    fds = spool.take_unsynced()
    take(spool)
    sync_and_close(fds)
    spool.close()


def test_a_reader_sees_all_spools_and_changes_none(tmp_path: Path) -> None:
    first, second = open_spool(tmp_path, "a", SETTINGS), open_spool(tmp_path, "b", SETTINGS)
    records = [*fill(first, 30), *fill(second, 3, 30)]
    append_bytes(second, b"\xa5LR")
    for _ in range(2):
        assert [record for found in read_spools(tmp_path, 7) for record in found] == records
    assert list(read_spools(tmp_path / "nowhere", 7)) == []
    assert take(first) == records[:30]
    for spool in (first, second):
        spool.close()


def test_directories_that_dead_ones_left_empty_go(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    assert adopt_spool(tmp_path, SETTINGS) is None
    assert list(tmp_path.iterdir()) == []
