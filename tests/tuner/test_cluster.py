"""Connecting to Ray, what a trial holds there, functions on workers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tuner import cluster
from tuner.cluster import Resources


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster.connected(None):
        yield


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
        ([{"CPU": 64}, {"CPU": 16, "GPU": 2}], (None, 0.5), (1, 0.5)),
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
def test_a_trial_must_fit_one_node(monkeypatch, nodes: list[dict], asked: tuple, found: tuple | str) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"CPU": 99}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: alive)
    monkeypatch.setattr(cluster, "_startable", list)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=f"a trial must fit one node of the cluster: {found}"):
            cluster.default_resources(*asked, None)
    else:
        assert cluster.default_resources(*asked, 3) == Resources(*found, 3)


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
