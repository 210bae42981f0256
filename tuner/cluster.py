"""Where Ray runs: connecting to it, what a trial holds there, running a function on a worker."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

_HEAD = "node:__internal_head__"
"""the resource that the head alone has"""

_SECONDS_BETWEEN_COUNTS = 5.0
"""so long a node that has joined may wait for its first trial"""

_SECONDS_TO_ANSWER = 10.0
"""so long a cluster may take to accept a connection"""


@dataclass(frozen=True)
class Resources:
    """What a trial holds, and how many run at once. None: as many as fit."""

    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    concurrent: int | None = None

    @property
    def devices(self) -> float:
        """What a trial is charged for: GPUs, or CPUs where it has none."""
        return self.gpus_per_trial or self.cpus_per_trial


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A Ray that this process is connected to: already, at `address`, or a local one of its own. ValueError if there
    is none at `address`."""
    if ray.is_initialized():
        yield
        return
    if address:
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray speaks of things that this search does not use: its own results, its snapshots, its token.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # counts trials that went on after their worker died
    if address:
        # Ray would use the user's token with `auto` alone, and be refused elsewhere; RAY_AUTH_MODE still decides.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with nullcontext() if address else _on_loopback():
        try:
            ray.init(
                address=address or "local",  # never by chance the cluster of somebody else on this machine
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except ConnectionError as error:
            if not address:
                raise
            raise _no_cluster(address, error) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile listens on 127.0.0.1 alone, as Ray does by itself on macOS, and not on all
    addresses of this machine. Its processes read the variable; in this one Ray has read it already."""
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        del os.environ[variable]
        if before[0] is not None:
            os.environ[variable] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


def _check_answers(address: str) -> None:
    """ValueError if nothing listens at host:port: Ray would ask for two minutes, then end this process."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):  # auto, or what Ray itself refuses
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"--address must be that of a running Ray cluster, found none at {address} ({error}); start one with "
        "`ray start --head`, or leave --address out for a Ray of this search's own"
    )


def default_resources(cpus: float | None, gpus: float | None, concurrent: int | None) -> Resources:
    """What was asked for; else a whole GPU a trial where the cluster has some or could have, with its share of the
    node's cores, or one CPU. ValueError if no node can hold a trial, nor one that an autoscaler could start."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes += [kind.resources for kind in _startable()]
    gpus = gpus if gpus is not None else float(any(node.get("GPU") for node in nodes))
    shares = [node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU")] if gpus >= 1 else []
    found = Resources(cpus if cpus is not None else float(max(1, min(shares, default=1))), gpus, concurrent)
    asked = _asked(found)
    if not any(_times(node, asked) for node in nodes):
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
        apart = "" if any(asked[name] > most[name] for name in asked) else " on different nodes"
        short = [name for name in asked if apart or asked[name] > most[name]]
        wanted = " and ".join(f"{asked[name]:g} {name}" for name in short)
        largest = " and ".join(f"{most[name]:g}" for name in short)
        raise ValueError(
            f"a trial must fit one node of the cluster: it asks for {wanted}, found at most {largest}{apart}; "
            f"lower --{short[0].lower()}s-per-trial"
        )
    return found


def fit_at_once(resources: Resources) -> tuple[int, str]:
    """How many trials the cluster as it is runs at once, and what bounds them."""
    there = ray.cluster_resources()
    asked = {name: wanted for name, wanted in _asked(resources).items() if wanted}
    count, name = min((int(there.get(name, 0) // wanted), name) for name, wanted in asked.items())
    return count, f"{asked[name]:g} {name} a trial, {there.get(name, 0):g} there"


class Slots:
    """How many trials are at a cluster at once: as many as its nodes hold, which may join and leave, or as many as they
    would with all those that its autoscaler may start."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._with_autoscaler = with_autoscaler(resources)
        self._fit, self._counted = 0, -math.inf

    def count(self) -> int:
        """At least 1: without a node, a trial waits for one."""
        if self._resources.concurrent:
            return self._resources.concurrent
        if time.monotonic() - self._counted > _SECONDS_BETWEEN_COUNTS:
            self._fit, self._counted = fit_at_once(self._resources)[0], time.monotonic()
        return max(1, self._fit, self._with_autoscaler)


def with_autoscaler(resources: Resources) -> int:
    """How many trials at once the head and all nodes that the autoscaler may start would run; 0 without one."""
    kinds = _startable()
    if not kinds:
        return 0
    asked = _asked(resources)
    heads = [node["Resources"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    trials = sum(_times(head, asked) for head in heads)
    room = kinds[0].most_in_all
    for kind in sorted(kinds, key=lambda kind: _times(kind.resources, asked), reverse=True):
        nodes = min(room, kind.most)
        room -= nodes
        trials += nodes * _times(kind.resources, asked)
    return trials


def _asked(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}


def _times(node: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """How many trials a node holds."""
    return int(min(node.get(name, 0) // wanted for name, wanted in asked.items() if wanted))


@dataclass(frozen=True)
class _Kind:
    """A kind of node that an autoscaler may start."""

    name: str
    resources: dict[str, float]
    most: int
    most_in_all: int
    """of all kinds together"""


def _startable() -> list[_Kind]:
    """What the autoscaler of this cluster may start. Ray 2.60 tells no driver; but drivers run on the head, and so does
    the autoscaler, whose command line names its configuration."""
    mine = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_text().split("\0")
        except (OSError, UnicodeDecodeError):  # it has ended, or is none of ours
            continue
        given = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        if mine in words and given:
            return _kinds(Path(given[0]).expanduser())
    return []


def _kinds(file: Path) -> list[_Kind]:
    """The kinds of workers of an autoscaler's configuration."""
    found = yaml.safe_load(file.read_text())
    most = found.get("max_workers", 0)
    return [
        _Kind(name, kind.get("resources", {}), kind.get("max_workers", most), most)
        for name, kind in found["available_node_types"].items()
        if name != found["head_node_type"]
    ]


def run_on_worker(function: Callable[..., Any], resources: Resources, *arguments: Any) -> Any:
    """Calls `function(*arguments)` on a worker with a trial's resources; the head may have no GPU. Raises what the
    function raises."""
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial, max_retries=0)
    try:
        return ray.get(remote(function).remote(*arguments))
    except ray.exceptions.RayTaskError as error:  # its text is a traceback
        raise error.cause from error


def nodes_alive() -> set[str]:
    """The ids of the nodes that the cluster believes to be there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
