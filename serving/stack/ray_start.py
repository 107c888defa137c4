"""Ray: joined, or started for us and ended with us, every process of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from serving.cluster.deployment_versions import max_replicas
from serving.errors import ServingError
from serving.settings.stack import RaySettings, Settings
from serving.stack.ray_access import CLOSED_METRICS, UnreachableError, check_closed, prepare_token
from serving.stack.supervisor import SignalRequests, end_descendants, reap_adopted

logger = logging.getLogger(__name__)

_LEFTOVER_GRACE_S = 5.0
_LOST_GRACE_S = 0.5
_URGENT_GRACE_S = 3.0
_SHUTDOWN_S = 10.0
_POLL_S = 0.25
_PROBE_S = 1.0
_MAX_PROBES = 3
# The processes without which a cluster of our own is none.
_HEAD = ("gcs_server", "raylet")
SLOW_START = "timed out during startup"
"""In the words of Ray 2.60.0 (`ray._private.node`), which has no class for it and no setting for its half minute."""
# Read by Ray when it is imported or started. What the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
} | CLOSED_METRICS


class StartError(Exception):
    """The stack did not come up; the message says why."""


class LostError(Exception):
    """Ray has died under a running stack; the message says which part."""


class Cluster:
    """The Ray cluster that the stack runs on."""

    def __init__(self, settings: Settings) -> None:
        self._is_own = settings.ray.address is None
        self._head: list[psutil.Process] = []
        self._children: list[psutil.Process] = []
        """All processes that `ray.init` started; Ray itself waits for their ends."""
        self._address = ""
        self._num_failed = 0
        self.num_cpus = 0
        """What a cluster of our own counts; 0 for one that was joined."""
        self.is_lost = False

    def start(self, settings: Settings, is_verbose: bool) -> None:
        """Join it, or start it.

        Raises:
            StartError: it cannot be joined.
            SettingsError: it can, by anyone.
        """
        options: dict[str, Any] = {"address": settings.ray.address or "local"}
        if self._is_own:
            self.num_cpus = settings.ray.num_cpus or needed_cpus(_with_documents(settings))
            options |= {
                "num_cpus": self.num_cpus,
                "include_dashboard": False,
                "object_store_memory": settings.ray.object_store_bytes or 100 * 2**20,
            }
        options |= {
            "namespace": settings.ray.namespace,
            "log_to_driver": is_verbose,
            "logging_level": "warning" if is_verbose else "error",
            "configure_logging": is_verbose,
        }
        if self._is_own:
            _init_ray(options)
        else:
            _join_ray(options, settings.ray)
        import ray

        self._address = ray.get_runtime_context().gcs_address
        if self._is_own:
            self._head = [child for child in psutil.Process().children(recursive=True) if _is_head(child)]
            self._children = psutil.Process().children()

    def check(self) -> None:
        """To be called now and then: Ray's own calls wait for minutes for a cluster that has gone.

        Raises:
            LostError: it is no longer there.
        """
        if self._is_own:
            reap_adopted([child.pid for child in self._children])
        gone = next((process for process in self._head if not _is_alive(process)), None)
        if gone is not None:
            self.is_lost = True
            raise LostError(f"a process of Ray's has died (pid {gone.pid}), and the replicas with it")
        if self._is_own:
            return
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
            self._num_failed = 0
        except OSError as error:
            self._num_failed += 1
            if self._num_failed >= _MAX_PROBES:
                self.is_lost = True
                raise LostError(f"the Ray cluster at {self._address} cannot be reached ({error})") from error

    def check_whole(self) -> None:
        """The same while the stack stops, when the end of a minor process means that all were signalled at once.

        A service manager does that; raylet then takes seconds to end, and its replicas go on meanwhile.

        Raises:
            LostError: the cluster is no longer there, or not for long.
        """
        self.check()
        if not all(map(_is_alive, self._children)):
            self.is_lost = True
            raise LostError("processes of Ray's were told to end as well")


def _init_ray(options: dict[str, Any]) -> None:
    """`ray.init`, which gives a node half a minute to come up: on a machine that is too busy, a second try.

    What the first one started is ended before: Ray leaves it.
    """
    import ray

    before = set(psutil.Process().children(recursive=True))
    try:
        ray.init(**options)
    except Exception as error:
        if SLOW_START not in str(error):
            raise
        logger.warning("Ray has not started within its 30 s; trying once more. Is the machine overloaded?")
        ray.shutdown()
        started = set(psutil.Process().children(recursive=True)) - before
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(started), timeout=_LEFTOVER_GRACE_S)
        ray.init(**options)


def _join_ray(options: dict[str, Any], settings: RaySettings) -> None:
    """`ray.init` on a cluster that is there, which may take most of a minute to find that it is not.

    Raises:
        StartError: it is not, or does not take our token; in one line.
        SettingsError: it takes anyone.
    """
    import ray

    address = options["address"]
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    try:
        if named:
            check_closed(named, settings)
        ray.init(**options)
        if not named:
            check_closed(ray.get_runtime_context().gcs_address, settings)
    except UnreachableError as error:
        raise StartError(str(error)) from error
    except (ConnectionError, ray.exceptions.RayError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartError(f"ray.address: {address} cannot be joined: {reason}") from error


def _is_head(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() in _HEAD
    return False


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.contextmanager
def run_cluster(
    settings: Settings, is_verbose: bool, requests: SignalRequests, stop_apps: Callable[[bool], None]
) -> Iterator[Cluster]:
    """Ray while the context lasts.

    Args:
        settings: the whole of them.
        is_verbose: whether the logs of Ray's processes are shown.
        requests: what signals ask for; taken again here, since `ray.init` installs handlers of its own.
        stop_apps: called at the end unless the cluster was lost. Given True it must not wait for running requests;
            otherwise it may take as long as they do, and is abandoned when the cluster dies or the stop becomes urgent.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    prepare_token(settings.ray)
    import ray.serve  # noqa: F401  # sets up its logger when imported, so before that is quietened

    if not is_verbose:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
    cluster = Cluster(settings)
    try:
        cluster.start(settings, is_verbose)
        requests.listen()
        try:
            yield cluster
        finally:
            _stop(cluster, requests, stop_apps)
    finally:
        if settings.ray.address is None:
            end_descendants(_LOST_GRACE_S if cluster.is_lost or requests.urgent.is_set() else _LEFTOVER_GRACE_S)


def _stop(cluster: Cluster, requests: SignalRequests, stop_apps: Callable[[bool], None]) -> None:
    """Stop the applications, then Ray. Neither may hold up the end of a cluster that has died."""
    import ray

    is_stopped = False
    if not (cluster.is_lost or requests.urgent.is_set()):
        is_stopped = _watch(cluster, requests, lambda: stop_apps(False))
    if not (is_stopped or cluster.is_lost):
        _within(_URGENT_GRACE_S, lambda: stop_apps(True))
    _within(_LOST_GRACE_S if cluster.is_lost else _SHUTDOWN_S, ray.shutdown)


def _watch(cluster: Cluster, requests: SignalRequests, action: Callable[[], None]) -> bool:
    """Do it while the cluster lives and nobody is in a hurry. Returns whether it was finished.

    Ray's own calls wait a minute for a cluster that has gone, and then abort the process.
    """
    is_finished = threading.Event()

    def act() -> None:
        action()
        is_finished.set()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        try:
            cluster.check_whole()
        except LostError:
            break
        if requests.urgent.is_set():
            break
    return is_finished.is_set()


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Do it, or give it up: what talks to a dead cluster may never come back."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)


def refuse_taken_port(host: str, port: int) -> None:
    """Routers share their port with each other, so the kernel would not mind a stranger's there. We do.

    Raises:
        StartError: the address cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another with PORT=..."
            ) from error


def needed_cpus(settings: Settings) -> int:
    """A cluster of our own has room for all replicas, whatever the machine counts: they share what there is.

    And for one more of each kind, which starts before the one that it replaces has ended.
    """
    models = settings.models.values()
    engines = sum((max_replicas(model) + 1) * model.cpus_per_replica for model in models)
    routers = (settings.router.num_replicas + 1) * settings.router.cpus_per_replica
    ocr = settings.ocr
    services = (ocr.num_replicas + 1) * ocr.cpus_per_replica if ocr.enabled else 0
    return max(os.cpu_count() or 1, math.ceil(engines + routers + services) + 1)


def _with_documents(settings: Settings) -> Settings:
    """With room for the OCR service: a reload may bring it, and Ray's CPUs cannot be changed then."""
    return settings.model_copy(update={"ocr": settings.ocr.model_copy(update={"enabled": True})})


def check_room(settings: Settings, cluster: Cluster) -> None:
    """Raises ServingError when a cluster of our own has no room for these settings."""
    wanted = needed_cpus(settings)
    if 0 < cluster.num_cpus < wanted:
        raise ServingError(f"these settings need {wanted} CPUs of Ray's, which was started with {cluster.num_cpus}")
