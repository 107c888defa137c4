from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from serving.errors import SettingsError
from serving.settings.stack import RaySettings
from serving.stack.ray_access import UnreachableError, check_closed, prepare_token, token_file

OWN = RaySettings()
JOINED = RaySettings(address="10.0.0.1:6379")
OPEN = {"let_anyone_on_the_network_run_code": True}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def mode_of(file: Path) -> int:
    return file.stat().st_mode & 0o777


def test_a_cluster_of_our_own_gets_a_token_that_only_its_user_can_read(home: Path) -> None:
    prepare_token(OWN)
    file = home / ".ray/auth_token"
    assert token_file() == file
    token = file.read_text()
    assert len(token) == 64
    assert mode_of(file) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"
    prepare_token(OWN)
    assert file.read_text() == token


def test_a_token_that_ray_made_is_closed_to_others(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("of Ray's")
    (home / ".ray/auth_token").chmod(0o644)
    prepare_token(JOINED)
    assert mode_of(home / ".ray/auth_token") == 0o600
    assert (home / ".ray/auth_token").read_text() == "of Ray's"


def test_a_token_of_the_environment_needs_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    prepare_token(JOINED)
    prepare_token(OWN)
    assert list(home.iterdir()) == []
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_cluster_is_not_joined_without_its_token(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"ray get-auth-token --generate"):
        prepare_token(JOINED)
    prepare_token(JOINED.model_copy(update=OPEN))
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("settings", [OWN, JOINED])
def test_ray_without_authentication_has_to_be_asked_for(settings: RaySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(SettingsError, match=r"RAY_AUTH_MODE=disabled lets anyone .*let_anyone_on_the_network_run_code"):
        prepare_token(settings)
    prepare_token(settings.model_copy(update=OPEN))


@pytest.fixture
def run_gcs() -> Iterator[Callable[[grpc.StatusCode | None], str]]:
    """Starts a gRPC server that answers Ray's `CheckAlive` with a status; None is an answer. Gives its address."""
    servers: list[grpc.Server] = []

    def run(status: grpc.StatusCode | None) -> str:
        def check_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
            if status is not None:
                context.abort(status, "InvalidAuthToken")
            return b""

        def find(details: Any) -> Any:
            if details.method == "/ray.rpc.NodeInfoGcsService/CheckAlive":
                return grpc.unary_unary_rpc_method_handler(check_alive)
            return None

        handler = type("Handler", (grpc.GenericRpcHandler,), {"service": lambda self, details: find(details)})
        server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield run
    for server in servers:
        server.stop(None).wait()


def test_a_cluster_that_asks_for_a_token_is_joined(run_gcs: Callable[[Any], str]) -> None:
    check_closed(run_gcs(grpc.StatusCode.UNAUTHENTICATED), JOINED)


def test_a_cluster_that_takes_anyone_is_refused(run_gcs: Callable[[Any], str]) -> None:
    address = run_gcs(None)
    with pytest.raises(SettingsError, match=rf"{address} asks for no token, so anyone on its network can run code"):
        check_closed(address, JOINED)
    check_closed(address, JOINED.model_copy(update=OPEN))


def test_what_is_no_cluster_is_said_in_a_line(run_gcs: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked for the cluster
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(UnreachableError, match=f"no Ray cluster answers at {address}"):
        check_closed(address, JOINED)
    with pytest.raises(UnreachableError, match="is no Ray cluster: UNIMPLEMENTED"):
        check_closed(run_gcs(grpc.StatusCode.UNIMPLEMENTED), JOINED)


def test_what_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.stack.ray_access._PROBE_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        accepted: list[socket.socket] = []
        accepting = threading.Thread(target=lambda: accepted.append(silent.accept()[0]))
        accepting.start()
        with pytest.raises(UnreachableError, match="no Ray cluster answers"):
            check_closed(f"127.0.0.1:{silent.getsockname()[1]}", JOINED)
        accepting.join()
        accepted[0].close()
