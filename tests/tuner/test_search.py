"""The search on a real Ray, with trials that follow a script instead of training."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from model import checkpoint
from model.config import RunConfig
from model.files import write_json
from model.sample import Sample
from tests.tuner.conftest import small_space
from tuner import checkpoints, cluster, records, search, tracking
from tuner.checkpoints import Trials
from tuner.cluster import Resources
from tuner.records import SearchFailed
from tuner.sampler import SearchStudy
from tuner.session import Session
from tuner.space import Space
from tuner.tracking import Tracker, Trackers


@dataclass(frozen=True)
class ScriptedTask:
    """Reports `epochs` values; what it does in an epoch follows from the learning rate."""

    folder: Path
    behaviour: dict[str, str] = field(default_factory=dict)
    """delta_cls_loss as text -> crash, die, die once, die at the end, diverge, wait or wait at once"""
    train: list[Sample] = field(default_factory=list)
    validation: list[Sample] = field(default_factory=list)

    @property
    def decoded(self) -> list[list[Sample]]:
        return [self.train, self.validation]

    def run(self, config: RunConfig, _device: torch.device, resume: Path | None, report: Any) -> None:
        does = self.behaviour.get(f"{config.delta_cls_loss:g}", "")
        progress = checkpoint.load_progress(resume) if resume else self.fresh()
        for epoch in range(progress["epochs"] + 1, config.epochs + 1):
            if does.startswith("crash"):
                raise RuntimeError(does.replace("crash", "a bug"))
            if does == "die" or (does == "die once" and epoch == 3 and not (self.folder / "died").exists()):
                (self.folder / "died").touch()
                os._exit(1)
            if does == "diverge" and epoch == 2:
                report(progress | {"status": "diverged", "reason": "not finite"}, None)
                return
            if (does == "wait" and epoch == 2) or does == "wait at once":
                (self.folder / "waiting").touch()
                while not (self.folder / "go").exists():
                    time.sleep(0.02)
            with (self.folder / "epochs.txt").open("a") as log:
                log.write(f"{config.delta_cls_loss:g} {epoch}\n")
            value = config.delta_cls_loss / 10 + epoch / 1000
            compared = -value if does == "late" else value
            progress |= {
                "epochs": epoch,
                "history": [*progress["history"], {"epoch": epoch, "value": value, "compared": compared}],
                "value": value,
                "best_epoch": epoch,
                "seconds": progress["seconds"] + 1.0,
                "status": "completed" if epoch == config.epochs else "running",
            }
            folder = self.folder / f"{os.getpid()}-{config.delta_cls_loss:g}-{epoch}"
            folder.mkdir(exist_ok=True)
            write_json(folder / "progress.json", progress)
            checkpoint.seal(folder)
            report(progress, folder)
        if does == "die at the end":
            os._exit(1)

    def fresh(self) -> dict[str, Any]:
        return {
            "status": "running", "reason": None, "epochs": 0, "history": [], "value": None, "best_epoch": None,
            "thresholds": None, "rules": {}, "replays": [], "seconds": 0.0, "micro_batch": None,
        }  # fmt: skip


class Events(Tracker):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def trial_started(self, trial, params, config, history) -> None:
        self.seen.append(("started", f"{trial} {len(history)}"))

    def trial_held(self, record) -> None:
        self.seen.append(("held", record["trial"]))

    def trial_ended(self, record) -> None:
        self.seen.append(("ended", record["status"]))


@dataclass(frozen=True)
class CountingTask(ScriptedTask):
    """Says how many masks it had, as a trial does where they are a cost, and how it meets a bound."""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        kept = config.num_segmented

        def counted(progress: dict[str, Any], folder: Path | None) -> None:
            own = config.judgement()._asdict() | {"value": progress["value"], "epoch": progress["best_epoch"]}
            own |= {"thresholds": None, "figures": {"recall": config.delta_cls_loss / 4}}
            report(progress | {"num_segmented": 50 if kept == "all" else kept, "replays": [own]}, folder)

        super().run(config, device, resume, counted)


def scripted_space(values: list[float], scheduler: Any = "none", trials: int | None = None, **budget: Any) -> Space:
    """The baseline (delta 0.01), then one trial for each value of delta."""
    points = [{"delta_cls_loss": value} for value in values]
    return small_space(
        search={"delta_cls_loss": {"type": "float", "low": 0.001, "high": 10.0}},
        train={"width": 0.1, "epochs": 4, "learning_rate": 1.0},
        start_from=points,
        scheduler=scheduler,
        budget={"trials": trials or len(values) + 1, **budget},
    )


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster.connected(None):
        yield


def run(
    space: Space,
    folder: Path,
    concurrent: int = 1,
    tracker: Tracker | None = None,
    study: str = "study.journal",
    **behaviour: str,
) -> str:
    """One session of a search in `folder`, whose study is a journal or sqlite."""
    task = ScriptedTask(folder, {name.lstrip("_").replace("_", "."): does for name, does in behaviour.items()})
    where = f"sqlite:///{folder}/study.db" if study == "sqlite" else folder / study
    opened = SearchStudy(space, "abc123", where)
    trackers = Trackers([tracker] if tracker else [])
    resources = Resources(concurrent=concurrent)
    (folder / "trials").mkdir(exist_ok=True)
    return search.run_trials(opened, task, folder, space.budget, resources, trackers)


def optuna_trials(space: Space, folder: Path) -> list[optuna.trial.FrozenTrial]:
    return SearchStudy(space, "abc123", folder / "study.journal")._study.trials


def stop_when_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stops the first session, as Ctrl-C does, when a trial waits; the seconds at which each session began."""
    begun: list[float] = []
    made = Session.__init__

    def remember(self: Session, *arguments: Any) -> None:
        made(self, *arguments)
        begun.append(self.study.wall_seconds())
        if len(begun) == 1:
            threading.Thread(target=stop, args=[self], daemon=True).start()

    def stop(session: Session) -> None:
        while not (folder / "waiting").exists():
            time.sleep(0.02)
        session.stop_asked = True

    monkeypatch.setattr(Session, "__init__", remember)
    return begun


def pass_ten_hours(monkeypatch: pytest.MonkeyPatch, when: Callable[[Session], bool]) -> None:
    """The clock of a session jumps, once, instead of ending a budget of seconds at the pace of this machine."""
    pass_time = Session._pass_time
    jumped: list[Session] = []

    def jump(self: Session) -> None:
        if not jumped and when(self):
            jumped.append(self)
            self._clock -= 36000
        pass_time(self)

    monkeypatch.setattr(Session, "_pass_time", jump)


def is_waiting(folder: Path) -> Callable[[Session], bool]:
    return lambda _: (folder / "waiting").exists()


def ends(folder: Path) -> list[tuple[float, str]]:
    return [(record["config"]["delta_cls_loss"], record["status"]) for record in records.read(folder)]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_end_is_told_as_what_it_was(ray_cluster, tmp_path: Path) -> None:
    events = Events()
    space = scripted_space([1.0, 2.0, 3.0, 4.0])
    assert run(space, tmp_path, tracker=events, _1="diverge", _2="crash", _3="die") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "diverged"), (2, "failed"), (3, "failed"), (4, "completed")]
    found = records.read(tmp_path)
    assert found[0]["baseline"]
    assert 0 < found[0]["started"] < found[0]["ended"] < found[4]["started"] < found[4]["ended"]
    assert found[1]["reason"] == "not finite"
    assert found[2]["reason"] == "RuntimeError: a bug"
    assert 'raise RuntimeError(does.replace("crash", "a bug"))' in found[2]["traceback"]
    assert found[3]["reason"] == "its worker process died 3 times; memory may have run out"
    assert [row["epoch"] for row in found[4]["history"]] == [1, 2, 3, 4]
    assert found[4]["value"] == pytest.approx(0.404)
    assert [status for what, status in events.seen if what == "ended"] == [status for _, status in ends(tmp_path)]
    assert len([1 for what, _ in events.seen if what == "started"]) == 4 + 3  # the worker of one died three times


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_asha_stops_the_worse_and_never_the_baseline(ray_cluster, tmp_path: Path) -> None:
    space = scripted_space([2.0, 1.0, 3.0], {"name": "asha", "min_epochs": 1, "reduction": 2})
    events = Events()
    assert run(space, tmp_path, tracker=events) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (2, "stopped_early"), (1, "stopped_early"), (3, "completed")]
    _, stopped, _, promoted = records.read(tmp_path)
    assert stopped["reason"] == "not among the best at epoch 1"
    assert [row["epoch"] for row in stopped["history"]] == [1]
    assert [row["epoch"] for row in promoted["history"]] == [1, 2, 3, 4]  # it was held at 2, for lack of others
    kept = [len(list((tmp_path / "trials").glob(f"*/abc123-000{n}*/checkpoint_*"))) for n in range(4)]
    assert kept == [1, 0, 0, 1]  # what was stopped for good is never gone on with
    epochs = (tmp_path / "epochs.txt").read_text().split()
    trained = list(zip(epochs[::2], epochs[1::2], strict=True))
    assert len(trained) == len(set(trained)) == 4 + 1 + 1 + 4
    assert [what for what, trial in events.seen if trial.startswith("abc123-0003")] == ["started", "held", "started"]
    trials = SearchStudy(space, "abc123", tmp_path / "study.journal")._study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert [list(trial.intermediate_values) for trial in trials[1:3]] == [[1], [1]]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_rungs_compare_what_they_are_told_to(ray_cluster, tmp_path: Path) -> None:
    """A trial whose objective comes late is not cut for it, and one whose masks are worse is."""
    space = scripted_space([1.0, 2.0, 0.5], {"name": "asha", "min_epochs": 1, "reduction": 2})
    assert run(space, tmp_path, _2="late") == "finished"
    assert ends(tmp_path)[1:] == [(1, "completed"), (2, "stopped_early"), (0.5, "stopped_early")]
    assert records.read(tmp_path)[2]["value"] == 0.201  # by its objective it was the best


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fewer_masks_are_not_cut_by_more_and_violations_are_recorded(ray_cluster, tmp_path: Path) -> None:
    points = [(4.0, 20), (1.0, 10), (0.5, 10), (2.0, 20)]
    space = small_space(
        search={
            "delta_cls_loss": {"type": "float", "low": 0.001, "high": 10.0},
            "num_segmented": {"type": "categorical", "choices": [10, 20, "all"]},
        },
        train={"width": 0.1, "epochs": 4, "learning_rate": 1.0},
        start_from=[{"delta_cls_loss": delta, "num_segmented": kept} for delta, kept in points],
        scheduler={"name": "asha", "min_epochs": 1, "reduction": 2},
        objective=[{"metric": "dice_mean"}, {"metric": "num_segmented"}],
        constraints=[{"metric": "recall", "min": 0.25}],
        budget={"trials": 5},
    )
    study = SearchStudy(space, "abc123", tmp_path / "study.journal")
    (tmp_path / "trials").mkdir()
    ended: list[dict[str, Any]] = []
    tracker = Tracker()
    tracker.trial_ended = ended.append
    resources = Resources(concurrent=1)
    search.run_trials(study, CountingTask(tmp_path), tmp_path, space.budget, resources, Trackers([tracker]))
    found = records.read(tmp_path)
    assert (
        sorted(ended, key=lambda record: record["trial"].replace("baseline", "")) == found
    )  # trackers see the record as it is kept
    assert [(record["status"], record["values"], record["violations"]["recall"]) for record in found] == [
        ("completed", pytest.approx([0.005, 50]), 0.2475),
        ("completed", pytest.approx([0.404, 20]), 0),
        ("completed", pytest.approx([0.104, 10]), 0),
        ("stopped_early", pytest.approx([0.051, 10]), 0.125),
        ("stopped_early", pytest.approx([0.201, 20]), 0),
    ]
    assert [record["number"] for record in records.pareto_front(found, ["max", "min"])] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("study", ["study.journal", "sqlite"])
def test_a_stop_loses_nothing_and_the_search_goes_on_from_there(
    ray_cluster, tmp_path: Path, monkeypatch, study: str
) -> None:
    space = scripted_space([1.0, 2.0])
    begun = stop_when_waiting(tmp_path, monkeypatch)
    assert run(space, tmp_path, study=study, _1="wait") == "stopped"
    assert ends(tmp_path) == [(0.01, "completed")]

    (tmp_path / "go").touch()
    events = Events()
    assert run(space, tmp_path, study=study, tracker=events) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed"), (2, "completed")]
    first, resumed, last = records.read(tmp_path)
    assert first["ended"] <= resumed["started"] < begun[1] < resumed["ended"] <= last["started"]
    assert events.seen[0] == ("started", "abc123-0001 1")
    epochs = (tmp_path / "epochs.txt").read_text().split("\n")
    assert epochs.count("1 1") == 1  # the epoch before the stop was not trained again
    assert [row["epoch"] for row in records.read(tmp_path)[1]["history"]] == [1, 2, 3, 4]
    assert run(space, tmp_path, study=study) == "finished"
    assert len(ends(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("dies", [1, 2], ids=["in the middle", "the last one"])
def test_a_trial_whose_worker_died_goes_on_from_its_last_epoch(ray_cluster, tmp_path: Path, dies: int) -> None:
    space = scripted_space([1.0, 2.0])
    assert run(space, tmp_path, **{f"_{dies}": "die once"}) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed"), (2, "completed")]
    epochs = (tmp_path / "epochs.txt").read_text().split("\n")
    assert [line for line in epochs if line.startswith(f"{dies} ")] == [f"{dies} {epoch}" for epoch in range(1, 5)]
    trials = SearchStudy(space, "abc123", tmp_path / "study.journal")._study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_baseline_whose_worker_died_goes_on(ray_cluster, tmp_path: Path) -> None:
    """Outside the space, where it is no point of the study."""
    space = scripted_space([1.0])
    space = replace(space, search={**space.search, "delta_cls_loss": replace(space.search["delta_cls_loss"], low=0.5)})
    assert run(space, tmp_path, _0_01="die once") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed")]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_baseline_whose_worker_died_after_the_hours_goes_on(ray_cluster, tmp_path: Path) -> None:
    assert run(scripted_space([1.0], hours=1e-6), tmp_path, _0_01="die once") == "finished"
    assert ends(tmp_path) == [(0.01, "completed")]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_worker_does_after_its_trial_is_done_changes_nothing(ray_cluster, tmp_path: Path) -> None:
    assert run(scripted_space([1.0, 2.0]), tmp_path, _1="die at the end") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed"), (2, "completed")]
    assert checkpoints.newest(Trials(tmp_path / "trials"), "abc123-0001")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_error_in_the_driver_ends_the_search_and_loses_nothing(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    space = scripted_space([1.0, 2.0], {"name": "asha", "min_epochs": 1, "reduction": 2})
    finish = SearchStudy.hold

    def full(self, proposal, record):
        if proposal.number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(self, proposal, record)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStudy, "hold", full)
        with pytest.raises(OSError, match="No space left"):
            run(space, tmp_path)
    states = [trial.state.name for trial in optuna_trials(space, tmp_path)]
    assert states == ["COMPLETE", "RUNNING", "WAITING"]  # the second is held, and this session takes it up
    assert run(space, tmp_path) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "stopped_early"), (2, "completed")]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("limit", ["hours", "device_hours"])
def test_what_waits_when_the_budget_is_found_spent_has_ended(
    ray_cluster, tmp_path: Path, monkeypatch, limit: str
) -> None:
    """A session is stopped while a trial runs; the next one finds that nothing is left of the budget."""
    stop_when_waiting(tmp_path, monkeypatch)
    space = scripted_space([1.0, 2.0], **{limit: 10.0})
    assert run(space, tmp_path, _1="wait") == "stopped"
    study = SearchStudy(space, "abc123", tmp_path / "study.journal")
    assert 0 < study.device_seconds() < study.wall_seconds() * 1.01  # one trial at a time
    study.add_seconds(36000, 0) if limit == "hours" else study.add_seconds(0, 36000)
    assert run(space, tmp_path) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "stopped_early")]
    stopped = records.read(tmp_path)[1]
    assert (stopped["epochs"], stopped["seconds"]) == (1, 1.0)
    assert stopped["reason"] == f"the {limit.replace('_', '-')} of the budget were used up"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_failures_of_many_kinds_end_no_search(ray_cluster, tmp_path: Path) -> None:
    space = scripted_space([1.0, 2.0, 3.0, 4.0])
    assert run(space, tmp_path, _1="crash 1", _2="crash 2", _3="crash 3") == "finished"
    assert [status for _, status in ends(tmp_path)] == ["completed", "failed", "failed", "failed", "completed"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_bug_ends_the_search(ray_cluster, tmp_path: Path) -> None:
    space = scripted_space([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(SearchFailed, match="3 trials in a row failed for the same reason: RuntimeError: a bug"):
        run(space, tmp_path, _0_01="crash", _1="crash", _2="crash")
    assert len(ends(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_when_the_hours_are_over_what_runs_is_stopped_early(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    pass_ten_hours(monkeypatch, when=is_waiting(tmp_path))
    space = scripted_space([1.0, 2.0], hours=5.0)
    assert run(space, tmp_path, concurrent=1, _1="wait") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "stopped_early")]
    stopped = records.read(tmp_path)[1]
    assert stopped["reason"] == "the hours of the budget were used up"
    assert stopped["epochs"] == 1
    assert stopped["seconds"] == pytest.approx(stopped["ended"] - stopped["started"], abs=0.1)  # its epoch says 1 s
    assert stopped["device_seconds"] == stopped["seconds"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_that_the_clock_stops_in_its_first_epoch_is_charged(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    pass_ten_hours(monkeypatch, when=is_waiting(tmp_path))
    space = scripted_space([1.0], hours=5.0)
    assert run(space, tmp_path, _1="wait at once") == "finished"
    stopped = records.read(tmp_path)[1]
    assert (stopped["status"], stopped["epochs"]) == ("stopped_early", 0)
    assert stopped["device_seconds"] == pytest.approx(stopped["ended"] - stopped["started"], abs=0.1)
    assert stopped["device_seconds"] > 1


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"device_hours": 5.0}, "the device-hours of the budget were used up"),
        ({"money": 10.0, "price_per_device_hour": 2.0}, "the money of the budget was used up"),
    ],
)
def test_what_runs_when_the_budget_is_spent_is_stopped_early(
    ray_cluster, tmp_path: Path, monkeypatch, budget, reason
) -> None:
    pass_ten_hours(monkeypatch, when=is_waiting(tmp_path))
    space = scripted_space([1.0, 2.0, 3.0], **budget)
    assert run(space, tmp_path, concurrent=1, _1="wait") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "stopped_early")]
    assert records.read(tmp_path)[1]["reason"] == reason


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_slow_baseline_does_not_stretch_the_hours_for_others(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    """The baseline waits until the time is up: what runs beside it is stopped, and nothing starts."""

    def both_run(session: Session) -> bool:
        if len(session.started) < 2:
            return False
        (tmp_path / "go").touch()
        return True

    pass_ten_hours(monkeypatch, when=both_run)
    space = scripted_space([1.0, 2.0, 3.0, 4.0], hours=5.0)
    assert run(space, tmp_path, concurrent=2, _0_01="wait", _1="wait") == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "stopped_early")]
    assert records.read(tmp_path)[1]["epochs"] < 4


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_epoch_that_the_driver_did_not_live_to_see_is_compared_after_all(ray_cluster, tmp_path: Path) -> None:
    """The checkpoint of a rung's epoch was stored, and the driver died before the study knew."""
    space = scripted_space([5.0, 1.0], {"name": "asha", "min_epochs": 2, "reduction": 2})
    (tmp_path / "trials").mkdir()
    folder = tmp_path / "trials/attempt-1/abc123-0002/checkpoint_000001"
    folder.mkdir(parents=True)
    rows = [{"epoch": epoch, "value": 0.1, "compared": 0.1 + epoch / 1000} for epoch in (1, 2)]
    reached = ScriptedTask(tmp_path).fresh() | {"epochs": 2, "history": rows, "value": 0.102, "best_epoch": 2}
    write_json(folder / "progress.json", reached)
    checkpoint.seal(folder)
    assert run(space, tmp_path) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (5, "completed"), (1, "stopped_early")]
    found = records.read(tmp_path)[2]
    assert found["reason"] == "not among the best at epoch 2"
    assert [row["epoch"] for row in found["history"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_run_side_by_side_and_the_budget_is_exact(ray_cluster, tmp_path: Path) -> None:
    space = scripted_space([1.0, 2.0, 3.0], trials=6)
    assert run(space, tmp_path, concurrent=2) == "finished"
    assert len(ends(tmp_path)) == 6
    assert len({json.dumps(record["params"]) for record in records.read(tmp_path)}) == 6


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_that_waits_for_a_worker_is_charged_nothing(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    cores = int(search.ray.cluster_resources()["CPU"])
    # The baseline, which makes nobody wait, has left its worker.
    pass_ten_hours(monkeypatch, when=lambda session: len(session.started) == cores and session._baseline_ended())
    values = [float(n) for n in range(1, cores + 4)]
    waits = {f"_{n:g}": "wait at once" for n in values}
    assert run(scripted_space(values, hours=5.0), tmp_path, concurrent=cores + 2, **waits) == "finished"
    held = [record["device_seconds"] for record in records.read(tmp_path) if record["status"] == "stopped_early"]
    assert len([seconds for seconds in held if seconds > 1]) == cores
    assert [seconds for seconds in held if seconds <= 1] == [0.0] * (len(held) - cores)
    assert len(held) > cores


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_more_at_once_than_fit_is_said(ray_cluster, tmp_path: Path, caplog) -> None:
    cores = int(search.ray.cluster_resources()["CPU"])
    for folder, concurrent in ((tmp_path / "more", cores + 3), (tmp_path / "as many", cores)):
        folder.mkdir()
        caplog.clear()
        assert run(scripted_space([]), folder, concurrent=concurrent) == "finished"
        said = f"--concurrent {concurrent}: only {cores} fit at once (1 CPU a trial, {cores} there)"
        assert [record.message for record in caplog.records] == ([said] if concurrent > cores else [])


def test_what_went_wrong_is_told_without_rays_wrapping() -> None:
    def wrapped(explicit: bool) -> Exception:
        try:
            try:
                raise OSError(5, "Input/output error")
            except OSError as error:
                raise search.tune.TuneError("Traceback (most recent call last): ...") from (error if explicit else None)
        except search.tune.TuneError as error:
            return error

    assert str(search._cause(wrapped(True))) == "[Errno 5] Input/output error"
    assert str(search._cause(wrapped(False))) == "[Errno 5] Input/output error"
    alone = search.tune.TuneError("Ray's own")
    assert search._cause(alone) is alone


class FailsAt(Tracker):
    """Raises at one event."""

    def __init__(self, event: str) -> None:
        def fail(*_: Any) -> None:
            self.told += 1
            raise OSError(f"no {event}")

        self.told = 0
        setattr(self, event, fail)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_watching_changes_nothing(ray_cluster, tmp_path: Path) -> None:
    """By nobody, by W&B and TensorBoard, by trackers that fail, one at each event."""
    space = scripted_space([1.0, 2.0, 3.0, 4.0, 2.5, 5.0], {"name": "asha", "min_epochs": 1, "reduction": 2})
    behaviour = {"_2": "crash", "_3": "die once", "_4": "late", "_5": "diverge"}
    found = {}
    failing = [
        FailsAt(event) for event in ("trial_started", "epoch_ended", "trial_held", "trial_ended", "search_ended")
    ]
    for name, trackers in (
        ("nobody", Trackers()),
        ("wandb and tensorboard", tracking.build("offline", tensorboard=True, terminal=False, wait_s=60)),
        ("failing", Trackers([*failing, FailsAt("search_started")])),
    ):
        folder = tmp_path / name
        folder.mkdir()
        info = tracking.RunInfo(
            name, "abc123", folder, space.to_dict(), {"delta_cls_loss": 0.01}, 7, None, "dice_mean", "max"
        )
        trackers.search_started(info)
        state = run(space, folder, tracker=trackers, **behaviour)
        trackers.search_ended(state)
        kept = records.read(folder)
        for record in kept:
            for time_of in ("started", "ended", "seconds", "device_seconds", "traceback"):
                record.pop(time_of, None)
        found[name] = state, kept
    assert found["nobody"] == found["wandb and tensorboard"] == found["failing"]
    assert {record["status"] for record in found["nobody"][1]} == {"completed", "diverged", "failed", "stopped_early"}
    assert [tracker.told for tracker in failing] == [1, 1, 1, 1, 1]  # switched off at their first
    assert len(list((tmp_path / "wandb and tensorboard/wandb").glob("offline-run-*"))) == 7


class Uses(Tracker):
    """Remembers what was used in each epoch."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], dict[str, float]] = {}

    def epoch_ended(self, trial, figures, use, previews) -> None:
        self.seen[trial, figures["epoch"]] = use


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trackers_are_told_what_a_worker_used_and_records_are_not(ray_cluster, tmp_path: Path) -> None:
    uses = Uses()
    assert run(scripted_space([1.0]), tmp_path, tracker=uses) == "finished"
    assert [*uses.seen] == [(f"abc123-{number:04d}", epoch) for number in range(2) for epoch in range(1, 5)]
    for use in uses.seen.values():
        assert set(use) == {"cpu_percent", "memory_mib"}
        assert 0 < use["cpu_percent"] < 100 * ((os.cpu_count() or 1) + 1)
        assert 20 < use["memory_mib"] < 4096  # a Python that has imported torch and Ray
    assert len({use["cpu_percent"] for use in uses.seen.values()}) > 4  # each epoch has a reading of its own
    kept = [tmp_path / "records.jsonl", tmp_path / "study.journal", *tmp_path.glob("trials/**/progress.json")]
    assert len(kept) > 3
    assert not [path for path in kept if b"cpu_percent" in path.read_bytes()]
