"""Two "nodes" on one machine: namespaces that only a cable joins, and examples/launch/torchrun.sh on each of them.

Each node has a network, process numbers and a host name of its own; the file system is shared, as a cluster's would be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.commands.launch import JOB_VARIABLES

ROOT = Path(__file__).parents[2]
_SUBNET = "10.213.77"


@dataclass(frozen=True)
class Node:
    """A network namespace; on a cluster, a machine.

    Attributes:
        rank: 0 for the one where they meet.
        namespace: its name for ``ip netns``.
        interface: the end of the cable that lies in it.
        address: that end's address.
    """

    rank: int
    namespace: str
    interface: str
    address: str

    def start(self, folder: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """The launcher on this node of two, one process on each, in `folder`; its output is one text."""
        # Whatever runs inside ends with `unshare`, which ends with the process that is returned.
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"node{self.rank}"]
        command += [str(ROOT / "examples" / "launch" / "torchrun.sh"), *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
        environment |= {"HEAD_NODE": f"{_SUBNET}.1", "NUM_NODES": "2", "NODE_RANK": str(self.rank), "PROCESSES": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.interface, "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it."""
        _ip("-n", self.namespace, "link", "set", self.interface, "up" if up else "down")


def unavailable() -> str | None:
    """Why this machine cannot have namespaces, or None where it can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "there is no `ip` (iproute2) or no `unshare` (util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"adprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    _ip("netns", "delete", probe)
    return None


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces with a cable between them and no other way out; both are gone afterwards, whatever happened."""
    names = [f"ad{os.getpid()}{end}" for end in "ab"]
    first, second = (Node(rank, f"{name}-node", name, f"{_SUBNET}.{rank + 1}") for rank, name in enumerate(names))
    try:
        for node in (first, second):
            _ip("netns", "add", node.namespace)
        _ip("-n", first.namespace, "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        _ip("-n", first.namespace, "link", "set", second.interface, "netns", second.namespace)
        for node in (first, second):
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
            node.set_link(up=True)
        yield first, second
    finally:
        for node in (first, second):
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
