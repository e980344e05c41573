"""Nodes on one machine: network namespaces joined by a bridge, the link of each shaped to a rate. Needs root and Linux.

Ranks of a node share its namespace and talk to each other unshaped; what leaves the node passes its link, shaped in
both directions by a token bucket (tc tbf). Counters of the links say what was really sent.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "m2bench"
SUBNET = "10.77.0"


@dataclass(frozen=True)
class Node:
    """A namespace with its own address on a bridge; ``link``: the host's end of its cable."""

    number: int
    bridge: str = BRIDGE
    subnet: str = SUBNET

    @property
    def namespace(self) -> str:
        return f"{self.bridge}-{self.number}"

    @property
    def link(self) -> str:
        return f"{self.bridge}{self.number}"

    @property
    def address(self) -> str:
        return f"{self.subnet}.{self.number + 1}"

    def inside(self, command: list[str]) -> list[str]:
        """The command line that runs ``command`` in this node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def sent_bytes(self) -> int:
        """Bytes that left this node since it was made (the host's end received them)."""
        return int(Path(f"/sys/class/net/{self.link}/statistics/rx_bytes").read_text())


@contextlib.contextmanager
def nodes(count: int, mbit: float | None, bridge: str = BRIDGE, subnet: str = SUBNET) -> Iterator[list[Node]]:
    """``count`` nodes whose links carry ``mbit`` Mbit/s each way; None: as fast as they go. Taken down at the end.

    ``bridge``, ``subnet``: of its own for every network that is there at the same time; one of that name is replaced.
    Raises ValueError where namespaces cannot be made here.
    """
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        raise ValueError("network namespaces need root, and the commands ip and tc (Debian: iproute2)")
    made = [Node(number, bridge, subnet) for number in range(count)]
    _take_down(made, bridge)
    try:
        _run(f"ip link add {bridge} type bridge")
        _run(f"ip link set {bridge} up")
        for node in made:
            _run(f"ip netns add {node.namespace}")
            _run(f"ip link add {node.link} type veth peer name eth0 netns {node.namespace}")
            _run(f"ip link set {node.link} master {bridge} up")
            inside = f"ip -n {node.namespace}"
            _run(f"{inside} addr add {node.address}/24 dev eth0")
            _run(f"{inside} link set eth0 up")
            _run(f"{inside} link set lo up")
            if mbit is not None:
                shape(node, mbit)
        yield made
    finally:
        _take_down(made, bridge)


def shape(node: Node, mbit: float) -> None:
    """Let a node's link carry ``mbit`` Mbit/s each way."""
    # The bucket holds 5 ms of traffic; the queue a tenth of a second.
    bucket = f"root tbf rate {mbit}mbit burst {max(16, int(mbit * 1000 / 8 * 0.005))}kb latency 100ms"
    _run(f"tc qdisc add dev {node.link} {bucket}")
    _run(f"ip netns exec {node.namespace} tc qdisc add dev eth0 {bucket}")


def _take_down(made: list[Node], bridge: str) -> None:
    for node in made:
        _run(f"ip netns del {node.namespace}", check=False)
        _run(f"ip link del {node.link}", check=False)
    _run(f"ip link del {bridge}", check=False)


def _run(command: str, check: bool = True) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if check and done.returncode:
        raise ValueError(f"{command}: {done.stderr.strip() or done.stdout.strip()}")
