from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving.errors import ServingError
from serving.settings.router import RouterSettings
from serving.settings.stack import ModelSettings, Settings
from serving.stack import run_file as lifecycle
from serving.stack.run_file import RunFile, StackRun, find_run_at, find_runs, reload_run, run_file, run_folder, stop_run

Say = Callable[[str], None]


def build_settings(port: int = 8000, host: str = "127.0.0.1") -> Settings:
    router = RouterSettings(port=port, host=host, allow_unauthenticated=True)
    return Settings(models={"m": ModelSettings(checkpoint="x", start_timeout_s=5)}, router=router)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(lifecycle, "_TELL_S", 0.2)
    return tmp_path / f"serving-{os.getuid()}"


def write_run(folder: Path, pid: int, config: str = "/c.yaml", port: int = 8000, **changes: object) -> StackRun:
    """The run file of another process."""
    created_s = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    run = StackRun(pid, created_s, config, f"127.0.0.1:{port}", drain_s=1, start_timeout_s=5, is_ready=True)
    run_folder()
    told = {name: getattr(run, name) for name in StackRun.__dataclass_fields__} | changes
    (folder / f"127.0.0.1-{port}.json").write_text(json.dumps(told))
    return StackRun(**told)


@pytest.fixture
def spawn() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts Python code that has handlers for signals when it prints."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn(code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", f"import signal, time\n{code}"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process

    yield spawn
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_run_file_lasts_as_long_as_what_runs_and_is_nobody_elses(folder: Path) -> None:
    file = RunFile(build_settings(), Path("some.yaml"))
    with file.kept():
        (run,) = find_runs()
        assert (run.pid, run.address, run.is_ready) == (os.getpid(), "127.0.0.1:8000", False)
        assert run.config == str(Path("some.yaml").absolute())
        assert run.start_timeout_s == 5
        assert folder.stat().st_mode & 0o777 == 0o700
        assert run_file(build_settings()).stat().st_mode & 0o777 == 0o600
        file.note_ready()
        file.note_reload("no")
        (run,) = find_runs()
        assert (run.is_ready, run.num_reloads, run.reload_error) == (True, 1, "no")
        assert len(list(folder.glob("*.json*"))) == len(list(folder.iterdir())) - 1, "nothing half written stays"
    assert find_runs() == []
    assert [file.name for file in folder.iterdir()] == ["port-8000.lock"]


HOLD = """
import os, sys
from pathlib import Path
from serving.stack.run_file import RunFile
from serving.settings.router import RouterSettings
from serving.settings.stack import ModelSettings, Settings

router = RouterSettings(port=int(sys.argv[1]), host=sys.argv[2], allow_unauthenticated=True)
with RunFile(Settings(models={"m": ModelSettings(checkpoint="x")}, router=router), Path("first.yaml")).kept():
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        os._exit(0)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_has_one_stack_until_its_last_process_has_ended(folder: Path, host: str) -> None:
    environment = {**os.environ, "TMPDIR": str(folder.parent)}
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, "8000", host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert held.stdin is not None
    assert held.stdout is not None
    child = psutil.Process(int(held.stdout.readline()))
    with pytest.raises(ServingError, match=rf"port 8000 is taken by .*pid {held.pid}, .*first.yaml"):
        RunFile(build_settings(), Path("c.yaml")).kept().__enter__()
    with RunFile(build_settings(8001), Path("c.yaml")).kept():
        pass
    held.kill()
    held.wait()
    with pytest.raises(ServingError, match=r"port 8000 is taken by .* that is stopping"):
        RunFile(build_settings(), Path("c.yaml")).kept().__enter__()
    child.kill()
    child.wait()
    held.stdin.close()
    held.stdout.close()
    with RunFile(build_settings(), Path("c.yaml")).kept():
        assert [run.pid for run in find_runs()] == [os.getpid()]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_open_is_not_trusted(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ServingError, match="no other user can access"):
        find_runs()


def test_a_link_in_the_place_of_the_folder_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServingError, match="must be a folder of this user"):
        find_runs()


def test_runs_are_found_by_their_file_and_by_their_address(folder: Path) -> None:
    first = write_run(folder, os.getpid(), "/a.yaml", 8000)
    second = write_run(folder, os.getpid(), "/a.yaml", 8001)
    third = write_run(folder, os.getpid(), "/b.yaml", 8002)
    assert find_runs() == [first, second, third]
    assert find_runs(Path("/a.yaml")) == [first, second]
    assert find_runs(Path("/c.yaml")) == []
    assert find_run_at(build_settings(8001)) == [second]
    assert find_run_at(build_settings(8003)) == []


def test_an_address_makes_a_file_name(folder: Path) -> None:
    assert run_file(build_settings(host="::1")) == folder / "__1-8000.json"


@pytest.mark.parametrize(("pid", "created_s"), [(2**22 + 1, 0.0), (os.getpid(), 5.0)], ids=["gone", "another's"])
def test_a_file_whose_process_is_gone_says_nothing(folder: Path, pid: int, created_s: float) -> None:
    run = write_run(folder, pid, created_s=created_s)
    assert find_runs() == []
    assert find_run_at(build_settings()) == []
    assert stop_run(run, print)
    assert reload_run(run, print) == "it has ended"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', "\x00"])
def test_a_file_that_makes_no_sense_says_nothing(folder: Path, text: str) -> None:
    run_folder()
    (folder / "127.0.0.1-8000.json").write_text(text)
    assert find_runs() == []


def test_stopping_waits_until_it_has(folder: Path, spawn: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = spawn(
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.7), exit()))\nprint(1, flush=True)\ntime.sleep(60)"
    )
    run = write_run(folder, process.pid)
    said: list[str] = []
    started_s = time.monotonic()
    assert stop_run(run, said.append)
    assert time.monotonic() - started_s > 0.6
    assert "127.0.0.1:8000" in said[0]
    assert len(said) > 1, "it tells that it waits"


def test_what_does_not_stop_is_given_up(
    folder: Path, spawn: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_STOP_GRACE_S", 0.3)
    process = spawn("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(60)")
    assert not stop_run(write_run(folder, process.pid, drain_s=0), print)
    assert process.poll() is None


def test_a_reload_tells_how_it_went(folder: Path) -> None:
    file = RunFile(build_settings(), Path("/c.yaml"))
    before = signal.getsignal(signal.SIGHUP)
    try:
        with file.kept():
            (run,) = find_runs()
            assert reload_run(run, print) == "it has not finished starting"
            file.note_ready()
            for error in ("no", ""):
                signal.signal(signal.SIGHUP, lambda *_, error=error: file.note_reload(error))
                (run,) = find_runs()
                assert reload_run(run, print) == error
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reload_that_ends_the_process_says_so(folder: Path, spawn: Callable[[str], subprocess.Popen[bytes]]) -> None:
    # Under nohup children ignore the signal, which would then be waited for in vain.
    process = spawn("signal.signal(signal.SIGHUP, signal.SIG_DFL)\nprint(1, flush=True)\ntime.sleep(60)")
    assert reload_run(write_run(folder, process.pid), print) == "it has ended"


def test_a_reload_that_says_nothing_is_given_up(
    folder: Path, spawn: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_RELOAD_GRACE_S", 0.3)
    process = spawn("signal.signal(signal.SIGHUP, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(60)")
    assert "longer than it should" in reload_run(write_run(folder, process.pid, start_timeout_s=0), print)
