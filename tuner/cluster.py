"""Where Ray runs: connecting to it, what a trial holds there, running a function on a worker."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from tuner.shares import cores_each, most_on_a_gpu, part_of_gpu, places

_SECONDS_TO_ANSWER = 10.0
"""so long a cluster may take to accept a connection"""


@dataclass(frozen=True)
class Resources:
    """What a trial holds, and how many run at once. None: as many as fit."""

    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    concurrent: int | None = None
    cpu_trials: int = 0
    """how many run at once beside these with the same CPUs and no GPU"""

    @property
    def devices(self) -> float:
        """What a trial is charged for: GPUs, or CPUs where no trial has one."""
        return self.devices_of(self.gpus_per_trial)

    def devices_of(self, gpus: float) -> float:
        """The same of a trial that holds so many GPUs. Beside trials on GPUs, one without costs nothing: device time
        and money count GPUs there, which cores come with."""
        return gpus if self.gpus_per_trial else self.cpus_per_trial


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


def default_resources(cpus: float | None, gpus: float | None, concurrent: int | None, cpu_trials: int = 0) -> Resources:
    """What was asked for; else a whole GPU a trial where the cluster has some, with its part of the node's cores (less
    what trials without a GPU need), or one CPU. ValueError if no node can hold a trial."""
    nodes = _nodes()
    gpus = gpus if gpus is not None else float(any(node.get("GPU") for node in nodes))
    if cpus is None:
        cpus = _cores_each(nodes, gpus, cpu_trials)
    found = Resources(cpus, gpus, concurrent, cpu_trials)
    asked = {"CPU": found.cpus_per_trial, "GPU": found.gpus_per_trial}
    if not any(all(node.get(name, 0) >= wanted for name, wanted in asked.items()) for node in nodes):
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
        apart = "" if any(asked[name] > most[name] for name in asked) else " on different nodes"
        short = [name for name in asked if apart or asked[name] > most[name]]
        wanted = " and ".join(f"{asked[name]:g} {name}" for name in short)
        largest = " and ".join(f"{most[name]:g}" for name in short)
        raise ValueError(
            f"a trial must fit one node of the cluster: it asks for {wanted}, found at most {largest}{apart}; "
            f"lower --{short[0].lower()}s-per-trial"
        )
    if cpu_trials and not gpus:
        raise ValueError(
            f"trials without a GPU run beside those that have one, found --cpu-trials {cpu_trials} where no trial has "
            "one; leave it out, all trials run on CPU cores"
        )
    if (room := _room_beside(nodes, cpus, gpus)) < cpu_trials:
        raise ValueError(
            f"beside the trials on GPUs, which hold {cpus:g} CPU each, there must be room for {cpu_trials} trials of "
            f"as many without, found room for {room}; lower --cpu-trials, --cpus-per-trial or the number of trials on "
            "a GPU"
        )
    return found


def sharing_gpus(
    trial_bytes: int, gpu_bytes: int, cpus: float | None, at_once: int | None, concurrent: int | None, cpu_trials: int
) -> Resources:
    """Trials side by side on each GPU, as many as its memory and the node's cores hold, and no more than it takes to
    have so many at once."""
    holders = [node for node in _nodes() if node.get("GPU")]
    spread = math.ceil(at_once / sum(node["GPU"] for node in holders)) if at_once else None
    most = min(most_on_a_gpu(node.get("CPU", 0), node["GPU"], cpus) for node in holders)
    for count in range(min(most, spread or most), 1, -1):  # fewer where trials without a GPU need cores too
        with suppress(ValueError):
            return default_resources(cpus, part_of_gpu(trial_bytes, gpu_bytes, count), concurrent, cpu_trials)
    return default_resources(cpus, 1.0, concurrent, cpu_trials)


def _nodes() -> list[dict[str, float]]:
    """What each node that is there has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cores_each(nodes: list[dict[str, float]], gpus: float, cpu_trials: int) -> float:
    holders = [node for node in nodes if gpus and places(node.get("GPU", 0), gpus)]
    shares = [cores_each(node.get("CPU", 0), node["GPU"], gpus) for node in holders]
    most = min(shares, default=1.0)
    return next((float(n) for n in range(int(most), 1, -1) if _room_beside(nodes, n, gpus) >= cpu_trials), 1.0)


def _room_beside(nodes: list[dict[str, float]], cpus: float, gpus: float) -> int:
    """How many trials without a GPU fit beside as many as fit with one."""
    room = 0
    for node in nodes:
        cores = node.get("CPU", 0)
        on_gpus = places(node.get("GPU", 0), gpus) if gpus else 0
        room += int(max(0.0, cores - min(on_gpus, cores // cpus) * cpus) // cpus)
    return room


def fit_at_once(resources: Resources) -> tuple[int, str]:
    """How many trials the cluster as it is runs at once, and what bounds them."""
    there = ray.cluster_resources()
    cpus, gpus = resources.cpus_per_trial, resources.gpus_per_trial
    counts = [(int(there.get("CPU", 0) // cpus), "CPU", cpus)]
    if gpus:
        counts.append((sum(places(node.get("GPU", 0), gpus) for node in _nodes()), "GPU", gpus))
    count, name, wanted = min(counts)
    return count, f"{wanted:g} {name} a trial, {there.get(name, 0):g} there"


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
