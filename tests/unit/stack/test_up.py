from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from serving.cluster.directory import EMPTY, ReplicaRecord, ReplicaState, Snapshot
from serving.errors import ServingError, SettingsError
from serving.settings.ocr import OcrSettings
from serving.settings.router import RouterSettings
from serving.settings.stack import AutoscalingSettings, ModelSettings, RaySettings, Settings
from serving.stack import ray_start, up
from serving.stack.ray_start import Cluster, LostError, StartError
from serving.stack.supervisor import SignalRequests

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own; `launch` imports it late
    import ray
    import ray.serve
    from ray._private import node


def build_settings(**router: object) -> Settings:
    models = {"nano": ModelSettings(checkpoint="nano"), "other": ModelSettings(checkpoint="x")}
    return Settings(models=models, router=RouterSettings.model_validate({"allow_unauthenticated": True, **router}))


# The address


@pytest.mark.parametrize("shares_port", [False, True])
def test_a_taken_port_is_refused_even_when_its_owner_would_share(shares_port: bool) -> None:
    with socket.socket() as stranger:
        if shares_port:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port} cannot be listened on .*PORT="):
            ray_start.refuse_taken_port("127.0.0.1", port)


def test_a_free_port_stays_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray_start.refuse_taken_port("127.0.0.1", port)
    ray_start.refuse_taken_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartError, match=r"203\.0\.113\.1:8000 cannot be listened on"):
        ray_start.refuse_taken_port("203.0.113.1", 8000)


# Room for all replicas


@pytest.mark.parametrize(
    ("num_replicas", "cpus_per_replica", "router_cpus", "expected"),
    [(1, 1.0, 0.5, 4), (100, 2.0, 0.5, 204), (100, 2.0, 1.5, 206), (3, 0.25, 0.0, 2)],
)
def test_a_cluster_of_our_own_has_room_for_all_replicas(
    monkeypatch: pytest.MonkeyPatch, num_replicas: int, cpus_per_replica: float, router_cpus: float, expected: int
) -> None:
    model = ModelSettings(checkpoint="x", num_replicas=num_replicas, cpus_per_replica=cpus_per_replica)
    settings = Settings(models={"m": model}, router=RouterSettings(cpus_per_replica=router_cpus))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert ray_start.needed_cpus(settings) == expected
    monkeypatch.setattr(os, "cpu_count", lambda: 500)
    assert ray_start.needed_cpus(settings) == 500
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert ray_start.needed_cpus(settings) == expected


def test_there_is_room_for_all_replicas_that_the_work_may_ask_for() -> None:
    scaling = AutoscalingSettings(max_replicas=600)
    settings = Settings(models={"m": ModelSettings(checkpoint="x", autoscaling=scaling)})
    assert ray_start.needed_cpus(settings) == 603


def test_settings_that_do_not_fit_the_running_cluster_are_refused() -> None:
    settings = Settings(models={"m": ModelSettings(checkpoint="x", num_replicas=600)})
    ours = Cluster(settings)
    ray_start.check_room(settings, ours)  # one that was joined
    ours.num_cpus = 603
    ray_start.check_room(settings, ours)
    ours.num_cpus = 602
    with pytest.raises(ServingError, match="need 603 CPUs of Ray's, which was started with 602"):
        ray_start.check_room(settings, ours)


def test_a_cluster_of_our_own_has_room_for_documents_that_a_reload_brings() -> None:
    settings = Settings(models={"m": ModelSettings(checkpoint="x", num_replicas=600)})
    ours = Cluster(settings)
    ours.num_cpus = ray_start.needed_cpus(ray_start.with_documents(settings))
    ray_start.check_room(settings.model_copy(update={"ocr": OcrSettings(enabled=True)}), ours)


# Ray's start


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_ray_that_was_too_slow_is_ended_and_started_once_more(
    monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**options: object) -> None:
        assert options == {"address": "local"}
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(started) <= num_failures:
            raise Exception(f"The current node {ray_start.SLOW_START}. This could happen")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with contextlib.nullcontext() if num_failures == 1 else pytest.raises(Exception, match=ray_start.SLOW_START):
            ray_start.init_ray({"address": "local"})
        assert len(started) == 2
        assert not psutil.pid_exists(started[0].pid)
        assert started[1].poll() is bystander.poll() is None
    finally:
        for child in (*started, bystander):
            child.kill()
            child.wait()


def test_what_is_wrong_with_the_options_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def init(**options: object) -> None:
        calls.append(options)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError):
        ray_start.init_ray({})
    assert len(calls) == 1


def test_ray_still_says_so_when_it_was_too_slow() -> None:
    assert ray.__version__ == "2.60.0", "look whether its start has a setting or an error class by now"
    assert re.search(r'"The current node ' + ray_start.SLOW_START, inspect.getsource(node))


# The head


def test_a_head_that_has_died_is_noticed() -> None:
    ours = Cluster(build_settings())
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ours.head = [psutil.Process(child.pid)]
    ours.check()
    child.kill()
    child_ended = ours.head[0]
    while child_ended.status() != psutil.STATUS_ZOMBIE:
        pass
    with pytest.raises(LostError, match=str(child.pid)):
        ours.check()
    child.wait()
    assert ours.is_lost


def test_a_joined_cluster_is_lost_when_it_cannot_be_reached_three_times() -> None:
    ours = Cluster(build_settings().model_copy(update={"ray": RaySettings(address="auto")}))
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        ours.address = f"127.0.0.1:{head.getsockname()[1]}"
        ours.check()
    ours.check()
    ours.check()
    with pytest.raises(LostError, match="cannot be reached"):
        ours.check()


# Reading the settings again


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("router: {port: 9}", "router.port cannot change while the stack runs"),
        ("router: {host: '::1'}", "router.host cannot change"),
        ("engine: {api_key: other}", "engine.api_key cannot change"),
        ("engine: {lease_s: 20}", "engine.lease_s cannot change"),
        ("ray: {namespace: other}", "ray cannot change"),
        ("router: {prot: 1}", "unknown key"),
    ],
)
def test_what_a_running_stack_cannot_change_is_refused(
    write_settings: Callable[..., Path], text: str, reason: str
) -> None:
    before = Settings(models={"nano": ModelSettings(checkpoint="nano")})
    with pytest.raises(SettingsError, match=reason) as caught:
        up.read_again(before, write_settings(text))
    assert "other" not in str(caught.value)


def test_what_can_change_is_read(write_settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(up, "check_engine_args", checked.append)
    before = Settings(models={"nano": ModelSettings(checkpoint="nano")})
    assert up.read_again(before, write_settings("router: {max_tries: 7}")).router.max_tries == 7
    assert checked == []
    file = write_settings("models: {nano: {checkpoint: nano, engine_args: {dtype: auto}}}", is_whole=True)
    assert up.read_again(before, file).models["nano"].engine_args == {"dtype": "auto"}
    assert checked == [file], "vLLM is asked before anything is replaced"


def test_engine_arguments_are_checked_in_a_process_of_its_own(
    write_settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=2, stderr="no such argument\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(SettingsError, match=r"^no such argument$"):
        up.check_engine_args(write_settings())


# What the user is told


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("::", "http://127.0.0.1:8123"),
        ("10.1.2.3", "http://10.1.2.3:8123"),
        pytest.param(
            "::1",
            "http://[::1]:8123",
        ),
    ],
)
def test_the_greeting_shows_a_command_that_works(host: str, url: str) -> None:
    greeting = up.render_greeting(build_settings(host=host, port=8123), EMPTY)
    assert f"curl {url}/v1/chat/completions " in greeting
    assert f"{url}/v1," in greeting
    assert '{"model": "nano", ' in greeting


def test_the_greeting_tells_where_documents_go() -> None:
    settings = build_settings(port=8123)
    assert "/v1/ocr" not in up.render_greeting(settings, EMPTY)

    def greet(**ocr: object) -> str:
        return up.render_greeting(settings.model_copy(update={"ocr": OcrSettings.model_validate(ocr)}), EMPTY)

    assert "POST http://127.0.0.1:8123/v1/ocr," in greet(enabled=True)
    assert "In a browser: http://127.0.0.1:8123/\n" in greet(enabled=True)
    assert "browser" not in greet(enabled=True, playground=False)


def test_the_greeting_tells_where_the_engines_are() -> None:
    record = ReplicaRecord("a", "nano", "http://127.0.0.1:4321", ReplicaState.READY)
    assert "nano at http://127.0.0.1:4321" in up.render_greeting(build_settings(), Snapshot((1, 1), (record,)))


def application(message: str, *deployments: str) -> SimpleNamespace:
    return SimpleNamespace(
        message=message,
        deployments={str(number): SimpleNamespace(message=text) for number, text in enumerate(deployments)},
    )


TRACEBACK = """The replica failed:
Traceback (most recent call last):
  File "a.py", line 1, in f
ValueError: first

During handling of the above exception, another exception occurred:

serving.errors.SettingsError: vLLM does not accept them
  on two lines
"""


@pytest.mark.parametrize(
    ("told", "is_verbose", "expected"),
    [
        (application("whole"), False, "whole"),
        (application("whole", "", ""), False, "whole"),
        (application("whole", "one", "", "two"), False, "one\ntwo"),
        (application("whole", TRACEBACK), True, TRACEBACK),
        (
            application("whole", TRACEBACK),
            False,
            "serving.errors.SettingsError: vLLM does not accept them\n  on two lines\n(--verbose shows more)",
        ),
    ],
)
def test_the_reason_of_a_failure_is_its_last_error(told: SimpleNamespace, is_verbose: bool, expected: str) -> None:
    assert up.find_reason(told, is_verbose) == expected


def test_each_thing_is_said_once_and_as_it_is() -> None:
    output = io.StringIO()
    updates: list[str] = []
    say = up.build_teller(Console(file=output, width=100), updates.append)
    for text in ("loading [/weights]", "loading [/weights]", "ready", "loading [/weights]"):
        say(text)
    assert updates == ["loading [/weights]", "ready", "loading [/weights]"]
    assert [line.partition("] ")[2] for line in output.getvalue().splitlines()] == updates


# The end


class Ended:
    """Takes part in a stop: notes what was asked, and hangs as Ray's calls do when the cluster has gone."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.asked: list[bool] = []
        self._hangs = hangs

    def stop_apps(self, is_urgent: bool) -> None:
        self.asked.append(is_urgent)
        if self._hangs and not is_urgent:
            threading.Event().wait()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Settings]]:
    """Gives settings of a cluster that is there already, with a listener in the place of its GCS."""
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_start, "check_closed", lambda address, settings: None)  # see test_ray_access.py
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    with socket.socket() as gcs:
        gcs.bind(("127.0.0.1", 0))
        gcs.listen()
        address = f"127.0.0.1:{gcs.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        yield lambda: build_settings().model_copy(update={"ray": RaySettings(address=address)})


@pytest.fixture
def requests() -> Iterator[SignalRequests]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield SignalRequests()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_applications_are_stopped_in_order(joined: Callable[[], Settings], requests: SignalRequests) -> None:
    ended = Ended()
    with ray_start.run_cluster(joined(), True, requests, ended.stop_apps):
        pass
    assert ended.asked == [False]


def test_an_urgent_stop_does_not_wait_for_requests(joined: Callable[[], Settings], requests: SignalRequests) -> None:
    ended = Ended(hangs=True)
    with ray_start.run_cluster(joined(), True, requests, ended.stop_apps):
        signal.raise_signal(signal.SIGUSR2)
    assert ended.asked == [True]


def test_a_stop_that_becomes_urgent_is_cut_short(joined: Callable[[], Settings], requests: SignalRequests) -> None:
    ended = Ended(hangs=True)
    with ray_start.run_cluster(joined(), True, requests, ended.stop_apps):
        threading.Timer(0.3, requests.urgent.set).start()
    assert ended.asked == [False, True]


def test_a_cluster_that_dies_while_it_stops_is_not_waited_for(
    joined: Callable[[], Settings], requests: SignalRequests
) -> None:
    ended = Ended(hangs=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with ray_start.run_cluster(joined(), True, requests, ended.stop_apps) as ours:
        ours.children = [psutil.Process(child.pid)]  # one of Ray's lesser processes
        ours.check()
        child.kill()
    child.wait()
    assert ours.is_lost
    assert ended.asked == [False]


def test_nothing_is_stopped_on_a_cluster_that_was_never_reached(
    joined: Callable[[], Settings], requests: SignalRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("nobody there\nand much more")

    settings = joined()
    monkeypatch.setattr(ray, "init", refuse)
    ended = Ended()
    refused = pytest.raises(StartError, match=r"^ray.address: .* cannot be joined: nobody there$")
    with refused, ray_start.run_cluster(settings, True, requests, ended.stop_apps):
        pass
    assert ended.asked == []
