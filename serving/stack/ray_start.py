"""The Ray cluster: an existing one that is joined, or our own, all of whose processes are started and ended here."""

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
# The processes that a cluster of our own cannot do without.
_HEAD = ("gcs_server", "raylet")
SLOW_START = "timed out during startup"
"""Part of the message of Ray 2.60.0 (`ray._private.node`) when a node does not start within 30 seconds. Ray has neither
an exception class for it nor a setting for the timeout."""
# Environment variables that Ray reads when it is imported or started. Values set by the user are kept.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
} | CLOSED_METRICS


class StartError(Exception):
    """The stack could not start; the message gives the reason."""


class LostError(Exception):
    """Ray died while the stack was running; the message names the process."""


class Cluster:
    """The Ray cluster that the stack runs on."""

    def __init__(self, settings: Settings) -> None:
        self._is_own = settings.ray.address is None
        self.head: list[psutil.Process] = []
        """The processes of our own cluster that it cannot do without; empty for a cluster that was joined."""
        self.children: list[psutil.Process] = []
        """All processes that `ray.init` started. Ray itself collects their exit statuses."""
        self.address = ""
        """host:port of the cluster's GCS."""
        self._num_failed = 0
        self.num_cpus = 0
        """CPUs that our own cluster declares; 0 for a cluster that was joined."""
        self.is_lost = False

    def start(self, settings: Settings, is_verbose: bool) -> None:
        """Join the cluster, or start one.

        Raises:
            StartError: the cluster cannot be joined.
            SettingsError: anyone could join the cluster.
        """
        options: dict[str, Any] = {"address": settings.ray.address or "local"}
        if self._is_own:
            self.num_cpus = settings.ray.num_cpus or needed_cpus(with_documents(settings))
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
            init_ray(options)
        else:
            _join_ray(options, settings.ray)
        import ray

        self.address = ray.get_runtime_context().gcs_address
        if self._is_own:
            self.head = [child for child in psutil.Process().children(recursive=True) if _is_head(child)]
            self.children = psutil.Process().children()

    def check(self) -> None:
        """Check that the cluster is alive. Call it regularly: Ray's own calls wait for minutes for a dead cluster.

        Raises:
            LostError: the cluster has died.
        """
        if self._is_own:
            reap_adopted([child.pid for child in self.children])
        gone = next((process for process in self.head if not _is_alive(process)), None)
        if gone is not None:
            self.is_lost = True
            raise LostError(f"a process of Ray's has died (pid {gone.pid}), and the replicas with it")
        if self._is_own:
            return
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
            self._num_failed = 0
        except OSError as error:
            self._num_failed += 1
            if self._num_failed >= _MAX_PROBES:
                self.is_lost = True
                raise LostError(f"the Ray cluster at {self.address} cannot be reached ({error})") from error

    def check_whole(self) -> None:
        """Check the cluster while the stack stops; here the end of a minor process means that all were signalled.

        Service managers signal all processes at once. Raylet then takes seconds to end while its replicas continue.

        Raises:
            LostError: the cluster has died or is about to.
        """
        self.check()
        if not all(map(_is_alive, self.children)):
            self.is_lost = True
            raise LostError("processes of Ray's were told to end as well")


def init_ray(options: dict[str, Any]) -> None:
    """Call `ray.init`, and once more if the node did not start within Ray's 30 seconds because the machine is busy.

    Processes of the first attempt, which Ray leaves running, are ended before the second.
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
    """Call `ray.init` to join an existing cluster; it may take most of a minute to fail if there is none.

    Raises:
        StartError: there is no cluster, or it rejects our token; the message is one line.
        SettingsError: the cluster accepts anyone.
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
    """Run or join Ray while the context lasts.

    Args:
        settings: all settings.
        is_verbose: whether to show the logs of Ray's processes.
        requests: receives signals; its handlers are installed again here, since `ray.init` replaces them.
        stop_apps: called at the end unless the cluster was lost. With True it must not wait for running requests;
            otherwise it may wait for them, and is abandoned if the cluster dies or the stop becomes urgent.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    prepare_token(settings.ray)
    import ray.serve  # noqa: F401  # import it first: it configures its logger when imported, and the logger is silenced below

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
    """Stop the applications, then Ray, without waiting for a cluster that has died."""
    import ray

    is_stopped = False
    if not (cluster.is_lost or requests.urgent.is_set()):
        is_stopped = _watch(cluster, requests, lambda: stop_apps(False))
    if not (is_stopped or cluster.is_lost):
        _within(_URGENT_GRACE_S, lambda: stop_apps(True))
    _within(_LOST_GRACE_S if cluster.is_lost else _SHUTDOWN_S, ray.shutdown)


def _watch(cluster: Cluster, requests: SignalRequests, action: Callable[[], None]) -> bool:
    """Run it while the cluster is alive and the stop is not urgent. Return whether it finished.

    Ray's own calls wait a minute for a dead cluster, and then abort the process.
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
    """Run it with a time limit: a call to a dead cluster may never return."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)


def refuse_taken_port(host: str, port: int) -> None:
    """Check that the router's address is free. Routers share their port, so the kernel would not report a conflict.

    Raises:
        StartError: the address cannot be bound.
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
    """Return the CPUs that our own cluster declares, whatever the machine has: enough for all replicas, which share it.

    There is also room for one extra replica of each kind, which starts before the one that it replaces has ended.
    """
    models = settings.models.values()
    engines = sum((max_replicas(model) + 1) * model.cpus_per_replica for model in models)
    routers = (settings.router.num_replicas + 1) * settings.router.cpus_per_replica
    ocr = settings.ocr
    services = (ocr.num_replicas + 1) * ocr.cpus_per_replica if ocr.enabled else 0
    return max(os.cpu_count() or 1, math.ceil(engines + routers + services) + 1)


def with_documents(settings: Settings) -> Settings:
    """Return the settings with the OCR service enabled: a reload may enable it, but cannot add CPUs."""
    return settings.model_copy(update={"ocr": settings.ocr.model_copy(update={"enabled": True})})


def check_room(settings: Settings, cluster: Cluster) -> None:
    """Raise ServingError if our own cluster has too few CPUs for these settings."""
    wanted = needed_cpus(settings)
    if 0 < cluster.num_cpus < wanted:
        raise ServingError(f"these settings need {wanted} CPUs of Ray's, which was started with {cluster.num_cpus}")
