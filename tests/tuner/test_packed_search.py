"""A search whose trials share a GPU, on a Ray that believes in one: hosts are told to train on the CPU."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.state import actors

from model import layouts, splits, synthetic
from model.config import RunConfig
from tests.tuner.conftest import small_space
from tests.tuner.test_search import ScriptedTask, ends, scripted_space, stop_when_waiting
from tuner import pack_actors, records, search
from tuner.cluster import Resources, end_ray
from tuner.records import NodeUnfit
from tuner.sampler import SearchStudy
from tuner.space import Space
from tuner.tracking import Trackers
from tuner.trial import Task, TrialTask

CPU = torch.device("cpu")
SHARED = Resources(1, 0.33)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


@dataclass(frozen=True)
class Noted(ScriptedTask):
    """Notes which process trains an epoch. Where it is told to `end`, its process ends once, when another trial waits.
    A trial that is not in a host takes the CPU for the GPU."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        search.take_device = lambda gpus, threads: CPU  # in the worker, which unpickles it

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        own = f"{config.delta_cls_loss:g}"

        def noted(progress: dict[str, Any], folder: Path | None) -> None:
            if self.behaviour.get(own) == "end" and progress["epochs"] == 2 and not (self.folder / "died").exists():
                while not (self.folder / "waiting").exists():
                    time.sleep(0.02)
                (self.folder / "died").touch()
                os._exit(1)
            report(progress, folder)
            if folder is None:
                return
            with (self.folder / "processes.txt").open("a") as log:
                log.write(f"{own} {progress['epochs']} {os.getpid()}\n")

        super().run(config, device, resume, noted)


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    yield
    end_ray()


@pytest.fixture(autouse=True)
def hosts_on_cpu(monkeypatch) -> None:
    monkeypatch.setattr(pack_actors, "DEVICE", CPU)


def run(space: Space, task: Task, folder: Path, resources: Resources = SHARED, packed: bool = True) -> str:
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    study = SearchStudy(space, "abc123", folder / "study.journal")
    return search.run_trials(study, task, folder, space.budget, resources, Trackers([]), packed=packed)


def without_times(folder: Path) -> list[dict[str, Any]]:
    """By their trials: side by side they end in any order."""
    times = ("started", "ended", "seconds", "device_seconds", "traceback")
    found = [{name: value for name, value in r.items() if name not in times} for r in records.read(folder)]
    return sorted(found, key=lambda record: record["trial"])


def processes(folder: Path) -> dict[str, list[str]]:
    """Of each trial, by its delta: which process trained each epoch that was taken in."""
    found: dict[str, list[str]] = {}
    for line in (folder / "processes.txt").read_text().splitlines():
        delta, epoch, process = line.split()
        found.setdefault(delta, []).append(process)
        assert int(epoch) == len(found[delta]), line  # none is trained twice
    return found


def alive(name: str) -> list[int]:
    """The processes of the actors of a class."""
    found = actors().values()
    return [a["Pid"] for a in found if a["ActorClassName"].endswith(name) and a["State"] == "ALIVE"]


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def test_trials_of_a_gpu_end_in_one_process_as_they_do_in_processes_of_their_own(tmp_path: Path) -> None:
    space = scripted_space([1.0, 2.0, 3.0])
    behaviour = {"1": "diverge", "2": "crash"}
    for name in ("packed", "apart"):
        (tmp_path / name).mkdir()
        task = Noted(tmp_path / name, behaviour)
        assert run(space, task, tmp_path / name, packed=name == "packed") == "finished"
    assert without_times(tmp_path / "packed") == without_times(tmp_path / "apart")
    assert {status for _, status in ends(tmp_path / "packed")} == {"completed", "diverged", "failed"}
    crashed = next(record for record in records.read(tmp_path / "packed") if record["status"] == "failed")
    assert crashed["reason"] == "RuntimeError: a bug"
    assert 'raise RuntimeError(does.replace("crash", "a bug"))' in crashed["traceback"]
    assert len({process for trial in processes(tmp_path / "packed").values() for process in trial}) == 1
    assert len({process for trial in processes(tmp_path / "apart").values() for process in trial}) == 3
    while alive("_Host") or alive("_Maker"):  # they end with the search
        time.sleep(0.1)


def test_real_trials_side_by_side_are_those_of_a_search_without_a_gpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    synthetic.write(tmp_path / "set", count=16, height=64, width=128)
    found = splits.assign(layouts.read(tmp_path / "set"), tmp_path / "set", 0.25, 0.25, 0)
    rates = (0.3, 0.6)
    space = small_space(
        start_from=[{"learning_rate": rate, "threshold_rule": "grid"} for rate in rates],
        budget={"trials": 1 + len(rates)},
        train={"width": 0.1, "epochs": 2, "precision": "float32"},
    )
    task = TrialTask.of(space, found.train, found.validation)
    assert run(space, task, tmp_path / "packed") == "finished"
    assert run(space, task, tmp_path / "alone", Resources(concurrent=1)) == "finished"
    assert [r["status"] for r in without_times(tmp_path / "packed")] == ["completed"] * 3
    assert without_times(tmp_path / "packed") == without_times(tmp_path / "alone")
    weights = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "packed/trials", tmp_path / "alone/trials")
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) >= 3


def test_where_a_host_dies_its_trials_go_on_apart_from_their_last_epochs(tmp_path: Path) -> None:
    space = scripted_space([1.0, 2.0, 3.0])
    task = Noted(tmp_path, {"0.01": "end", "1": "wait"})

    def let_go() -> None:
        wait_for(tmp_path / "died")
        (tmp_path / "go").touch()

    with meanwhile(let_go):
        assert run(space, task, tmp_path, Resources(1, 0.5)) == "finished"
    assert [status for _, status in ends(tmp_path)] == ["completed"] * 4
    trained = processes(tmp_path)
    assert trained["0.01"][0] == trained["1"][0]
    assert len({trained["0.01"][0], trained["0.01"][1], trained["1"][1]}) == 3
    for delta in ("0.01", "1"):
        assert len(set(trained[delta][1:])) == 1
    for delta in ("2", "3"):  # in a new host
        assert set(trained[delta]) == set(trained["2"])
    assert trained["2"][0] not in trained["0.01"] + trained["1"]


def test_where_the_process_of_a_trial_is_killed_the_others_go_on(tmp_path: Path) -> None:
    space = scripted_space([1.0])
    task = Noted(tmp_path, {"0.01": "wait", "1": "wait"})

    def kill_one() -> None:
        while not (tmp_path / "processes.txt").exists() or len(processes(tmp_path)) < 2:
            time.sleep(0.02)
        before = alive("ImplicitFunc")
        os.kill(before[0], signal.SIGKILL)
        while before[0] in alive("ImplicitFunc") or len(alive("ImplicitFunc")) < 2:
            time.sleep(0.02)
        (tmp_path / "go").touch()

    with meanwhile(kill_one):
        assert run(space, task, tmp_path, Resources(1, 0.5)) == "finished"
    assert [status for _, status in ends(tmp_path)] == ["completed"] * 2
    [host], [first, *later] = sorted((sorted(set(p), key=p.index) for p in processes(tmp_path).values()), key=len)
    assert host == first
    assert len(later) == 1


def test_a_search_that_was_stopped_goes_on_with_new_hosts(tmp_path: Path, monkeypatch) -> None:
    space = scripted_space([1.0, 2.0])
    task = Noted(tmp_path, {"1": "wait"})
    stop_when_waiting(tmp_path, monkeypatch)
    assert run(space, task, tmp_path) == "stopped"
    (tmp_path / "go").touch()
    assert run(space, task, tmp_path) == "finished"
    assert [status for _, status in ends(tmp_path)] == ["completed"] * 3
    lines = (tmp_path / "processes.txt").read_text().splitlines()
    assert len({line.split()[2] for line in lines}) == 2


def test_a_host_that_cannot_start_is_told_as_a_problem_of_its_node(tmp_path: Path) -> None:
    with (
        pack_actors.opened(Broken(tmp_path)) as hosts,
        pytest.raises(NodeUnfit, match=r"the trials of GPU 0 dies as it starts: .*no driver$"),
    ):
        ray.get(ray.remote(num_cpus=0, num_gpus=0.1)(_ask).remote(hosts))


class Broken(ScriptedTask):
    """Cannot be had in another process."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise OSError("no driver")


def _ask(hosts: pack_actors.Hosts) -> None:
    hosts.address()
