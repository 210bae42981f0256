"""Whether the nodes of a cluster are fit for a search, and made ready for it: versions, storage, data, the cache.

All nodes that can hold a trial are looked at before the first one. A node that joins later is looked at by the first
trial that comes to it, which also makes it ready.
"""

from __future__ import annotations

import logging
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from model.files import FULL_DISK
from model.inspection import digest
from model.sample import Sample
from tuner import cluster, remote
from tuner.cluster import Resources
from tuner.datasets import SYNTHETIC, DataFailed, Source
from tuner.records import NodeUnfit

logger = logging.getLogger(__name__)

PACKAGES = ("segdec-tuner", "ray", "torch")
"""what must be of one release on all nodes; Optuna and W&B are the driver's alone"""

_SECONDS_TO_ANSWER = 28.0
"""a node may have to start a process first; a storage that does not answer is given up before that"""

_SECONDS_BETWEEN_WORDS = 0.5

_HASHED_FILES = 8
_LOOKED_AT_AT_ONCE = 32
_MARK = ".mark"

_checked: set[str] = set()
"""marks of sessions for which this process has looked at its node"""


@dataclass(frozen=True)
class Needs:
    """What a session asks of a node."""

    versions: Mapping[str, str]
    """the driver's"""
    source: Source
    height: int
    width: int
    """px of the network's input"""
    place: str | None
    """the address of the folder in which checkpoints lie; None where there is no node but the driver's"""
    mark: str
    """what the driver wrote there for this session"""

    def make_ready(self, *splits: list[Sample]) -> str | None:
        """Looks at this node once a process, and builds its cache of these splits unless it has it; what was done, in
        words. NodeUnfit if the node cannot run trials."""
        if self.place is not None and self.mark not in _checked:
            node = ray.get_runtime_context().get_node_id()
            problems = _version_problems(self.versions, versions()) or _problems_here(self, node, *splits)
            if problems:
                raise NodeUnfit("; ".join(problems))
        _checked.add(self.mark)
        started = time.monotonic()
        if not (total := max((total for _, total in _build_here(self, *splits)), default=0)):
            return None
        return (
            f"node {socket.gethostname()} ({ray.util.get_node_ip_address()}) decoded {total:,} images in "
            f"{time.monotonic() - started:.0f} s"
        )


def needs(source: Source, height: int, width: int, place: str, address: str | None) -> Needs:
    """What nodes must have for a session of a run whose checkpoints lie in the folder `place`; leaves a mark there.

    Nothing but the data where Ray is this process's own: then its only node is here.
    """
    mark = secrets.token_hex(16)
    if address is None and len(_alive()) == 1:
        return Needs(versions(), source, height, width, None, mark)
    remote.Folder(place).write(_MARK, mark.encode())
    return Needs(versions(), source, height, width, place, mark)


def versions() -> dict[str, str]:
    """Of Python and of what nodes must have, here."""
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def check(needs: Needs, samples: list[Sample], resources: Resources) -> None:
    """ValueError that names every node that is not fit for trials with these samples, and why; within a minute."""
    if needs.place is None:
        return
    able = _able(resources)
    heads = {node["NodeID"]: node for node in _alive().values() if "node:__internal_head__" in node["Resources"]}
    looked_at = heads | able
    problems: dict[str, list[str]] = {}
    for node, answer in _ask(_look(), looked_at, PACKAGES).items():
        found, trouble = answer if isinstance(answer, tuple) else ({}, answer)
        problems[node] = [trouble] if trouble else _version_problems(needs.versions, found)
    sound = {node: able[node] for node in able if node in problems and not problems[node]}
    here = ray.put(samples)
    place = remote.Folder(needs.place)
    answers = _ask(_problems_on_node, sound, needs, here)  # not of nodes that have gone meanwhile
    for node, answer in answers.items():
        problems[node] = [answer] if isinstance(answer, str) else answer
    for node, problem in _unseen(place, [node for node in answers if not problems[node]]).items():
        problems[node] = [problem]
    with ThreadPoolExecutor(_LOOKED_AT_AT_ONCE) as pool, suppress(OSError):
        list(pool.map(lambda name: place.remove([name]), [f"{_MARK}-{node}" for node in sound]))
        place.remove([_MARK] * any(problems.values()))
    _raise(problems, looked_at)


def prepare(needs: Needs, splits: list[list[Sample]], resources: Resources, console: Console | None) -> None:
    """Builds the cache of these splits on every node that can hold a trial, all at once. ValueError that names the
    nodes on which that failed."""
    able = _able(resources)
    problems: dict[str, list[str]] = {}
    with _shown(console) as show:
        if needs.place is None:
            try:
                for done, total in _build_here(needs, *splits):
                    show("this machine", done, total)
            except NodeUnfit as error:
                raise ValueError(str(error)) from error
            return
        task = ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")(_build_here)
        samples = [ray.put(split) for split in splits]
        building = {task.options(scheduling_strategy=only_on(node)).remote(needs, *samples): node for node in able}
        while building:
            ready, _ = ray.wait(list(building), num_returns=1)
            node = building[ready[0]]
            try:
                done, total = ray.get(next(ready[0]))
                show(able[node]["NodeManagerAddress"], done, total)
                continue
            except StopIteration:
                pass
            except ray.exceptions.RayError as error:
                problems[node] = [trouble] if (trouble := _trouble(node, error)) else []
            del building[ready[0]]
    _raise(problems, able)


def _raise(problems: Mapping[str, list[str]], nodes: Mapping[str, Any]) -> None:
    """ValueError with all problems of all nodes, if there are any."""
    if not (bad := {node: found for node, found in problems.items() if found}):
        return
    lines = [f"{_name(nodes[node])}: {problem}" for node, found in bad.items() for problem in found]
    raise ValueError(
        "\n  ".join(
            [f"every node must be fit for the search, found {len(bad)} of {len(nodes)} nodes that are not:", *lines]
        )
    )


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _alive() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _able(resources: Resources) -> dict[str, dict[str, Any]]:
    """The nodes that can hold a trial and stay, by their ids."""
    able = cluster.able_nodes(resources)
    if resources.cpu_trials:
        able |= cluster.able_nodes(replace(resources, gpus_per_trial=0.0))
    return {node: found for node, found in _alive().items() if node in able}


def only_on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _ask(function: Callable[..., Any], nodes: Mapping[str, Any], *arguments: Any) -> dict[str, Any]:
    """What the function returns on each node, or in words why it does not; without the nodes that are gone."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)  # no CPUs: a node that is busy answers too
    asked = {task.options(scheduling_strategy=only_on(node)).remote(*arguments): node for node in nodes}
    if not asked:
        return {}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS_TO_ANSWER)
    answers: dict[str, Any] = {}
    for reference in ready:
        try:
            answers[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            if trouble := _trouble(asked[reference], error):
                answers[asked[reference]] = trouble
    for reference in late:
        ray.cancel(reference, force=True)
        if asked[reference] in _alive():
            answers[asked[reference]] = (
                f"does not answer within {_SECONDS_TO_ANSWER:g} s; see that it can be reached, or end it"
            )
    return answers


def _trouble(node: str, error: Exception) -> str | None:
    """What went wrong on a node, in words; None if it is gone, which is no reason to stop."""
    if node not in _alive():
        logger.warning("node %s left the cluster before the first trial", node)
        return None
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, NodeUnfit):
        return str(cause)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1]}"


def _look() -> Callable[..., Any]:
    """A function that needs nothing of this project where it runs."""

    def look(packages: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
        import platform
        from importlib import metadata

        found = {"Python": platform.python_version()}
        for name in packages:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "none"
        try:
            import tuner.nodes  # noqa: F401
        except Exception as error:
            return found, f"cannot import this project ({type(error).__name__}: {error}); install segdec-tuner there"
        return found, None

    return look


def _version_problems(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Python must agree in its minor version, which is what pickles depend on; torch in its release, for the head may
    have a build without CUDA; the others wholly."""
    cut: dict[str, Callable[[str], str]] = {
        "Python": lambda version: ".".join(version.split(".")[:2]),
        "torch": lambda version: version.split("+")[0],
    }
    bad = [name for name in wanted if cut.get(name, str)(found.get(name, "none")) != cut.get(name, str)(wanted[name])]
    problems = [
        f"{name} must be {wanted[name]} as the driver's is, found {found.get(name, 'none')}; install the same release "
        "on all nodes"
        for name in bad
    ]
    if "Python" not in bad and found.get("Python") != wanted["Python"]:
        logger.warning("a node has Python %s, the driver %s", found.get("Python"), wanted["Python"])
    return problems


def _problems_on_node(needs: Needs, samples: list[Sample]) -> list[str]:
    """The rest, asked for by the driver, which then looks for the file that is left for it."""
    node = ray.get_runtime_context().get_node_id()
    problems = _problems_here(needs, node, samples)
    if not problems and needs.place is not None:
        remote.Folder(needs.place).write(f"{_MARK}-{node}", b"seen")
    return problems


def _problems_here(needs: Needs, node: str, *splits: list[Sample]) -> list[str]:
    """What this node lacks of storage and data."""
    return [*_storage_problems(needs, node), *_data_problems(needs.source, [s for split in splits for s in split])]


def _storage_problems(needs: Needs, node: str) -> list[str]:
    if needs.place is None:
        return []
    place = remote.Folder(needs.place)
    try:
        if place.local and not place.local.is_dir():
            return [_apart(needs.place)]
        remote.check_token(needs.place, node)
        if place.read(_MARK) != needs.mark.encode():
            return [_apart(needs.place)]
    except FileNotFoundError:
        return [_apart(needs.place)]
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _unseen(place: remote.Folder, nodes: list[str]) -> dict[str, str]:
    """Why the driver does not see what these nodes say that they left there, for each of which that is so."""

    def problem(node: str) -> str | None:
        try:
            return None if place.read(f"{_MARK}-{node}") == b"seen" else _apart(place.address)
        except FileNotFoundError:
            return _apart(place.address)
        except OSError as error:
            return f"wrote there, and the driver cannot read it ({error}); see that the driver's host can reach it"

    with ThreadPoolExecutor(_LOOKED_AT_AT_ONCE) as pool:  # one after another, hundreds of nodes would take minutes
        return {node: found for node, found in zip(nodes, pool.map(problem, nodes), strict=True) if found}


def _apart(place: str) -> str:
    """The node and the driver see different things in one place."""
    if remote.Folder(place).local:
        return (
            f"must share the folder {place} with the driver, where checkpoints go, and has another one or none; put "
            "--runs on a mount that all nodes share, or say --storage"
        )
    return f"must find in {place} what the driver wrote there, and does not; see that both mean the same storage"


def _data_problems(source: Source, samples: list[Sample]) -> list[str]:
    """Whether the files are there, and a few of them are the right ones; all are looked at when they are decoded."""
    files: dict[Path, str] = {}
    for sample in samples:
        files[sample.image] = sample.digest
        if isinstance(sample.mask, Path):
            files[sample.mask] = sample.mask_digest
    way_out = (
        "restore it there" if source.is_remote else "mount the data set there at the same path, or give its address"
    )
    try:
        source.make()
        if not source.is_remote:
            with ThreadPoolExecutor(_LOOKED_AT_AT_ONCE) as pool:  # a mount takes its time for each
                missing = [path for path, there in zip(files, pool.map(Path.exists, files), strict=True) if not there]
            if missing:
                return [
                    f"lacks {len(missing):,} of {len(files):,} files of the data, the first {missing[0]}; {way_out}"
                ]
        names = list(files)
        for path in names[:: max(1, len(names) // _HASHED_FILES)][:_HASHED_FILES]:
            if digest(path, source.read_once) != files[path]:
                return [f"has other bytes than the run was created with in {path}; {way_out}"]
    except (OSError, ValueError) as error:
        what = "make the synthetic data" if source.name == SYNTHETIC else "read the data"
        return [f"cannot {what} ({error}); {way_out}"]
    return []


def _build_here(needs: Needs, *splits: list[Sample]) -> Iterator[tuple[int, int]]:
    """Builds this node's cache of the splits; yields how many images of how many are decoded, now and then and at the
    end, or nothing where all is there. NodeUnfit if it cannot be built, DataFailed if the data cannot be read."""
    from model.data import build_cache, cache_root, is_cached

    size = needs.height, needs.width
    try:
        wanted = [split for split in splits if not is_cached(split, *size)]
        total, before, told = sum(map(len, wanted)), 0, 0.0
        for split in wanted:
            for done in build_cache(split, *size, read=needs.source.read):
                if time.monotonic() - told > _SECONDS_BETWEEN_WORDS:
                    told = time.monotonic()
                    yield before + done, total
            before += len(split)
        if total:
            yield total, total
    except DataFailed:  # not this folder's fault
        raise
    except OSError as error:
        way_out = "mend it, or leave the node out"
        if error.errno in FULL_DISK:
            way_out = "make room there, or set SEGDEC_TUNER_CACHE to a folder on a larger disk"
        raise NodeUnfit(f"cannot decode the images into {cache_root()} ({error}); {way_out}") from error
    except ValueError as error:
        raise NodeUnfit(f"cannot decode the images: {error}") from error


@contextmanager
def _shown(console: Console | None) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how far a node is: a line a node that changes on a terminal, or one at the end of each."""
    if console is None:
        yield lambda *_: None
        return
    if not console.is_terminal:

        def say(node: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{node}: decoded {total:,} images", highlight=False)

        yield say
        return
    lines: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as bars:

        def show(node: str, done: int, total: int) -> None:
            if node not in lines:
                lines[node] = bars.add_task("", total=total)
            bars.update(lines[node], completed=done, description=f"{node}: decoding {done:,} of {total:,}")

        yield show
