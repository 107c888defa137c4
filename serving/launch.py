"""`serving up`: bring the parts up in order, tell the user what is happening, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from serving.directory import EMPTY, Snapshot
from serving.errors import ServingError, SettingsError
from serving.settings import NANO, Settings

_POLL_S = 0.25
_LEFTOVER_GRACE_S = 5.0
_ROUTER_APP = "router"
_ERROR_LINE = re.compile(r"^[\w.]+(?:Error|Exception|Exit): ", re.MULTILINE)  # how a traceback ends
# Read by Ray when it is imported or started. What the user has set stays.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


class StartError(Exception):
    """The stack did not come up; the message says why."""


def run_stack(settings: Settings, *, is_verbose: bool) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status."""
    console = Console(stderr=False, highlight=False, soft_wrap=True)
    stop = threading.Event()
    _stop_on_signals(stop)
    try:
        with _cluster(settings, is_verbose), console.status("starting Ray") as status:
            _stop_on_signals(stop)  # again: ray.init puts a handler of its own in the place of SIGTERM's
            say = _teller(console, status.update)
            _deploy(settings, say)
            if not _wait_until_ready(settings, say, stop, is_verbose):
                return 130
            status.stop()
            console.print(_greeting(settings, _read_directory(settings)), markup=False)
            stop.wait()
            console.print("stopping: running requests are finished first ...")
    except (StartError, ServingError, OSError) as error:
        console.print(f"not started: {error}", markup=False)
        return 1
    console.print("stopped")
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _teller(console: Console, update: Callable[[str], None]) -> Callable[[str], None]:
    """Prints what is going on with the seconds since the start, each thing once."""
    started = time.monotonic()
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            console.print(f"[{time.monotonic() - started:5.1f} s] {text}", markup=False)
            update(text)
            last = text

    return say


@contextlib.contextmanager
def _cluster(settings: Settings, is_verbose: bool) -> Iterator[None]:
    """Ray, joined or started for us. A cluster of our own ends with the context, every process of it."""
    _refuse_taken_port(settings.router.host, settings.router.port)
    for key, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray
    from ray import serve

    if not is_verbose:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
    is_own = settings.ray.address is None
    options: dict[str, Any] = {"address": settings.ray.address or "local"}
    if is_own:
        options |= {
            "num_cpus": settings.ray.num_cpus or _needed_cpus(settings),
            "include_dashboard": False,
            "object_store_memory": settings.ray.object_store_bytes or 100 * 2**20,
        }
    ray.init(
        **options,
        namespace=settings.ray.namespace,
        log_to_driver=is_verbose,
        logging_level="warning" if is_verbose else "error",
        configure_logging=is_verbose,
    )
    try:
        yield
    finally:
        # A second Ctrl-C must not cut the clean-up short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with _nothing_left_behind() if is_own else contextlib.nullcontext():
            # Routers first: they finish their requests while the engines are still there.
            for name in (_ROUTER_APP, *map(_engine_app, settings.models)):
                serve.delete(name)
            ray.shutdown()


def _refuse_taken_port(host: str, port: int) -> None:
    """Routers share their port with each other, so the kernel would not mind a stranger's there. We do."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another with PORT=..."
            ) from error


def _needed_cpus(settings: Settings) -> int:
    """A cluster of our own has room for all replicas, whatever the machine counts: they share what there is."""
    engines = sum(model.num_replicas * model.cpus_per_replica for model in settings.models.values())
    routers = settings.router.num_replicas * settings.router.cpus_per_replica
    return max(os.cpu_count() or 1, math.ceil(engines + routers) + 1)


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """End whatever of our descendants outlives a shutdown, by process, never by name."""
    ours = psutil.Process().children(recursive=True)
    try:
        yield
    finally:
        _, alive = psutil.wait_procs(ours, timeout=_LEFTOVER_GRACE_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_LEFTOVER_GRACE_S)


def _engine_app(model: str) -> str:
    return f"engine-{model}"


def _resolve_checkpoint(checkpoint: str) -> str:
    """Replicas run in other folders than the user's, so a folder's name is made absolute here."""
    if checkpoint == NANO:
        return str(Path("checkpoints/nano").absolute())
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    if checkpoint.startswith((".", "/", "~")):
        raise SettingsError(f"checkpoint {checkpoint}: there is no such folder")
    return checkpoint


def _deploy(settings: Settings, say: Callable[[str], None]) -> None:
    from ray import serve

    from serving.engine.directory import reach_directory
    from serving.engine.replica import build_engine_app
    from serving.router.deployment import build_router_app

    say("starting the replicas")
    serve.start(http_options={"location": "NoServer"})
    directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
    targets = [
        serve.RunTarget(
            build_engine_app(name, settings, _resolve_checkpoint(model.checkpoint)),
            name=_engine_app(name),
            route_prefix=None,
        )
        for name, model in settings.models.items()
    ]
    targets.append(serve.RunTarget(build_router_app(settings, directory), name=_ROUTER_APP, route_prefix=None))
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait_until_ready(settings: Settings, say: Callable[[str], None], stop: threading.Event, is_verbose: bool) -> bool:
    """Wait for every application, telling what replicas tell. False when the user has had enough.

    Raises:
        StartError: an application has failed or takes longer than it may.
    """
    from ray import serve

    deadline = time.monotonic() + max(model.start_timeout_s for model in settings.models.values())
    while not stop.wait(_POLL_S):
        applications = serve.status().applications
        for name, application in applications.items():
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartError(f"{name} failed: {_reason(application, is_verbose)}")
        snapshot = _read_directory(settings)
        for record in snapshot.records:
            if record.stage:
                say(f"{record.model}: {record.stage}")
        if applications and all(application.status == "RUNNING" for application in applications.values()):
            return True
        if time.monotonic() > deadline:
            raise StartError("the replicas did not become ready in time; try --verbose, or raise start_timeout_s")
    return False


def _reason(application: Any, is_verbose: bool) -> str:
    """Why an application failed: the error that ended its replica's start, or all that Ray tells."""
    messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
    text = "\n".join(messages or [application.message])
    errors = list(_ERROR_LINE.finditer(text))
    if is_verbose or not errors:
        return text
    return text[errors[-1].start() :].strip() + "\n(--verbose shows more)"


def _read_directory(settings: Settings) -> Snapshot:
    import ray

    from serving.engine.directory import reach_directory

    with contextlib.suppress(ray.exceptions.RayError):
        directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
        snapshot: Snapshot = ray.get(directory.watch.remote(EMPTY.version, 0.0), timeout=2)
        return snapshot
    return EMPTY


def _greeting(settings: Settings, snapshot: Snapshot) -> str:
    host = "127.0.0.1" if settings.router.host in ("0.0.0.0", "::") else settings.router.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.router.port}"
    model = next(iter(settings.models))
    engines = "".join(
        f"  {record.model} at {record.base_url} (vLLM's metrics: /metrics)\n" for record in snapshot.records
    )
    return (
        f"\nReady on {url}/v1, engine replicas:\n{engines}\nTry:\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "max_tokens": 32, "messages": [{{"role": "user", "content": "Hello"}}]}}\'\n\n'
        f"The README shows how to send a page. Ctrl-C stops everything.\n"
    )
