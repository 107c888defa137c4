"""How `serving down` and `serving reload` find a running `serving up`, signal it and wait for it.

While it runs, `serving up` keeps a run file in a private folder of its user (0700) under the system's temporary folder.
The file names its process and its settings file, and tells how the last reload went. A file whose process has ended is
ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.errors import ServingError
from serving.settings.stack import Settings
from serving.stack.ray_access import prepare_token

Say = Callable[[str], None]
_POLL_S = 0.1
_TELL_S = 5.0
_RELOAD_GRACE_S = 120.0
_STOP_GRACE_S = 90.0
"""Time to stop, in addition to the time that requests may take to finish at the routers and then at the engines."""


@dataclass(frozen=True, slots=True)
class StackRun:
    """A running `serving up`, as described by its run file."""

    pid: int
    created_s: float
    """Start time of the process: its pid alone may have been reused."""
    config: str
    address: str
    drain_s: float
    start_timeout_s: float
    is_ready: bool = False
    num_reloads: int = 0
    reload_error: str = ""
    """Why the last reload was refused; empty if it succeeded."""

    @property
    def process(self) -> psutil.Process | None:
        """Return the process, or None if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created_s) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def run_folder() -> Path:
    """Return the folder of run files and create it if necessary.

    Raises:
        ServingError: another user could write to the folder.
    """
    folder = Path(tempfile.gettempdir()) / f"serving-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ServingError(f"{folder}: must be a folder of this user that no other user can access")
    return folder


def run_file(settings: Settings) -> Path:
    """Return the path of the run file, one for each address that routers listen on."""
    address = f"{settings.router.host}-{settings.router.port}"
    return run_folder() / (re.sub(r"[^A-Za-z0-9.-]", "_", address) + ".json")


def key_file(run: Path, name: str) -> Path:
    """Return the file with a run's key for other programs of its user: `engine` or `metrics` (a `credentials_file`)."""
    return run.with_suffix(f".{name}-key")


def read_engine_key(settings: Settings) -> str | None:
    """Return the engines' key: from the settings, or the one that `serving up` generated."""
    if settings.engine.api_key is not None:
        return settings.engine.api_key.get_secret_value()
    with contextlib.suppress(OSError):
        return key_file(run_file(settings), "engine").read_text()
    return None


class RunFile:
    """The run file of this process."""

    def __init__(self, settings: Settings, config: Path, keys: Mapping[str, str] | None = None) -> None:
        """Set it up. `keys` were generated for this run; other programs of its user find them at `key_file`."""
        self._path = run_file(settings)
        self._keys = dict(keys or {})
        self._port = settings.router.port
        self._run = StackRun(
            pid=os.getpid(),
            created_s=psutil.Process().create_time(),
            config=str(config.absolute()),
            address=f"{settings.router.host}:{settings.router.port}",
            drain_s=settings.engine.drain_s,
            start_timeout_s=max(model.start_timeout_s for model in settings.models.values()),
        )

    @contextlib.contextmanager
    def kept(self) -> Iterator[RunFile]:
        """Keep the run file while the context lasts, and the port locked as long as a process of this run lives.

        Routers share their port, so the kernel would let a second stack listen on it and take part of the clients.

        Raises:
            ServingError: another `serving up` of this user has the port, or is still stopping.
        """
        with self._lock():
            self._write()
            for name, key in self._keys.items():
                _write_private(key_file(self._path, name), key)
            try:
                yield self
            finally:
                self.remove()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        for name in self._keys:
            key_file(self._path, name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Take the lock. Forked children share it; it is released when the last of them ends, in whatever way."""
        file = (
            run_folder() / f"port-{self._port}.lock"
        )  # the lock file is never removed: another process may be waiting for the lock
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ServingError(self._explain_taken()) from None
        try:
            yield
        finally:
            os.close(handle)

    def _explain_taken(self) -> str:
        other = next((run for run in find_runs() if run.address.endswith(f":{self._port}")), None)
        who = f"`serving up` (pid {other.pid}, {other.config})" if other else "`serving up` that is stopping"
        return f"port {self._port} is taken by another {who}; wait for it, stop it with `serving down`, or set PORT=..."

    def note_ready(self) -> None:
        self._run = dataclasses.replace(self._run, is_ready=True)
        self._write()

    def note_reload(self, error: str) -> None:
        """Record the end of a reload; `error` says why it was refused and is empty if it succeeded."""
        self._run = dataclasses.replace(self._run, num_reloads=self._run.num_reloads + 1, reload_error=error)
        self._write()

    def _write(self) -> None:
        _write_private(self._path, json.dumps(dataclasses.asdict(self._run)))


def _write_private(file: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old or the new text, never a part of it."""
    new = file.with_suffix(f".{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as out:
        out.write(text)
    new.replace(file)


def find_runs(config: Path | None = None) -> list[StackRun]:
    """Return this user's runs: all of them, or those that were started with this settings file."""
    found = [run for file in sorted(run_folder().glob("*.json")) if (run := _read(file)) is not None]
    wanted = [run for run in found if config is None or run.config == str(config.absolute())]
    return [run for run in wanted if run.process is not None]


def find_run_at(settings: Settings) -> list[StackRun]:
    """Return the run that listens on the address in these settings; at most one."""
    run = _read(run_file(settings))
    return [run] if run is not None and run.process is not None else []


def _read(file: Path) -> StackRun | None:
    try:
        return StackRun(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def stop_run(run: StackRun, say: Say) -> bool:
    """Ask a run to stop and wait for it. Return False if it takes longer than its requests may take."""
    process = run.process
    if process is None:
        return True
    say(f"stopping {run.address} (pid {run.pid}): running requests are finished first ...")
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    return _wait(lambda: run.process is None, 3 * run.drain_s + _STOP_GRACE_S, say)


def reload_run(run: StackRun, say: Say) -> str:
    """Ask a run to reload its settings and wait until they are in effect.

    Returns:
        Why the reload failed; empty if it succeeded.
    """
    process = run.process
    if process is None:
        return "it has ended"
    if not run.is_ready:
        return "it has not finished starting"
    say(f"{run.address} (pid {run.pid}) reads {run.config} again ...")
    process.send_signal(signal.SIGHUP)
    now = run

    def is_over() -> bool:
        nonlocal now
        now = next((known for known in find_runs() if known.pid == run.pid), now)
        return now.num_reloads > run.num_reloads or now.process is None

    if not _wait(is_over, run.start_timeout_s + _RELOAD_GRACE_S, say):
        return "it takes longer than it should; see its own terminal"
    return now.reload_error if now.num_reloads > run.num_reloads else "it has ended"


def _wait(is_over: Callable[[], bool], timeout_s: float, say: Say) -> bool:
    started_s = told_s = time.monotonic()
    while not is_over():
        now_s = time.monotonic()
        if now_s - started_s > timeout_s:
            return False
        if now_s - told_s >= _TELL_S:
            say(f"... {now_s - started_s:.0f} s")
            told_s = now_s
        time.sleep(_POLL_S)
    return True


def remove_apps(settings: Settings) -> bool:
    """Delete the stack's applications from a Ray cluster that outlived `serving up`. Return whether there were any."""
    prepare_token(settings.ray)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(address=settings.ray.address, namespace=settings.ray.namespace, logging_level="error", log_to_driver=False)
    try:
        ours = [name for name in serve.status().applications if name in app_names(settings)]
        for name in sorted(ours, key=app_names(settings).index):
            serve.delete(name)
        return bool(ours)
    finally:
        ray.shutdown()


ROUTER_APP = "router"
OCR_APP = "ocr"


def engine_app(model: str) -> str:
    return f"engine-{model}"


def app_names(settings: Settings) -> list[str]:
    """Return the stack's applications in the order to stop them: each one before those that it sends requests to."""
    ocr = [OCR_APP] if settings.ocr.enabled else []
    return [*ocr, ROUTER_APP, *map(engine_app, settings.models)]
