"""Trials with and without a GPU in one search: on a Ray that believes in a GPU, with trials that need none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from model.config import RunConfig
from tests.tuner.test_search import ScriptedTask, scripted_space, stop_when_waiting
from tuner import records, search
from tuner.cluster import Resources, end_ray
from tuner.sampler import SearchStudy
from tuner.tracking import Trackers


@dataclass(frozen=True)
class Placed(ScriptedTask):
    """Notes what Ray gave it; takes the CPU for the GPU."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        search.take_device = lambda gpus, threads: torch.device("cpu")  # in the worker, which unpickles it

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        def noted(progress: dict[str, Any], folder: Path | None) -> None:
            with (self.folder / "places.txt").open("a") as log:
                log.write(f"{config.delta_cls_loss:g} {progress['epochs']} {len(ray.get_gpu_ids())}\n")
            report(progress, folder)

        super().run(config, device, resume, noted)


@pytest.fixture(scope="module")
def one_gpu():
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    yield
    end_ray()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_with_and_without_a_gpu_in_one_search(one_gpu, tmp_path: Path, monkeypatch) -> None:
    """One waits without a GPU while others come and go on it; the search is stopped and goes on elsewhere."""
    resources = Resources(1, 0.5, 1, cpu_trials=1)
    space = scripted_space([1.0, 2.0, 3.0, 4.0])
    behaviour = {f"{n}": "wait" for n in (1, 2)}
    (tmp_path / "trials").mkdir()
    stop_when_waiting(tmp_path, monkeypatch)

    def session() -> str:
        study = SearchStudy(space, "abc123", tmp_path / "study.journal")
        task = Placed(tmp_path, behaviour)
        return search.run_trials(study, task, tmp_path, space.budget, resources, Trackers([]), packed=False)

    assert session() == "stopped"
    (tmp_path / "go").touch()
    assert session() == "finished"
    seen = [line.split() for line in (tmp_path / "places.txt").read_text().splitlines()]
    assert {gpus for _, _, gpus in seen} == {"0", "1"}
    found = records.read(tmp_path)
    assert [record["status"] for record in found] == ["completed"] * 5
    for record in found:
        last = {epoch: float(gpus) for delta, epoch, gpus in seen if float(delta) == record["config"]["delta_cls_loss"]}
        assert len(last) == record["seconds"] == 4
        assert record["device_seconds"] == pytest.approx(0.5 * sum(last.values()))
    study = SearchStudy(space, "abc123", tmp_path / "study.journal")
    assert study.device_seconds() <= 0.5 * study.wall_seconds() * 1.01  # one at a time holds half a GPU


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_without_a_gpu_leave_its_node_to_the_others(one_gpu, monkeypatch) -> None:
    """Where there is room elsewhere."""
    resources = Resources(2, 1.0, 1, cpu_trials=2)
    [here] = ray.nodes()
    other = here | {"NodeID": "abc", "Resources": {"CPU": 4.0}}
    for nodes, avoided in (([here], None), ([here, other | {"Resources": {"CPU": 3.0}}], None), ([here, other], here)):
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        found = search.placement({"gpus": 0.0}, resources, ())
        selectors = found._kwargs.get("bundle_label_selector")
        assert selectors == ([{"ray.io/node-id": f"!in({avoided['NodeID']})"}] if avoided else None)
        assert "bundle_label_selector" not in search.placement({"gpus": 1.0}, resources, ())._kwargs
