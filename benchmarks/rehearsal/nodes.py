"""Nodes in namespaces of this machine: a network, processes, /tmp and /dev/shm of their own for each. Needs root.

A node stands where a pod would. The network is a bridge with a private subnet and no way out. All is gone when the
context ends, whatever happened; the kernel ends a node's processes together with the first of them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_SHM = "512m"
_END_S = 20.0


@dataclass
class Node:
    """One namespace of the network, and at most one family of processes in it."""

    name: str
    namespace: str
    ip: str
    folder: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    told_before: int = 0
    """Bytes in the log when the first process of now was started."""

    def start(self, command: Sequence[str]) -> None:
        """Run it as the first process of the node, with fresh /tmp and /dev/shm; its output goes to the node's log."""
        scratch = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
        inside = (
            f"mount --bind {shlex.quote(str(scratch))} /tmp && mount -t tmpfs -o size={_SHM} tmpfs /dev/shm && "
            f"exec {shlex.join(command)}"
        )
        outside = ["ip", "netns", "exec", self.namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.told_before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*outside, "sh", "-c", inside],
                env={**os.environ, **self.environment},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def weigh(self, niceness: int) -> None:
        """How the cores of this machine are shared with other nodes: 0 for an equal part, -20 for the largest.

        By the kernel's groups of a session each (`/proc/PID/autogroup`); without them processes count, not nodes.
        """
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                Path(f"/proc/{self.process.pid}/autogroup").write_text(str(niceness))

    def run(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a command in the node's network, beside the node's processes."""
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def run_inside(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """The same, among the node's processes and with its /tmp: as a hook is run in a pod.

        Raises:
            RuntimeError: none runs.
        """
        if self.process is None or not (first := psutil.Process(self.process.pid).children()):
            raise RuntimeError(f"nothing runs on {self.name}")
        return self.run(["nsenter", "--target", str(first[0].pid), "--mount", "--pid", *command], timeout_s)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(_END_S)
        self.process = None

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def tail(self, size: int = 2000) -> str:
        """The end of what it has told since it was started."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self.told_before :][-size:].decode(errors="replace")


@dataclass
class Network:
    """Makes nodes on one bridge."""

    folder: Path
    tag: str = field(default_factory=lambda: f"{os.getpid() % 0xFFFF:04x}")
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def bridge(self) -> str:
        return f"rh{self.tag}br"

    def _link(self, number: int) -> str:
        return f"rh{self.tag}v{number}"

    def _ip(self, number: int) -> str:
        return f"10.{213 + os.getpid() % 32}.{os.getpid() // 32 % 256}.{number}"

    def open(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")

    def add(self, name: str, environment: Mapping[str, str]) -> Node:
        """A node that reaches the others and nobody else."""
        number = len(self.nodes) + 2
        namespace, link = f"rh{self.tag}-{name}", self._link(number)
        folder = self.folder / name
        folder.mkdir()
        node = Node(name, namespace, self._ip(number), folder, environment)
        self.nodes[name] = node
        _ip("netns", "add", namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", link, "master", self.bridge, "up")
        for arguments in (("link", "set", "lo", "up"), ("link", "set", "eth0", "up")):
            _ip("-n", namespace, *arguments)
        _ip("-n", namespace, "addr", "add", f"{node.ip}/24", "dev", "eth0")
        return node

    def close(self) -> None:
        for number, node in enumerate(self.nodes.values(), start=2):
            node.kill()
            # A namespace goes in its own time; its link goes now.
            subprocess.run(["ip", "link", "del", self._link(number)], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", node.namespace], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


@contextlib.contextmanager
def open_network() -> Iterator[Network]:
    """A network without nodes, removed with everything in it at the end. Its folder is none of the nodes' own /tmp."""
    with tempfile.TemporaryDirectory(prefix="serving-rehearsal-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        network = Network(Path(folder))
        try:
            network.open()
            yield network
        finally:
            network.close()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
