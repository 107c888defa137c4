"""`make demo-metrics`: the stack and a Prometheus that scrapes it, until Ctrl-C stops both."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from serving.errors import SettingsError
from serving.http.addresses import http_url
from serving.settings.base import ANY_ADDRESS
from serving.settings.stack import load_settings

HERE = Path(__file__).resolve().parents[2] / "k8s/monitoring"
_READY_S = 30.0
_STOP_S = 120.0


class NoPrometheusError(Exception):
    """Prometheus is not installed or does not start."""


def build_config(
    *, targets_url: str = "", targets_file: Path | None = None, interval_s: int | None = None
) -> dict[str, Any]:
    """Return `prometheus.yml` with absolute paths and, if given, another source of targets or another interval."""
    config: dict[str, Any] = yaml.safe_load((HERE / "prometheus.yml").read_text())
    config["rule_files"] = [str(HERE / pattern) for pattern in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    if interval_s is not None:
        config["global"] = {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"}
        scrape["http_sd_configs"][0]["refresh_interval"] = f"{interval_s}s"
    if targets_url:
        scrape["http_sd_configs"][0]["url"] = targets_url
    if targets_file is not None:
        del scrape["http_sd_configs"]
        scrape["file_sd_configs"] = [{"files": [str(targets_file)], "refresh_interval": "5s"}]
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_prometheus(config: dict[str, Any], folder: Path, port: int) -> Iterator[str]:
    """Run Prometheus while the context lasts and yield its address. Its data is stored in `folder`.

    Raises:
        NoPrometheusError: Prometheus is not installed or does not become ready.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NoPrometheusError("Prometheus is not installed: apt-get install prometheus")
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{port}"
    log = folder / "prometheus.log"
    arguments = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
    with log.open("wb") as out:
        # Ctrl-C must not reach Prometheus: the stack ends first and is scraped until its end.
        process = subprocess.Popen([program, *arguments], stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_until_ready(process, f"http://{address}/-/ready", log)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(_STOP_S)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):  # URLError is a subclass
            return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise NoPrometheusError(f"Prometheus does not start: {log.read_text()[-1000:]}")
        time.sleep(0.1)


def main(
    config: Annotated[Path, typer.Option(help="Settings of the stack.")] = Path("configs/local.yaml"),
    port: Annotated[int, typer.Option(help="Port of Prometheus.")] = 9090,
) -> None:
    """Start the stack and a Prometheus that scrapes it, with the recording rules and alerts. Ctrl-C stops both."""
    try:
        router = load_settings(config).router
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
    host = "127.0.0.1" if router.host in ANY_ADDRESS else router.host
    targets_url = f"{http_url(host, router.port)}/metrics/targets"
    with tempfile.TemporaryDirectory(prefix="serving-metrics-") as folder:
        try:
            with run_prometheus(build_config(targets_url=targets_url), Path(folder), port) as url:
                print(f"Prometheus: {url} (targets: {url}/targets, alerts: {url}/alerts)", flush=True)
                status = _serve(config)
        except NoPrometheusError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from error
    raise typer.Exit(status)


def _serve(config: Path) -> int:
    """Run the stack in the foreground until it ends."""
    command = [str(Path(sys.executable).with_name("serving")), "up", "--config", str(config)]
    process = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _pass_on(process, number))
    return process.wait()


def _pass_on(process: subprocess.Popen[bytes], number: int) -> None:
    """Forward signals to the stack, except SIGINT, which a terminal sends to the whole process group."""
    if number == signal.SIGTERM or os.getpgid(process.pid) != os.getpgrp() or not sys.stdin.isatty():
        process.send_signal(number)


if __name__ == "__main__":
    typer.run(main)
