"""Every combination of sampler, scheduler, kind of space and goals that is offered, through ask, report, stop, fail and
resume on a real Optuna journal; a part of them, in which each kind is, on SQLite; and the table of those that are
refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.tuner.conftest import ended, small_space
from tuner import records, schedulers
from tuner.sampler import Proposal, SearchStudy
from tuner.space import SAMPLERS, SCHEDULERS, Space, SpaceError

SEARCHES: dict[str, dict[str, Any]] = {
    "numbers": {
        "learning_rate": {"type": "float", "low": 0.01, "high": 2.0, "log": True},
        "dilate": {"type": "int", "low": 1, "high": 9, "step": 2},
    },
    "steps": {
        "augment_brightness": {"type": "float", "low": 0.0, "high": 0.4, "step": 0.1},
        "dilate": {"type": "int", "low": 1, "high": 9, "step": 2},
    },
    "categorical": {
        "optimizer": {"type": "categorical", "choices": ["sgd", "adam"]},
        "learning_rate": {"type": "float", "low": 0.1, "high": 1.0, "step": 0.1},
    },
    "conditional": {
        "optimizer": {"type": "categorical", "choices": ["sgd", "adam"]},
        "dilate": {"type": "int", "low": 1, "high": 59, "step": 2, "when": {"optimizer": "adam"}},
    },
    "one": {"dilate": {"type": "int", "low": 1, "high": 99, "step": 2}},
}
MASKS = {
    "dilate": {"type": "int", "low": 1, "high": 19, "step": 2},
    "num_segmented": {"type": "int", "low": 10, "high": 40, "step": 10},
}
_FIGURE = {"metric": "dice_mean", "mode": "max"}
_BOUNDS = [{"metric": "recall", "min": 0.5}, {"metric": "decision_specificity", "min": 0.25}]
GOALS: dict[str, dict[str, Any]] = {
    "masks": {"objective": [_FIGURE, {"metric": "num_segmented", "mode": "min"}]},
    "minutes": {
        "objective": [_FIGURE, {"metric": "labelling_minutes", "mode": "min"}],
        "labelling": {"minutes_per_label": 0.05, "minutes_per_mask": 2.0},
    },
    "seconds": {"objective": [_FIGURE, {"metric": "device_seconds", "mode": "min"}]},
    "constraints": {"constraints": _BOUNDS},
    "masks and constraints": {
        "objective": [_FIGURE, {"metric": "num_segmented", "mode": "min"}],
        "constraints": _BOUNDS,
    },
}
ALL_MASKS = 50

REFUSED = {
    ("cmaes", "categorical"), ("cmaes", "conditional"), ("cmaes", "one"), ("gp", "conditional"),
    ("qmc", "categorical"), ("qmc", "conditional"), ("grid", "numbers"),
}  # fmt: skip


REFUSED_GOALS = [("cmaes", "none", goals) for goals in GOALS] + [
    ("tpe", scheduler, "seconds") for scheduler in SCHEDULERS if scheduler != "none"
]


def space_of(sampler: str, scheduler: str, search: dict[str, Any], **goals: Any) -> Space:
    return small_space(
        search=search,
        train={"width": 0.1, "epochs": 9},
        sampler=sampler,
        scheduler=scheduler if scheduler == "none" else {"name": scheduler, "min_epochs": 1, "reduction": 2},
        budget={"trials": 100},
        **goals,
    )


def figure(params: dict[str, Any], epoch: int) -> float:
    """A curve that follows from the configuration; more masks are better."""
    numbers = [float(value) for name, value in params.items() if name != "num_segmented" and not isinstance(value, str)]
    return 1 / (1 + sum(numbers)) + epoch / 100 + params.get("num_segmented", 0) / 200


def judged(proposal: Proposal, value: float, epoch: int) -> dict[str, Any]:
    """What a worker adds where masks are a cost or figures are bounded: half of the trials meet the first bound, and
    the second figure does not exist for a tenth."""
    dilate = proposal.config.dilate
    figures = {"recall": 1 - dilate / 20, "decision_specificity": None if dilate == 5 else 0.5}
    own = proposal.config.judgement()._asdict() | {"value": value, "epoch": epoch, "thresholds": None}
    kept = proposal.config.num_segmented
    masks = ALL_MASKS if kept == "all" else kept
    return {"replays": [own | {"figures": figures}], "num_segmented": masks, "labelled": 100}


def run_one(study: SearchStudy, end: str) -> tuple[int | None, str] | None:
    """One trial, or the next part of one that was held, as a search drives it: its number and how it ended; None where
    there is nothing left."""
    proposal = study.ask()
    if proposal is None:
        return None
    assert proposal.number is None or study.space.contains(proposal.params)
    before = 0
    if proposal.number is not None:
        before = max(study._study.get_trials(deepcopy=False)[proposal.number].intermediate_values, default=0)
    reason = None
    for epoch in range(before + 1, proposal.config.epochs + 1):
        study.report(proposal.number, epoch, figure(proposal.params, epoch))
        if end != "completed":
            study.finish(proposal, ended(proposal, end, value=None, epochs=epoch, replays=[]))
            return proposal.number, end
        reason = None if proposal.is_baseline else study.leaves(proposal, epoch)
        if reason:
            break
    status = "stopped_early" if reason else "completed"
    value = figure(proposal.params, epoch)
    more: dict[str, Any] = {"replays": []}
    if study.space.cost or study.space.constraints:
        more = judged(proposal, value, epoch) | {"device_seconds": 10.0 + proposal.config.dilate % 7}
    record = ended(proposal, status, value=value, epochs=epoch, best_epoch=epoch, **more)
    if reason and schedulers.may_go_on(study.space.scheduler):
        study.hold(proposal, record)
    else:
        study.finish(proposal, record)
    return proposal.number, status


OFFERED = [
    combination
    for combination in itertools.product(SAMPLERS, SCHEDULERS, SEARCHES)
    if (combination[0], combination[2]) not in REFUSED
]

COVERING = [
    ("tpe", "asha", "conditional"), ("tpe", "hyperband", "categorical"), ("gp", "median", "numbers"),
    ("cmaes", "top_k", "numbers"), ("qmc", "asha", "one"), ("random", "hyperband", "one"), ("grid", "none", "steps"),
    ("grid", "median", "conditional"),
]  # fmt: skip
"""each sampler, scheduler and kind of space at least once"""


def place(folder: Path, storage: str) -> Path | str:
    return folder / "study.journal" if storage == "journal" else f"sqlite:///{folder}/study.db"


@pytest.mark.parametrize(
    ("storage", "sampler", "scheduler", "search"),
    [("journal", *combination) for combination in OFFERED] + [("sqlite", *combination) for combination in COVERING],
)
def test_what_is_offered_works(storage: str, sampler: str, scheduler: str, search: str, tmp_path: Path) -> None:
    drive(space_of(sampler, scheduler, SEARCHES[search]), place(tmp_path, storage))


@pytest.mark.parametrize(
    ("sampler", "scheduler", "goals"),
    [
        combination
        for combination in itertools.product(SAMPLERS, SCHEDULERS, GOALS)
        if combination[0] != "cmaes"
        and (combination[1] == "none" or combination[2] != "seconds")
        and (combination[0] == "tpe" or combination[1] in ("none", "asha"))  # a scheduler knows no sampler
    ],
)
def test_what_is_offered_works_with_other_goals(sampler: str, scheduler: str, goals: str, tmp_path: Path) -> None:
    space = space_of(sampler, scheduler, MASKS, **GOALS[goals])
    study = drive(space, tmp_path / "study.journal")
    found = study.records()
    assert found[0]["baseline"]
    assert found[0]["number"] is None  # it keeps all masks
    trials = study._study.get_trials(deepcopy=False)
    for record in found:
        number, status = record["number"], record["status"]
        trial = trials[number] if number is not None else None
        if space.cost:
            seconds = 10.0 + record["config"]["dilate"] % 7
            kept = record["config"]["num_segmented"]
            masks = ALL_MASKS if kept == "all" else kept
            costs = {"num_segmented": masks, "labelling_minutes": 5.0 + 2 * masks, "device_seconds": seconds}
            cost = costs[space.cost.metric]
            assert record["values"] == (None if record["value"] is None else [record["value"], cost])
            if trial is not None:
                assert trial.values == (record["values"] if status == "completed" else None)
        if space.constraints:
            dilate = record["config"]["dilate"]
            beyond = {"recall": max(0.0, dilate / 20 - 0.5), "decision_specificity": 1.0 if dilate == 5 else 0.0}
            assert record["violations"] == (None if record["value"] is None else pytest.approx(beyond))
            if trial is not None and record["violations"]:
                told = {"recall": dilate / 20 - 0.5, "decision_specificity": 1.0 if dilate == 5 else -0.25}
                assert trial.constraints == pytest.approx(told)
        if status == "stopped_early":
            assert trial is not None
            if not record["replayed_from"]:
                assert len(trial.intermediate_values) == record["epochs"]
    inside = [record for record in found if record["number"] is not None]
    if space.cost:
        front = records.pareto_front(inside, [objective.mode for objective in space.objectives])
        assert [record["number"] for record in front] == [trial.number for trial in study._study.best_trials]
        assert front or space.constraints
    elif best := records.best(inside):
        assert best["number"] == study._study.best_trial.number
    else:
        with pytest.raises(ValueError, match="No feasible trials"):
            _ = study._study.best_trial


def drive(space: Space, where: Path | str) -> SearchStudy:
    """A dozen trials that end in all ways, with a kill among them; the study afterwards."""
    study = SearchStudy(space, "abc123", where)
    ends = [run_one(study, end) for end in ("completed", "completed", "diverged", "failed", *["completed"] * 6)]
    left = study.ask()  # killed while it ran
    study.report(left.number, 1, 0.5)
    held = study.records()

    again = SearchStudy(space, "abc123", where)
    assert again.records() == held
    found = again.ask()
    assert found == left
    more = judged(found, 0.5, 1) if space.cost or space.constraints else {"replays": []}
    again.finish(found, ended(found, value=0.5, **more | {"device_seconds": 10.0 + found.config.dilate % 7}))
    ends += [(found.number, "completed")] + [run_one(again, "completed") for _ in range(3)]
    last = dict(end for end in ends if end)  # a trial that was held and went on has two ends
    again.let_go(for_good=True)
    states = {"completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED}
    trials = again._study.get_trials(deepcopy=False)
    assert all(trial.state.is_finished() for trial in trials)
    trials = [
        trial for trial in trials if not trial.user_attrs["record"]["replayed_from"]
    ]  # the same point drawn again
    inside = {number: end for number, end in last.items() if number is not None}
    assert {t.number: t.state for t in trials} == {n: states.get(end, TrialState.FAIL) for n, end in inside.items()}
    assert {trial.number: trial.user_attrs["record"]["status"] for trial in trials} == inside
    if space.scheduler.name == "none":
        assert "stopped_early" not in last.values()
    return again


@pytest.mark.parametrize(("sampler", "search"), sorted(REFUSED))
def test_what_cannot_work_is_refused_at_load(sampler: str, search: str) -> None:
    with pytest.raises(SpaceError, match=r"sampler: .*(draws no|needs)"):
        space_of(sampler, "none", SEARCHES[search])


@pytest.mark.parametrize(("sampler", "scheduler", "goals"), REFUSED_GOALS)
def test_goals_that_cannot_work_are_refused_at_load(sampler: str, scheduler: str, goals: str) -> None:
    with pytest.raises(SpaceError, match=r"sampler: cmaes knows nothing of|scheduler: must be none where"):
        space_of(sampler, scheduler, MASKS, **GOALS[goals])


def test_tpe_ranks_what_was_stopped_where_there_are_two_objectives(tmp_path: Path) -> None:
    """Optuna 5.0's own study raises there: its TPE asks for the one direction."""
    study = SearchStudy(space_of("tpe", "asha", MASKS, **GOALS["masks"]), "abc123", tmp_path / "study.journal")
    for _ in range(10):
        run_one(study, "completed")
    stopped = study.let_go(for_good=True)
    assert len(stopped) >= 2
    trials = study._study.get_trials(deepcopy=False)
    assert {trials[record["number"]].state for record in stopped} == {TrialState.PRUNED}
    assert all(run_one(study, "completed") for _ in range(10))


def test_each_kind_is_covered_on_sqlite() -> None:
    assert [set(part) for part in zip(*COVERING, strict=True)] == [set(SAMPLERS), set(SCHEDULERS), set(SEARCHES)]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_grid_is_walked_once_and_over_all_sessions(storage: str, tmp_path: Path) -> None:
    where = place(tmp_path, storage)
    space = space_of("grid", "none", SEARCHES["conditional"])
    seen: list[str] = []
    for _ in range(40):
        study = SearchStudy(space, "abc123", where)
        if run_one(study, "completed") is None:
            break
        seen.append(str(study.records()[-1]["params"]))
    assert len(seen) == len(set(seen)) == len(space.grid()) == 31
    assert SearchStudy(space, "abc123", where).ask() is None
