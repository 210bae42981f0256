"""Connecting to Ray, what a trial holds there, functions on workers."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.exceptions import NodeDiedError, WorkerCrashedError

from tuner import cluster
from tuner.cluster import Resources
from tuner.records import SearchFailed

GIB = 2**30


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster.connected(None):
        yield


@pytest.fixture
def no_autoscaler(monkeypatch) -> None:
    """For nodes that are made up: there is no cluster to ask."""
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="nowhere"))


def run_out_of_luck() -> None:
    raise ValueError("said by the worker")


@pytest.mark.slow
def test_a_function_runs_on_a_worker(ray_cluster) -> None:
    assert cluster.run_on_worker(lambda: os.getpid(), Resources()) != os.getpid()
    with pytest.raises(ValueError, match=r"it asks for 1000 CPU, found .*; lower --cpus-per-trial"):
        cluster.default_resources(1000, None, None)


@pytest.mark.slow
def test_what_a_function_raises_on_a_worker_is_raised_here(ray_cluster) -> None:
    with pytest.raises(ValueError, match=r"\Asaid by the worker\Z") as caught:
        cluster.run_on_worker(run_out_of_luck, Resources())
    assert "run_out_of_luck" in str(caught.value.__cause__)  # for --debug


@pytest.mark.parametrize(
    ("nodes", "asked", "found"),
    [
        ([{"CPU": 4}], (None, None), (1, 0)),
        ([{"CPU": 64}, {"CPU": 16, "GPU": 2}, {"CPU": 12, "GPU": 1}], (None, None), (8, 1)),
        ([{"CPU": 64}, {"CPU": 16, "GPU": 2}], (None, 0.5), (4, 0.5)),
        ([{"CPU": 16, "GPU": 2}], (None, 0.33), (2, 0.33)),
        ([{"CPU": 64, "GPU": 8}], (None, 4), (32, 4)),
        ([{"CPU": 2, "GPU": 4}], (None, None), (1, 1)),
        ([{"CPU": 1}, {"CPU": 1}], (2, None), "it asks for 2 CPU, found at most 1; lower --cpus-per-trial"),
        ([{"CPU": 4, "GPU": 1}] * 2, (None, 2), "it asks for 2 GPU, found at most 1; lower --gpus-per-trial"),
        ([{"CPU": 4, "GPU": 1}], (9, 2), "it asks for 9 CPU and 2 GPU, found at most 4 and 1; lower --cpus-per-trial"),
        (
            [{"CPU": 64}, {"CPU": 4, "GPU": 1}],
            (8, None),
            "it asks for 8 CPU and 1 GPU, found at most 64 and 1 on different nodes; lower --cpus-per-trial",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_autoscaler")
def test_a_trial_must_fit_one_node(monkeypatch, nodes: list[dict], asked: tuple, found: tuple | str) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"CPU": 99}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: alive)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=f"a trial must fit one node of the cluster: {found}"):
            cluster.default_resources(*asked, None)
    else:
        assert cluster.default_resources(*asked, 3) == Resources(*found, 3)


def has_nodes(monkeypatch, *nodes: dict) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"GPU": 99}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: alive)
    monkeypatch.setattr(
        cluster.ray, "cluster_resources", lambda: {k: sum(node.get(k, 0) for node in nodes) for k in ("CPU", "GPU")}
    )


@pytest.mark.parametrize(
    ("nodes", "cpu_trials", "found"),
    [
        ([{"CPU": 16, "GPU": 1}], 1, 8),
        ([{"CPU": 16, "GPU": 1}], 3, 4),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16}], 2, 8),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16}], 3, 5),
        ([{"CPU": 2, "GPU": 1}], 1, 1),
        ([{"CPU": 2, "GPU": 1}], 2, "found room for 1; lower --cpu-trials"),
        ([{"CPU": 16}], 1, "found --cpu-trials 1 where no trial has one; leave it out"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_autoscaler")
def test_trials_without_a_gpu_find_room_beside_the_others(monkeypatch, nodes, cpu_trials: int, found) -> None:
    has_nodes(monkeypatch, *nodes)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            cluster.default_resources(None, None, None, cpu_trials)
    else:
        assert cluster.default_resources(None, None, None, cpu_trials) == Resources(found, 1, None, cpu_trials)


@pytest.mark.usefixtures("no_autoscaler")
def test_trials_share_gpus_as_memory_cores_and_number_allow(monkeypatch) -> None:
    def shared(trial: int, cpus: float | None = None, at_once: int | None = None, cpu_trials: int = 0) -> Resources:
        return cluster.sharing_gpus(trial * GIB, 80 * GIB, cpus, at_once, None, cpu_trials)

    has_nodes(monkeypatch, {"CPU": 4}, {"CPU": 16, "GPU": 2}, {"CPU": 64, "GPU": 4})
    assert shared(9) == Resources(1, 0.12)  # eight
    assert shared(25) == Resources(2, 0.33)
    assert shared(41) == Resources(8, 1.0)
    assert shared(9, cpus=3) == Resources(3, 0.5)
    assert shared(9, at_once=6) == Resources(8, 1.0)
    assert shared(9, at_once=13) == Resources(2, 0.33)
    has_nodes(monkeypatch, {"CPU": 4, "GPU": 1})
    assert shared(9) == Resources(1, 0.25)
    assert shared(9, cpu_trials=2) == Resources(1, 0.5, None, 2)
    assert cluster.fit_at_once(Resources(1, 0.3))[0] == 3
    has_nodes(monkeypatch, *[{"CPU": 3}] * 4)
    assert cluster.fit_at_once(Resources(2, 0)) == (4, "2 CPU a trial, 12 there")  # a core of each is left over
    has_nodes(monkeypatch, {"CPU": 1, "GPU": 4}, {"CPU": 8, "GPU": 1})
    assert cluster.fit_at_once(Resources(1, 1))[0] == 2


@pytest.mark.usefixtures("no_autoscaler")
def test_gpus_of_several_kinds_are_named_where_one_was_measured(monkeypatch, caplog) -> None:
    alike = [{"CPU": 16, "GPU": 2, "accelerator_type:H100": 1}] * 2
    has_nodes(monkeypatch, *alike)
    cluster.sharing_gpus(9 * GIB, 80 * GIB, None, None, None, 0)
    assert caplog.text == ""
    has_nodes(monkeypatch, *alike, {"CPU": 4, "GPU": 1, "accelerator_type:T4": 1})
    cluster.sharing_gpus(9 * GIB, 80 * GIB, None, None, None, 0)
    assert "GPUs of several kinds, H100, T4, and a trial's share is measured on one of 80 GiB" in caplog.text


@pytest.mark.usefixtures("no_autoscaler")
def test_nodes_to_come_count(monkeypatch) -> None:
    """What an autoscaler may start: two kinds, four nodes in all, of which one is there."""
    kinds = [({"CPU": 8, "GPU": 2}, 2), ({"CPU": 16}, 9)]
    monkeypatch.setattr(cluster, "_startable", lambda address: (kinds, 4))
    has_nodes(monkeypatch, {cluster._HEAD: 1.0}, {"CPU": 8, "GPU": 2})
    assert cluster.default_resources(None, None, None) == Resources(4, 1)
    assert cluster.fit_at_once(Resources(4, 1)) == (4, "1 GPU a trial, 4 there")
    assert cluster.fit_at_once(Resources(16, 0)) == (2, "16 CPU a trial, 48 there")
    has_nodes(monkeypatch, {cluster._HEAD: 1.0, "CPU": 2})
    assert cluster.fit_at_once(Resources(4, 1))[0] == 4
    with pytest.raises(ValueError, match="it asks for 17 CPU, found at most 16; lower --cpus-per-trial"):
        cluster.default_resources(17, 0, None)


@pytest.mark.usefixtures("no_autoscaler")
def test_a_better_node_may_come_until_some_were_no_better(monkeypatch) -> None:
    has_nodes(monkeypatch, {cluster._HEAD: 1.0}, {"CPU": 8, "GPU": 2})
    assert not cluster.better_may_come(Resources(1, 1), ["no CUDA"])
    monkeypatch.setattr(cluster, "_startable", lambda address: ([({"CPU": 8, "GPU": 2}, 4)], 4))
    assert cluster.better_may_come(Resources(1, 1), ["no CUDA"])
    assert cluster.better_may_come(Resources(1, 1), ["no CUDA", "full"])
    assert not cluster.better_may_come(Resources(9, 1), ["no CUDA"])
    assert not cluster.better_may_come(Resources(1, 1), ["no CUDA", "no CUDA"])
    assert not cluster.better_may_come(Resources(1, 1), ["no CUDA", "full", "broken"])


class Calls:
    """Stands in for what Ray makes of calls: each ends as is told; some nodes are gone by then."""

    def __init__(self, monkeypatch, *ends: tuple[object, set[str]]) -> None:
        self.ends, self.alive = iter(ends), {"a", "b"}
        task = SimpleNamespace(remote=lambda *_: "running")
        remote = SimpleNamespace(options=lambda **_: task)
        monkeypatch.setattr(cluster.ray, "remote", lambda **_: lambda _: remote)
        monkeypatch.setattr(cluster.ray, "wait", lambda *_, **__: (["running"], []))
        monkeypatch.setattr(cluster.ray, "get", self.get)
        monkeypatch.setattr(cluster, "nodes_alive", lambda: set(self.alive))
        monkeypatch.setattr(cluster, "nodes_that_stay", lambda: set(self.alive))

    def get(self, _: str) -> object:
        end, self.alive = next(self.ends)
        if isinstance(end, Exception):
            raise end
        return end


def test_lost_nodes_do_not_end_a_function_and_dying_processes_do(monkeypatch) -> None:
    gone, died = NodeDiedError("gone"), WorkerCrashedError()
    preempted = [(died, {f"{n}"}) for n in range(5)]
    Calls(monkeypatch, *[(gone, {"a", "b"})] * 5, *preempted, ("done", {"4"}))
    assert cluster.run_on_worker(run_out_of_luck, Resources()) == "done"
    Calls(monkeypatch, *[(died, {"a", "b"})] * 3)
    with pytest.raises(SearchFailed, match="the process of run_out_of_luck died 3 times, memory may have run out"):
        cluster.run_on_worker(run_out_of_luck, Resources())


def test_a_trial_without_a_gpu_costs_nothing_beside_those_that_have_one() -> None:
    mixed, plain = Resources(4, 0.5, None, 2), Resources(4, 0)
    assert (mixed.devices, mixed.devices_of(0.5), mixed.devices_of(0.0)) == (0.5, 0.5, 0.0)
    assert (plain.devices, plain.devices_of(0.0)) == (4, 4)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_small_nodes_are_no_large_one() -> None:
    """In a process of its own: this one is connected to another cluster."""
    code = """
import ray
from ray.cluster_utils import Cluster
from tuner.cluster import default_resources
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False)
assert ray.cluster_resources()["CPU"] == 2
try:
    default_resources(2, 0, None)
except ValueError as error:
    print(error)
ray.shutdown()
nodes.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "a trial must fit one node of the cluster: it asks for 2 CPU, found at most 1; lower --cpus-per-trial\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_garbage_that_a_thread_finds_while_ray_ends_does_not_end_the_process() -> None:
    """Ray ends a process that lets a reference go after the process was disconnected and before Ray has ended."""
    code = """
import gc, threading, ray
from tuner.cluster import connected

def look_for_garbage():
    while ray.is_initialized():
        pass
    gc.collect()

with connected(None):
    gc.disable()
    for _ in range(10_000):
        circle = [ray.put(b"")]
        circle.append(circle)
    del circle
    thread = threading.Thread(target=look_for_garbage)
    thread.start()
thread.join()
print("lives")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr
