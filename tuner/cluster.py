"""Where Ray runs: connecting to it, what a trial holds there, running a function on a worker."""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import yaml
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.ray_logging import stdout_deduplicator

from model.files import FULL_DISK
from tuner.records import NodeUnfit, SearchFailed
from tuner.shares import cores_each, most_on_a_gpu, part_of_gpu, places

logger = logging.getLogger(__name__)

_SECONDS_TO_ANSWER = 10.0
"""so long a cluster may take to accept a connection"""

_SECONDS_BETWEEN_LOOKS_AT_HEAD = 3.0
_SECONDS_WITHOUT_HEAD = 40.0
"""Ray ends a driver after 60 s."""

_TRIES = 3
"""so often a function is called whose nodes or processes die under it"""

_UNFIT_IN_A_ROW = 3
"""After so many unfit nodes, or two for the same reason, those that the autoscaler would start next are no better."""

_SECONDS_BETWEEN_LOOKS_AT_NODES = 10.0
"""while a function waits for a node, or runs"""

_NODE_DIED = re.compile("Raylet is terminated|has been marked dead")
"""what Ray prints on standard output of each node that dies, with the end of its log"""

_GPU_KIND = "accelerator_type:"
"""how the resource is named that says of which kind a node's GPUs are"""

_HEAD = "node:__internal_head__"
"""the resource that the head alone has"""

NODE_LABEL = "ray.io/node-id"
"""what Ray labels every node with"""


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
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of trials that Tune forgets when it stops them
    # Ray speaks of things that this search does not use: its own results, its snapshots, its token.
    logging.getLogger("ray").setLevel(logging.ERROR)
    stdout_deduplicator.skip_re = _NODE_DIED
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
        except RuntimeError as error:
            if "Version mismatch" not in str(error):
                raise
            raise _other_version(address, error) from error
        over = threading.Event()
        if address:
            threading.Thread(target=_watch_head, args=[address, over], name="head", daemon=True).start()
        try:
            yield
        finally:
            over.set()
            end_ray()


def end_ray() -> None:
    """Disconnects, and ends a local Ray. Ray ends this process where another thread lets one of its references go
    meanwhile, so garbage goes before, and none is looked for until it is over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
    finally:
        try:
            ray.shutdown()
        finally:
            if was_enabled:
                gc.enable()


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


def _watch_head(named: str, over: threading.Event) -> None:
    """Ends this process, with a message, when the head has been gone for long: calls to Ray would block, until Ray
    kills the process with a message about its own parts. What a search has done is kept as after any kill."""
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    answered = time.monotonic()
    while not over.wait(_SECONDS_BETWEEN_LOOKS_AT_HEAD):
        with suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()
            answered = time.monotonic()
        if time.monotonic() - answered > _SECONDS_WITHOUT_HEAD and not over.is_set():
            logger.error(
                "the head of the Ray cluster at %s has not answered for %.0f s: it is gone, or cut off from here; what "
                "is done is kept, and `tuner resume RUN` goes on when a head is there again",
                named, _SECONDS_WITHOUT_HEAD,
            )  # fmt: skip
            os._exit(1)


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
        "`ray start --head`, or say --address local for a Ray of this command's own"
    )


def _other_version(address: str | None, error: Exception) -> ValueError:
    """Ray's own message has lines for the cluster and for this process, each "Ray: 2.60.0" and "Python: 3.11.2"."""
    found = " and ".join(
        f"Ray {version} with Python {python}"
        for version, python in zip(
            re.findall(r"Ray: (\S+)", str(error)), re.findall(r"Python: (\S+)", str(error)), strict=False
        )
    )
    return ValueError(
        f"the cluster at {address} must run the Ray and the Python of this process, found {found}, in this order; "
        "install the same versions on both sides"
    )


def default_resources(cpus: float | None, gpus: float | None, concurrent: int | None, cpu_trials: int = 0) -> Resources:
    """What was asked for; else a whole GPU a trial where the cluster has some, with its part of the node's cores (less
    what trials without a GPU need), or one CPU. ValueError if no node can hold a trial, nor one that is to come."""
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
    have so many at once. All GPUs count as one like that on which a trial was measured."""
    holders = [node for node in _nodes() if node.get("GPU")]
    kinds = sorted({name.removeprefix(_GPU_KIND) for node in holders for name in node if name.startswith(_GPU_KIND)})
    if len(kinds) > 1:
        logger.warning(
            "the cluster has GPUs of several kinds, %s, and a trial's share is measured on one of %s: on a smaller one "
            "it may not hold a trial; say --gpus-per-trial, or leave out the small ones",
            ", ".join(kinds), f"{gpu_bytes / 2**30:.0f} GiB",
        )  # fmt: skip
    spread = math.ceil(at_once / sum(node["GPU"] for node in holders)) if at_once else None
    most = min(most_on_a_gpu(node.get("CPU", 0), node["GPU"], cpus) for node in holders)
    for count in range(min(most, spread or most), 1, -1):  # fewer where trials without a GPU need cores too
        with suppress(ValueError):
            return default_resources(cpus, part_of_gpu(trial_bytes, gpu_bytes, count), concurrent, cpu_trials)
    return default_resources(cpus, 1.0, concurrent, cpu_trials)


def _nodes() -> list[dict[str, float]]:
    """What each node has that is there, or that the autoscaler may still start."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return there + _to_come(there)


def _to_come(there: list[dict[str, float]]) -> list[dict[str, float]]:
    """What each node has that the autoscaler may still start."""
    kinds, most = _startable(ray.get_runtime_context().gcs_address)
    workers = [node for node in there if _HEAD not in node]
    to_come = [
        resources for resources, count in kinds for _ in range(count - sum(_alike(node, resources) for node in workers))
    ]
    return to_come[: max(0, most - len(workers))]


def better_may_come(resources: Resources, reasons: Sequence[str]) -> bool:
    """Where all nodes that could hold a trial have turned out unfit, one after another and why: whether the autoscaler
    may start another one, which may be fit."""
    if len(reasons) >= _UNFIT_IN_A_ROW or len(set(reasons)) < len(reasons):
        return False
    wanted = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    to_come = _to_come([node["Resources"] for node in ray.nodes() if node["Alive"]])
    return any(all(node.get(name, 0) >= n for name, n in wanted.items()) for node in to_come)


def _alike(node: dict[str, float], kind: dict[str, float]) -> bool:
    """Whether a node may be of a kind: Ray does not label nodes with it."""
    return all(node.get(name, 0) == kind.get(name, 0) for name in ("CPU", "GPU"))


@lru_cache
def _startable(address: str) -> tuple[list[tuple[dict[str, float], int]], int]:
    """What each kind of node has that the cluster's autoscaler may start, and how many of it, those with GPUs first;
    how many in all. Ray 2.60 tells no driver; but drivers run on the head, and so does the autoscaler, whose command
    line names its configuration."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_text().split("\0")
        except (OSError, UnicodeDecodeError):  # it has ended, or is none of ours
            continue
        named = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        if named and f"--gcs-address={address}" in words:
            config = yaml.safe_load(Path(named[0]).expanduser().read_text())
            kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
            most = config["max_workers"]
            found = [(kind["resources"], kind.get("max_workers", most)) for kind in kinds]
            return sorted(found, key=lambda kind: kind[0].get("GPU", 0), reverse=True), most
    return [], 0


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
    """How many trials the cluster runs at once, with the nodes that its autoscaler may start, and what bounds them."""
    nodes = _nodes()
    cpus, gpus = resources.cpus_per_trial, resources.gpus_per_trial
    by_node = {("CPU", cpus): [int(node.get("CPU", 0) // cpus) for node in nodes]}
    if gpus:
        by_node["GPU", gpus] = [places(node.get("GPU", 0), gpus) for node in nodes]
    count = sum(map(min, zip(*by_node.values(), strict=True)))
    name, wanted = min(by_node, key=lambda held: sum(by_node[held]))
    return count, f"{wanted:g} {name} a trial, {sum(node.get(name, 0) for node in nodes):g} there"


def run_on_worker(function: Callable[..., Any], resources: Resources, *arguments: Any) -> Any:
    """Calls `function(*arguments)` on a worker with a trial's resources; the head may have no GPU. Raises what the
    function raises. Where the node or the process dies under it, or the node is unfit, it is called again elsewhere;
    only deaths of the process on nodes that stay are the function's own doing."""
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial, max_retries=0)(_call)
    unfit: dict[str, Exception] = {}
    deaths: list[set[str]] = []
    while True:
        there = nodes_alive()
        running = remote.options(label_selector=elsewhere(unfit)).remote(function, arguments)
        try:
            _wait_for(running, function.__name__, resources, unfit)
            found = ray.get(running)
        except ray.exceptions.RayTaskError as error:  # its text is a traceback
            raise error.cause from error
        except ray.exceptions.RayError as error:  # not the function's doing
            if isinstance(error, ray.exceptions.NodeDiedError):
                continue
            # A process is known to be gone before its node is.
            stay = nodes_that_stay()
            deaths = [nodes for nodes in [*deaths, there] if nodes <= stay]
            if len(deaths) == _TRIES:
                raise SearchFailed(
                    f"the process of {function.__name__} died {_TRIES} times, memory may have run out "
                    f"({type(error).__name__}: {error})"
                ) from error
        except BaseException:  # Ctrl-C
            ray.cancel(running, force=True)
            raise
        else:
            if not isinstance(found, _Unfit):
                return found
            unfit[found.node] = found.error
            _raise_if_all_unfit(resources, unfit)
            logger.warning("%s", takes_no_more(found.node, str(found.error)))


def _wait_for(running: Any, name: str, resources: Resources, unfit: dict[str, Exception]) -> None:
    """Returns when a call has ended; says so where no node is there that could take it."""
    is_said = False
    while not ray.wait([running], timeout=_SECONDS_BETWEEN_LOOKS_AT_NODES)[0]:
        if able_nodes(resources) - unfit.keys() or draining():  # a node that is to go may have it yet
            continue
        _raise_if_all_unfit(resources, unfit)
        if not is_said:
            logger.warning("no node is there that could take %s: waiting for one", name)
            is_said = True


def _raise_if_all_unfit(resources: Resources, unfit: dict[str, Exception]) -> None:
    """What the last one said, where the nodes that are there are unfit and no better one is to come."""
    able = able_nodes(resources)
    reasons = [str(error) for error in unfit.values()]
    if unfit.keys() & able and not able - unfit.keys() and not better_may_come(resources, reasons):
        raise list(unfit.values())[-1]


@dataclass(frozen=True)
class _Unfit:
    """The answer of a node that is unfit."""

    node: str
    error: Exception


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """On the worker: what a function answers, or that the node is to blame for what it raised."""
    try:
        return function(*arguments)
    except Exception as error:
        if full_disk(error) is None and not isinstance(error, NodeUnfit):
            raise
        return _Unfit(ray.get_runtime_context().get_node_id(), error)


def full_disk(error: BaseException) -> int | None:
    """What a disk says that is full, or whose quota or limit is reached, as an error number; None if it is not that."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL_DISK else None
    # torch and safetensors write without Python, and tell in words.
    said = {os.strerror(number): number for number in FULL_DISK} | {"PytorchStreamWriter failed": errno.ENOSPC}
    return next((number for words, number in said.items() if words in str(error)), None)


def elsewhere(unfit: Collection[str]) -> dict[str, str]:
    """The label selector of all nodes but some."""
    return {NODE_LABEL: f"!in({','.join(sorted(unfit))})"} if unfit else {}


def kept_for_gpus(resources: Resources) -> set[str]:
    """The nodes with GPUs, where the others have room for all trials without: on these, they would hold cores that
    trials on GPUs then lack."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = {node["NodeID"] for node in nodes if node["Resources"].get("GPU")}
    cores = [node["Resources"].get("CPU", 0) for node in nodes if node["NodeID"] not in with_gpus]
    room = sum(int(count // resources.cpus_per_trial) for count in cores)
    return with_gpus if room >= resources.cpu_trials else set()


def takes_no_more(node: str, reason: str) -> str:
    """The message to a node that is unfit."""
    return (
        f"node {name_of(node)} takes no more trials in this session: {reason}; mend that and start Ray there anew, or "
        "take the node out of the cluster"
    )


def able_nodes(resources: Resources) -> set[str]:
    """The ids of the nodes that could hold a trial, if nothing else ran there, and that stay."""
    wanted = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    stay = nodes_that_stay()
    return {
        node["NodeID"]
        for node in ray.nodes()
        if node["NodeID"] in stay and all(node["Resources"].get(name, 0) >= n for name, n in wanted.items())
    }


def nodes_alive() -> set[str]:
    """The ids of the nodes that the cluster believes to be there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes_that_stay() -> set[str]:
    """Those of them that have no notice to go."""
    return nodes_alive() - set(draining())


def draining() -> dict[str, float]:
    """The nodes with a notice to go: in how many seconds each, 0 where that is not known."""
    now = time.time()
    found = ray._private.state.state.get_draining_nodes()
    return {node: max(0.0, deadline_ms / 1000 - now) for node, deadline_ms in found.items()}


def name_of(node: str) -> str:
    """A node as a user knows it."""
    for found in ray.nodes():
        if found["NodeID"] == node:
            host, address = found["NodeManagerHostname"], found["NodeManagerAddress"]
            return f"{host} ({address})"
    return node


def node_of(actor: Any) -> str | None:
    """The node of an actor's process; None where that is not known."""
    found = ray._private.state.actors(actor._actor_id.hex()) if actor else {}
    return found.get("Address", {}).get("NodeID") or None
