"""What happens around a search: without Ray, and with trials that are not run."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from model import synthetic
from tests.tuner.conftest import ended, small_space
from tuner import cluster, importance, pipeline, plan
from tuner import run as runs
from tuner.cluster import Resources
from tuner.options import Options
from tuner.records import RecordsFile, SearchFailed
from tuner.run import Run
from tuner.sampler import SearchStudy
from tuner.status import describe

HOURS_OF_BASELINE = 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


class NoNodes:
    """Nobody to ask."""

    def needs(self, *_: Any) -> None:
        """Nothing."""

    check = prepare = needs


@pytest.fixture(autouse=True)
def no_ray(monkeypatch) -> None:
    """No cluster, no trials; a baseline takes half an hour, and its device is two cores."""
    monkeypatch.setattr(pipeline, "connected", lambda address: nullcontext())
    monkeypatch.setattr(pipeline, "default_resources", lambda *asked: Resources(cpus_per_trial=2.0))
    monkeypatch.setattr(pipeline, "nodes", NoNodes())
    monkeypatch.setattr(pipeline, "run_trials", lambda *_, profile: "finished")
    monkeypatch.setattr(pipeline, "run_on_worker", lambda function, resources, *arguments: function(*arguments))
    monkeypatch.setattr(plan, "baseline_seconds", lambda *_: HOURS_OF_BASELINE * 3600)


def search(data: Path, folder: Path, budget: dict[str, float], **options: Any) -> Run:
    return pipeline.run_search(small_space(budget=budget), data, runs=folder, wandb="off", no_report=True, **options)


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ({"hours": 0.24}, "about 0.5 here, found 0.24"),
        ({"device_hours": 0.49}, "about 1 here, found 0.49"),
        ({"money": 0.9, "price_per_device_hour": 2.0}, "about 2 here, found 0.9"),
        ({"trials": 4, "hours": 0.24}, "about 0.5 here, found 0.24"),
    ],
    ids=str,
)
def test_a_budget_that_clearly_cannot_hold_the_baseline_is_refused(data, tmp_path, budget: dict, found: str) -> None:
    with pytest.raises(ValueError, match=rf"must hold the baseline, which always runs to its end and takes {found}"):
        search(data, tmp_path, budget)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "budget", [{"hours": 0.26}, {"device_hours": 0.51}, {"money": 1.1, "price_per_device_hour": 2.0}], ids=str
)
def test_a_budget_that_the_forecast_alone_exceeds_is_not(data: Path, tmp_path: Path, budget: dict) -> None:
    """Two steps on a busy machine may say twice what a trial takes."""
    assert search(data, tmp_path, budget).info["state"] == "finished"


def test_the_baseline_is_timed_where_the_budget_asks_for_it_and_once(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "run_on_worker", lambda *_: pytest.fail("it was timed"))
    search(data, tmp_path, {"trials": 3})
    run = runs.create(
        small_space(budget={"hours": 0.01}), data, tmp_path, "other", Options(wandb="off", no_report=True)
    )
    run.note(sessions=[{"started": 0.0, "ended": 1.0}])
    SearchStudy(run.space, run.info["id"], run.study)
    assert pipeline.go_on(run).info["state"] == "finished"


def test_a_baseline_is_timed_as_a_plan_times_it(data: Path, monkeypatch) -> None:
    monkeypatch.undo()
    space = small_space(budget={"hours": 1})
    found = runs.checked_splits(space, data)
    seconds = plan.baseline_seconds(space, found._replace(test=[]), 1.0, 0.0)
    assert 0.01 < seconds / (plan.plan(space, data)["baseline_hours"] * 3600) < 100  # two timings of some steps


MEASURED = {"baseline_seconds": 1800.0, "trial_bytes": 9 * 2**30, "gpu": "GPU X", "gpu_bytes": 80 * 2**30}


@pytest.fixture
def gpus(monkeypatch) -> list[dict[str, float]]:
    """Nodes with GPUs, on which trials of 9 GiB are measured."""
    nodes = [{"CPU": 16.0, "GPU": 1.0}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="nowhere"))
    monkeypatch.setattr(pipeline, "default_resources", cluster.default_resources)
    monkeypatch.setattr(plan, "measure", lambda *_: MEASURED)
    return nodes


def test_the_part_of_a_gpu_is_chosen_by_what_was_measured_and_kept(data, tmp_path: Path, gpus, monkeypatch) -> None:
    said = Console(file=StringIO(), width=200)
    run = search(data, tmp_path, {"trials": 30}, console=said)
    chosen = run.info["resources"]
    assert (chosen["gpus_per_trial"], chosen["cpus_per_trial"]) == (0.12, 1)
    assert run.options.gpus_per_trial is None
    assert said.file.getvalue().count(chosen["why"]) == 1
    assert chosen["why"] == (
        "8 trials on a GPU, --gpus-per-trial 0.12 --cpus-per-trial 1: the largest takes 9 GiB of the 80 GiB of GPU X"
    )
    monkeypatch.setattr(pipeline, "run_on_worker", lambda *_: pytest.fail("it was measured again"))
    assert pipeline._resources(runs.load(run.directory)) == Resources(1, 0.12)


def test_what_was_asked_for_is_not_measured(data: Path, tmp_path: Path, gpus, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "run_on_worker", lambda *_: pytest.fail("it was measured"))
    for name, asked in (("half", 0.5), ("none", 0)):
        run = search(data, tmp_path, {"trials": 30}, name=name, gpus_per_trial=asked)
        assert "resources" not in run.info
        assert pipeline._resources(run).gpus_per_trial == asked


def test_the_measurement_times_the_baseline_too(data: Path, tmp_path: Path, gpus) -> None:
    with pytest.raises(ValueError, match=r"about 0\.5 here, found 0\.24"):
        search(data, tmp_path, {"hours": 0.24})
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_gpus_cannot_share_is_refused(data: Path, tmp_path: Path, gpus) -> None:
    gpus[0]["GPU"] = 4.0
    with pytest.raises(
        ValueError, match="a trial on 2 GPUs shares each batch among them, so it needs batch_size of at"
    ):
        search(data, tmp_path, {"trials": 3}, gpus_per_trial=2)
    assert list(tmp_path.iterdir()) == []


def test_trials_without_a_gpu_are_refused_where_device_time_is_an_objective(data: Path, tmp_path: Path, gpus) -> None:
    space = small_space(objective=[{"metric": "dice_mean"}, {"metric": "device_seconds"}])
    with pytest.raises(ValueError, match="--cpu-trials must be 0 where device_seconds is an objective, found 1"):
        pipeline.run_search(space, data, runs=tmp_path, cpu_trials=1)


def warm(data: Path, folder: Path) -> tuple[Run, Run]:
    """A run that was started from another one, in a session that was killed 200 seconds after its start."""
    other = runs.create(small_space(), data, folder, "other")
    study = SearchStudy(other.space, other.info["id"], None)
    proposal = study.ask()
    RecordsFile(other.directory).write([study.finish(proposal, ended(proposal, ended=1.0))])
    options = Options(wandb="off", no_report=True, warm_start=str(other.directory))
    run = runs.create(small_space(), data, folder, "warm", options)
    run.note(state="running", sessions=[{"started": time.time() - 7200, "ended": None}])
    return other, run


def kill(run: Run) -> None:
    os.utime(run.directory / "study.journal", (run.info["sessions"][-1]["started"] + 200,) * 2)


def test_a_resume_does_not_need_the_run_that_it_was_started_from(data: Path, tmp_path: Path) -> None:
    other, run = warm(data, tmp_path)
    study = SearchStudy(run.space, run.info["id"], run.study)
    assert study.warm_started() is None
    assert study.warm_start(other.records) == study.warm_started() == (1, 0)
    kill(run)
    shutil.rmtree(other.directory)
    assert pipeline.go_on(run).info["state"] == "finished"


def test_a_resume_that_is_refused_changes_no_clock(data: Path, tmp_path: Path) -> None:
    """The other run was not read before the kill, and is gone; opening the study writes to its journal."""
    other, run = warm(data, tmp_path)
    SearchStudy(run.space, run.info["id"], run.study).ask()
    kill(run)
    shutil.rmtree(other.directory)
    assert describe(run)["elapsed_seconds"] == pytest.approx(200, abs=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="other must be the folder of a run"):
            pipeline.go_on(run)
    assert describe(run)["elapsed_seconds"] == pytest.approx(200, abs=1)
    assert run.info["state"] == "stopped"


def fails(number: int) -> Callable[..., str]:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_the_way_out(data: Path, tmp_path: Path, monkeypatch, number: int) -> None:
    monkeypatch.setattr(pipeline, "nodes", NoNodes())
    monkeypatch.setattr(pipeline, "run_trials", fails(number))
    message = rf"the disk is full \(.*{os.strerror(number)}\); make room, then `tuner resume {tmp_path}/small` goes on"
    with pytest.raises(SearchFailed, match=message):
        search(data, tmp_path, {"trials": 3})
    assert (tmp_path / "small").exists()
    with pytest.raises(SearchFailed, match=message):
        pipeline.go_on(runs.load(tmp_path / "small"))


def test_what_ended_a_search_is_not_hidden_by_a_note_that_fails(data: Path, tmp_path: Path, monkeypatch) -> None:
    note = Run.note

    def full(run: Run, **values: Any) -> None:
        if values.get("state") in ("failed", "finished"):
            raise OSError(errno.ENOSPC, "No space left on device")
        note(run, **values)

    monkeypatch.setattr(Run, "note", full)
    monkeypatch.setattr(pipeline, "nodes", NoNodes())
    monkeypatch.setattr(pipeline, "run_trials", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        search(data, tmp_path, {"trials": 3})
    monkeypatch.setattr(pipeline, "nodes", NoNodes())
    monkeypatch.setattr(pipeline, "run_trials", lambda *_, profile: "finished")
    with pytest.raises(SearchFailed, match="the disk is full"):  # nothing else has said so
        pipeline.go_on(runs.load(tmp_path / "small"))


def test_a_disk_that_is_full_before_the_search_leaves_no_run(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "default_resources", fails(errno.ENOSPC))
    with pytest.raises(SearchFailed, match="make room, then start the search again"):
        search(data, tmp_path, {"trials": 3})
    assert list(tmp_path.iterdir()) == []


def test_importance_is_written_when_a_search_ends_and_where_a_finished_one_has_none(data: Path, tmp_path: Path) -> None:
    run = search(data, tmp_path, {"trials": 3})
    before = (run.directory / importance.FILE).read_bytes()
    (run.directory / importance.FILE).unlink()
    pipeline.go_on(run)
    assert (run.directory / importance.FILE).read_bytes() == before


@pytest.mark.parametrize(("error", "written"), [(SearchFailed("all crash"), True), (KeyboardInterrupt(), False)])
def test_importance_is_written_when_a_search_fails_and_not_at_a_second_ctrl_c(
    data: Path, tmp_path: Path, monkeypatch, error: BaseException, written: bool
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(pipeline, "nodes", NoNodes())
    monkeypatch.setattr(pipeline, "run_trials", fail)
    with pytest.raises(type(error)):
        search(data, tmp_path, {"trials": 3})
    assert (tmp_path / "small" / importance.FILE).exists() == written


def test_a_run_goes_on_at_another_address_and_asks_no_cluster_when_nothing_is_left(data, tmp_path, monkeypatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(pipeline, "connected", lambda address: nullcontext(asked.append(address)))
    run = search(data, tmp_path, {"trials": 2}, address="gone:6379")
    pipeline.go_on(runs.load(run.directory))
    assert asked == ["gone:6379"]  # for the search alone
    run.note(state="stopped")
    pipeline.go_on(pipeline.at(runs.load(run.directory), "local"))
    run.note(state="stopped")
    pipeline.go_on(pipeline.at(runs.load(run.directory), None))
    run.note(state="stopped")
    pipeline.go_on(pipeline.at(runs.load(run.directory), "here:6379"))
    assert asked == ["gone:6379", None, None, "here:6379"]
    assert runs.load(run.directory).options.address == "here:6379"


@pytest.mark.parametrize("fails", [False, True])
def test_the_cluster_is_left_before_a_report_is_written(data: Path, tmp_path: Path, monkeypatch, fails: bool) -> None:
    """In the same thread: Ray ends a process that lets its references go meanwhile."""
    seen: list[tuple[str, int]] = []

    def note(what: str) -> None:
        seen.append((what, threading.get_ident()))

    @contextmanager
    def connected(_address: str | None) -> Iterator[None]:
        note("connected")
        yield
        note("left")

    def trained(*_: Any, **__: Any) -> str:
        if fails:
            raise SearchFailed("all crash")
        return "finished"

    monkeypatch.setattr(pipeline, "connected", connected)
    monkeypatch.setattr(pipeline, "run_trials", trained)
    monkeypatch.setattr(pipeline, "repeat", lambda *_: True)
    monkeypatch.setattr(pipeline, "evaluate", lambda _: note("evaluated"))
    monkeypatch.setattr(pipeline.report, "write", lambda _: note("report"))
    monkeypatch.setattr(pipeline.tracking, "log_report", lambda *_: None)
    with pytest.raises(SearchFailed, match="all crash") if fails else nullcontext():
        pipeline.run_search(small_space(budget={"trials": 2}), data, runs=tmp_path, wandb="off")
    expected = ["connected", "left", "report"] if fails else ["connected", "evaluated", "left", "report"]
    assert seen == [(what, threading.get_ident()) for what in expected]
