"""Access to the Ray cluster. Ray executes any code it is sent; without a token, anyone on the network can send it.

https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

import grpc

from serving.errors import SettingsError
from serving.settings.stack import RaySettings

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_PROBE_S = 10.0
# Private to Ray 2.60: GCS answers this call to everyone who is permitted to call it. Ray has no public equivalent.
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_OPEN_SETTING = "ray.let_anyone_on_the_network_run_code"

# Ports on which Ray would serve its own metrics on every address, without a key. Values set by the user are kept.
CLOSED_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
}


class UnreachableError(Exception):
    """No Ray cluster answers at the address; the message is one line."""


def token_file() -> Path:
    """Return the file in which Ray looks for a token that no environment variable contains."""
    named = os.environ.get(_TOKEN_PATH)
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def prepare_token(settings: RaySettings) -> None:
    """Enable Ray's token authentication and make sure that there is a token. Call it before Ray is imported.

    For a cluster of our own a missing token is created; an existing cluster has a token already.

    Raises:
        SettingsError: Ray would accept anyone, or the token of the cluster to join is missing.
        OSError: the token file cannot be written.
    """
    is_open = settings.let_anyone_on_the_network_run_code
    mode = os.environ.get(_MODE)
    if mode is not None and mode.lower() != "token":
        if not is_open:
            raise SettingsError(
                f"environment {_MODE}={mode} lets anyone on the network run code here through Ray; unset it, or say "
                f"{_OPEN_SETTING}: true"
            )
        return
    file = token_file()
    has_token = bool(os.environ.get(_TOKEN)) or file.is_file()
    if not has_token and settings.address is not None:
        if is_open:
            os.environ[_MODE] = "disabled"
            return
        raise SettingsError(
            f"ray.address: {settings.address} is joined with the token of its cluster, and {file} is not there: run "
            "`ray get-auth-token --generate` before `ray start --head`, or copy the file from the head"
        )
    if not has_token:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):  # another stack of this user is starting as well
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as out:
                out.write(secrets.token_hex(32))
    os.environ[_MODE] = "token"
    _close_to_others(file)


def _close_to_others(file: Path) -> None:
    """Restrict the file to its owner: Ray creates it readable by every user of the machine."""
    with contextlib.suppress(OSError):
        found = file.stat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
            file.chmod(0o600)


def check_closed(address: str, settings: RaySettings) -> None:
    """Check that the cluster to join does not accept calls without a token.

    Args:
        address: `host:port` of its GCS.
        settings: whether an open cluster is permitted.

    Raises:
        UnreachableError: nothing answers at the address within ten seconds.
        SettingsError: the cluster is open and must not be.
    """
    if _takes_anyone(address) and not settings.let_anyone_on_the_network_run_code:
        raise SettingsError(
            f"the Ray cluster at {address} asks for no token, so anyone on its network can run code as its user; start "
            f"it again after `ray get-auth-token --generate`, or say {_OPEN_SETTING}: true"
        )


def _takes_anyone(address: str) -> bool:
    # A proxy configured in the environment would answer instead of the cluster.
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        check_alive = channel.unary_unary(_CHECK_ALIVE, request_serializer=bytes, response_deserializer=bytes)
        try:
            check_alive(b"", timeout=_PROBE_S, wait_for_ready=False)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                return False
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise UnreachableError(
                    f"no Ray cluster answers at {address}; is it up, and `ray.address` right?"
                ) from None
            raise UnreachableError(f"what answers at {address} is no Ray cluster: {code.name} {details}") from None
        return True
