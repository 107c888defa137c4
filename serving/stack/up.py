"""`serving up`: starts the parts in order, reports progress to the user, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.cluster.directory import EMPTY, Snapshot
from serving.errors import ServingError, SettingsError
from serving.http.addresses import http_url
from serving.settings.base import ANY_ADDRESS
from serving.settings.stack import Settings, fill_keys, keep_keys, load_settings
from serving.stack.ray_start import Cluster, LostError, StartError, check_room, refuse_taken_port, run_cluster
from serving.stack.run_file import ROUTER_APP, RunFile, app_names, key_file, run_file
from serving.stack.supervisor import SignalRequests, supervise

_POLL_S = 0.25
_NOTICE_S = 2.0
_ERROR_LINE = re.compile(r"^[\w.]+(?:Error|Exception|Exit): ", re.MULTILINE)  # the last line of a traceback
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
# Settings that a running stack cannot change, because the process that runs the stack depends on them.
_FIXED = ("ray", "router.host", "router.port", "router.behind_serve", "engine.api_key", "engine.lease_s")


class _Console(Console):
    """A console that ignores write errors: a closed terminal must not interrupt the clean-up."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


def run_stack(settings: Settings, *, config: Path, is_verbose: bool) -> int:
    """Serve until SIGINT or SIGTERM; SIGHUP reloads `config`.

    Returns:
        The exit status: 0 after a requested stop, 130 if the stop was requested before the stack was ready, 1 if it
        could not start or was lost.
    """
    console = _Console(stderr=False, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    def tell_death(name: str, num_killed: int) -> None:
        say(f"the stack's process was ended by {name}; {num_killed} processes that it had left behind were ended")
        if settings.ray.address is not None:
            say(f"its applications are still on the Ray cluster: serving down --config {config} removes them")

    settings, keys = fill_keys(settings)
    try:
        run_file = RunFile(settings, config, keys)
        with run_file.kept():
            refuse_taken_port(settings.router.host, settings.router.port)
            return supervise(
                lambda requests: _Stack(settings, config, run_file, console, requests, is_verbose).run(), tell_death
            )
    except (StartError, ServingError, OSError) as error:
        say(f"not started: {error}")
        return 1


@dataclass(slots=True)
class _Stack:
    """A running stack, as managed by `serving up`."""

    settings: Settings
    config: Path
    run_file: RunFile
    console: Console
    requests: SignalRequests
    is_verbose: bool

    def run(self) -> int:
        """Start Ray, run the stack, and stop Ray, in a process of its own. Return the exit status of `run_stack`."""
        status, last_words = 0, "stopped"
        try:
            for warning in self._check():
                self.console.print(f"WARNING: {warning}", markup=False)
            with run_cluster(self.settings, self.is_verbose, self.requests, self._stop_apps) as cluster:
                status = self._run_on(cluster)
                last_words = self._announce_stop(status)
            if cluster.is_lost:
                last_words = "stopped, not in order: Ray's processes were ended too, so requests that ran were cut off"
        except LostError:  # the reason was printed when the loss was noticed
            status, last_words = 1, "stopped, because Ray was lost; start it again"
        except (StartError, ServingError, OSError) as error:
            status, last_words = 1, f"not started: {error}"
        except SystemExit:  # Ray's own handler for SIGTERM raises this while `ray.init` runs
            status, last_words = 130, "stopped before it was ready"
        if self.requests.is_orphaned:
            status, last_words = 1, "stopped, since the process that supervised it has died"
            self.run_file.remove()
        self.console.print(last_words, markup=False)
        return status

    def _check(self) -> list[str]:
        from serving.stack.preflight import check_before_start  # imports SQLAlchemy, which other commands do not need

        return check_before_start(self.settings)

    def _run_on(self, cluster: Cluster) -> int:
        """Run until the stack is asked to stop."""
        try:
            with self._status("starting Ray") as say:
                is_ready = False
                if not self.requests.stop.is_set():
                    deploy(self.settings, say)
                    is_ready = self._wait_until_ready(self.settings, cluster, say)
        except LostError as error:
            self._tell_loss(error)
            raise
        except BaseException:
            self.requests.urgent.set()
            raise
        if not is_ready:
            self.requests.urgent.set()  # no requests have been served yet, so there is nothing to wait for
            return 130
        try:
            self._serve(cluster)
        except LostError as error:
            self._tell_loss(error)
            raise
        return 0

    def _tell_loss(self, error: LostError) -> None:
        self.console.print(f"Ray is lost: {error}. Stopping what is left ...", markup=False)

    def _announce_stop(self, status: int) -> str:
        """Report that the stop has begun, and return the message for its end."""
        if status:
            return "stopped before it was ready"
        if self.requests.urgent.is_set():
            self.console.print("stopping at once: running requests are cut off ...")
        else:
            self.console.print("stopping: running requests are finished first (a second Ctrl-C cuts them off) ...")
        return "stopped"

    def _serve(self, cluster: Cluster) -> None:
        """Wait until the stack is asked to stop."""
        self.console.print(render_greeting(self.settings, _read_directory(self.settings)), markup=False)
        self.run_file.note_ready()
        while not self.requests.stop.wait(_POLL_S):
            cluster.check()
            if self.requests.reload.is_set():
                self.requests.reload.clear()
                self._reload(cluster)

    @contextlib.contextmanager
    def _status(self, text: str) -> Iterator[Callable[[str], None]]:
        with self.console.status(text) as status:
            yield build_teller(self.console, status.update)

    def _stop_apps(self, is_urgent: bool) -> None:
        import ray
        from ray import serve

        from serving.cluster.directory_actor import reach_directory

        directory = reach_directory(self.settings.ray.namespace, self.settings.engine.lease_s)
        with contextlib.suppress(ray.exceptions.RayError):  # routers refuse new requests and finish running ones
            ray.get(directory.begin_stop.remote(), timeout=_NOTICE_S)
        for name in app_names(self.settings):
            serve.delete(name, _blocking=not is_urgent)

    def _reload(self, cluster: Cluster) -> None:
        """Reload the settings and apply them. If they are invalid, the old ones stay in effect."""
        before = self.settings
        with self._status("reading the settings again") as say:
            try:
                after = read_again(before, self.config)
                check_room(after, cluster)
                self.settings = after  # its process, which may have to be killed
                deploy(after, say)
                self._wait_until_ready(after, cluster, say)
                _remove_apps(before, after)
            except (ServingError, StartError, OSError) as error:
                if self.settings is not before:
                    say("going back to the settings before")
                    deploy(before, say)
                    _remove_apps(self.settings, before)
                    self.settings = before
                self._tell_reload(str(error))
                return
        self._tell_reload("")
        if after.ocr != before.ocr:
            self.console.print(_tell_of_documents(after, _address(after)), markup=False, end="")

    def _tell_reload(self, error: str) -> None:
        text = f"settings not changed: {error}" if error else f"the settings of {self.config} are in force"
        self.console.print(text, markup=False)
        self.run_file.note_reload(error)

    def _wait_until_ready(self, settings: Settings, cluster: Cluster, say: Callable[[str], None]) -> bool:
        """Wait for every application and report the progress of replicas. Return False if a stop was requested.

        Raises:
            StartError: an application failed or exceeded its time limit.
            LostError: Ray has died.
        """
        from ray import serve

        deadline = time.monotonic() + max(model.start_timeout_s for model in settings.models.values())
        while not self.requests.stop.wait(_POLL_S):
            cluster.check()
            found = serve.status().applications
            applications = {name: found[name] for name in app_names(settings) if name in found}
            for name, application in applications.items():
                if application.status in _FAILED:
                    raise StartError(f"{name} failed: {find_reason(application, self.is_verbose)}")
            snapshot = _read_directory(settings)
            for record in snapshot.records:
                if record.stage:
                    say(f"{record.model}: {record.stage}")
            for model, reason in snapshot.failures:  # otherwise Serve would try twice more
                raise StartError(f"{model} failed: {reason}")
            is_whole = len(applications) == len(app_names(settings))
            if is_whole and all(application.status == "RUNNING" for application in applications.values()):
                return True
            if time.monotonic() > deadline:
                raise StartError("the replicas did not become ready in time; try --verbose, or raise start_timeout_s")
        return False


def read_again(before: Settings, config: Path) -> Settings:
    """Read the current settings.

    Raises:
        SettingsError: they are invalid, or change something that cannot change while the stack runs.
    """
    from serving.engine.checkpoint import resolve_checkpoint

    after = keep_keys(before, load_settings(config))
    for path in _FIXED:
        old, new = before, after
        for part in path.split("."):
            old, new = getattr(old, part), getattr(new, part)
        if old != new:
            raise SettingsError(f"{path} cannot change while the stack runs; stop it and start it again")
    for name, model in after.models.items():
        resolve_checkpoint(model.checkpoint)
        known = before.models.get(name)
        if model.script is None and (known is None or known.engine_args != model.engine_args):
            check_engine_args(config)
            break
    return after


def check_engine_args(config: Path) -> None:
    """Let vLLM check the settings before anything is replaced, in a separate process that frees its memory again."""
    command = [sys.executable, "-m", "serving.cli.main", "check-config", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    if checked.returncode:
        raise SettingsError(checked.stderr.strip())


def _remove_apps(before: Settings, after: Settings) -> None:
    """Remove the running applications that are no longer in the settings."""
    from ray import serve

    for name in app_names(before):
        if name not in app_names(after):
            serve.delete(name)


def build_teller(console: Console, update: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that prints progress with the seconds since the start, without repeating a message."""
    started = time.monotonic()
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            console.print(f"[{time.monotonic() - started:5.1f} s] {text}", markup=False)
            update(text)
            last = text

    return say


def deploy(settings: Settings, say: Callable[[str], None]) -> None:
    """Deploy every application. Serve applies the changes; the function returns before that is complete."""
    import ray
    from ray import serve

    from serving.cluster.directory_actor import reach_directory
    from serving.stack.applications import build_all

    say("starting the replicas")
    ray.get(reach_directory(settings.ray.namespace, settings.engine.lease_s).begin_start.remote())
    router = settings.router
    location = "EveryNode" if router.behind_serve else "NoServer"
    serve.start(http_options={"location": location, "host": router.host, "port": router.port})
    targets = [
        serve.RunTarget(
            application, name=name, route_prefix="/" if name == ROUTER_APP and router.behind_serve else None
        )
        for name, application in build_all(settings).items()
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def find_reason(application: Any, is_verbose: bool) -> str:
    """Return why an application failed: the error that ended its replica's start, or Ray's whole message."""
    messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
    text = "\n".join(messages or [application.message])
    errors = list(_ERROR_LINE.finditer(text))
    if is_verbose or not errors:
        return text
    return text[errors[-1].start() :].strip() + "\n(--verbose shows more)"


def _read_directory(settings: Settings) -> Snapshot:
    import ray

    from serving.cluster.directory_actor import reach_directory

    with contextlib.suppress(ray.exceptions.RayError):
        directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
        snapshot: Snapshot = ray.get(directory.watch.remote(EMPTY.version, 0.0), timeout=2)
        return snapshot
    return EMPTY


def _address(settings: Settings) -> str:
    """Return the stack's address for users of this machine."""
    host = "127.0.0.1" if settings.router.host in ANY_ADDRESS else settings.router.host
    return http_url(host, settings.router.port)


def render_greeting(settings: Settings, snapshot: Snapshot) -> str:
    """Return what is printed when the stack is ready: its addresses and a command to try."""
    url = _address(settings)
    model = next(iter(settings.models))
    engines = "".join(
        f"  {record.model} at {record.base_url} (vLLM's metrics: /metrics)\n" for record in snapshot.records
    )
    metrics_key = key_file(run_file(settings), "metrics")
    if metrics_key.exists():
        engines += f"Prometheus brings the key in {metrics_key} as a bearer token.\n"
    key = '-H "authorization: Bearer $SERVING_API_KEY" ' if settings.router.keys_file is not None else ""
    return (
        f"\nReady on {url}/v1, engine replicas:\n{engines}\nTry:\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' {key}\\\n"
        f'    -d \'{{"model": "{model}", "max_tokens": 32, "messages": [{{"role": "user", "content": "Hello"}}]}}\'\n\n'
        f"{_tell_of_documents(settings, url)}The README shows how to send a page. Ctrl-C stops everything.\n"
    )


def _tell_of_documents(settings: Settings, url: str) -> str:
    if not settings.ocr.enabled:
        return ""
    page = f"In a browser: {url}/\n" if settings.ocr.playground else ""
    return f"Documents: POST {url}/v1/ocr, or serving ocr FILE... --out DIR --url {url}\n{page}"
