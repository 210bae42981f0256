"""A real Ray cluster of several hosts on this machine.

Each host has its own network interface, its own processes and, where a test wants it, its own disk and environment: what
happens to one of them happens to it alone. Needs root on Linux, and iproute2; `available` says whether they are here.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray

from tuner.cluster import connected

_NETWORKS = range(200)
"""numbers of them; tests run in several processes at once, and each takes one that is free"""


def available() -> bool:
    """Whether hosts can be made here."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter")):
        return False
    return subprocess.run(["unshare", "-mnpf", "true"], capture_output=True, check=False).returncode == 0


@dataclass
class Host:
    """A worker node. Its processes end with the first of them, which we started."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    inside: int = 0
    """process id of the first process in the host's own namespaces, as seen from here"""
    node_id: str = ""

    def kill(self) -> None:
        """The host is gone, with all its processes at once."""
        first = os.pidfd_open(self.inside)
        self.process.kill()
        self.process.wait()
        select.select([first], [], [])  # it ends last: the kernel has ended all others by then
        os.close(first)

    def cut_off(self) -> None:
        """Nothing reaches the host any more, and nothing comes from it; its processes run on."""
        self._enter("ip", "link", "set", "eth0", "down")

    def join_again(self) -> None:
        """The end of `cut_off`."""
        self._enter("ip", "link", "set", "eth0", "up")

    def drain(self, seconds: int) -> None:
        """A notice that the host will be taken away, as clouds give for spot machines."""
        address = ray.get_runtime_context().gcs_address
        subprocess.run(
            [_ray(), "drain-node", "--address", address, "--node-id", self.node_id,
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine is taken back",
             "--deadline-remaining-seconds", str(seconds)],
            check=True, capture_output=True,
        )  # fmt: skip

    def _enter(self, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.inside), "-n", *command], check=True, capture_output=True)


@dataclass
class Hosts:
    """A head, on which this process is, and hosts that join it."""

    address: str
    """of the head: host:port"""
    bridge: str
    network: str
    """the first three numbers of all addresses"""
    environment: dict[str, str]
    hosts: list[Host] = field(default_factory=list)

    def add(
        self,
        name: str,
        cpus: int = 1,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
        own_disks: Mapping[str | Path, str] | None = None,
        python: str = sys.executable,
    ) -> Host:
        """A host that has joined the cluster. `own_disks`: folder -> size (such as 50m) of an empty disk that lies there
        on this host alone. `python`: an interpreter with Ray, whose installation the host uses."""
        place = len(self.hosts) + 2
        address, link = f"{self.network}.{place}", f"{self.bridge}h{place}"
        disks = [
            f"mount -t tmpfs -o size={size} none {shlex.quote(str(path))}" for path, size in (own_disks or {}).items()
        ]
        start = [python, "-m", "ray.scripts.scripts", "start", f"--address={self.address}", "--block",
                 f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--resources={json.dumps(dict(resources or {}))}",
                 "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
        script = "\n".join(
            [*disks, "ip link set lo up", "echo ready", "read network", f"hostname {name}", f"exec {shlex.join(start)}"]
        )
        process = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        host = Host(name, address, process)
        self.hosts.append(host)  # before it has joined: it is ended also where it does not
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        inside = host.inside = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(inside))
        _ip("link", "set", link, "master", self.bridge, "up")
        for command in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            subprocess.run(["nsenter", "-t", str(inside), "-n", "ip", *command], check=True)
        process.stdin.write(b"\n")
        process.stdin.close()
        _wait_for_ray(process, f"host {name}")
        host.node_id = next(node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == address)
        return host


@contextmanager
def cluster(cpus: int = 0, environment: Mapping[str, str] | None = None) -> Iterator[Hosts]:
    """A head with so many CPUs, to which this process is connected; all its hosts are gone afterwards."""
    number = _own_bridge()
    bridge, network = f"seg{number}", f"10.77.{number}"
    port = 20000 + number  # Ray listens on all addresses of the machine
    # Nodes that do not answer are given up soon, or tests would wait for a minute.
    own = {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        **(environment or {}),
    }
    head = None
    made = None
    try:
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
             f"--node-ip-address={network}.1", f"--num-cpus={cpus}", "--include-dashboard=false",
             "--object-store-memory=200000000", "--disable-usage-stats", *own_ports()],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **own}, start_new_session=True,
        )  # fmt: skip
        _wait_for_ray(head, "the head")
        with connected(f"{network}.1:{port}"):
            made = Hosts(f"{network}.1:{port}", bridge, network, own)
            yield made
    finally:
        for host in made.hosts if made else []:
            host.process.kill()
            host.process.wait()
        if head:
            _end(head)
        _ip("link", "del", bridge)
        for host in made.hosts if made else []:  # gone with its host, unless something holds on to that
            subprocess.run(
                ["ip", "link", "del", f"{bridge}h{host.address.rpartition('.')[2]}"], capture_output=True, check=False
            )


def own_ports() -> list[str]:
    """Options for a head beside others on this machine: Ray gives some of a head's processes a fixed port, and the head
    ends with any of them that finds it taken."""
    names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
             "runtime-env-agent-port")  # fmt: skip
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in names]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        own = [f"--{name}={probe.getsockname()[1]}" for name, probe in zip(names, probes, strict=True)]
    return [*own, "--min-worker-port=0", "--max-worker-port=0"]  # 0: the system chooses


def _wait_for_ray(process: subprocess.Popen[bytes], who: str) -> None:
    assert process.stdout is not None
    said = b""
    for line in process.stdout:
        said += line
        if b"Ray runtime started" in line:
            return
    raise RuntimeError(f"Ray did not start on {who}: {said.decode()}")


def _own_bridge() -> int:
    """The number of a bridge that this process has made; making one is what takes a number."""
    for number in _NETWORKS:
        command = ["ip", "link", "add", f"seg{number}", "type", "bridge"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and _is_free(20000 + number):
            return number
        if done.returncode == 0:
            _ip("link", "del", f"seg{number}")
        elif "exists" not in done.stderr:
            raise RuntimeError(f"a bridge cannot be made: {done.stderr}")
    raise RuntimeError(f"all {len(_NETWORKS)} networks are taken; `ip link` lists them as seg0 and so on")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _end(head: subprocess.Popen[bytes]) -> None:
    """Ends the head, whose processes share this machine's process ids: all that descend from the one we started."""
    import psutil

    family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    head.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        process.kill()
    head.wait()


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))
