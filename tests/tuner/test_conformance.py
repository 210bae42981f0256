"""Every combination of sampler, scheduler and kind of space that is offered, through ask, report, stop, fail and resume on
a real Optuna journal; a part of them, in which each of the three is, on SQLite; and the table of those that are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.tuner.conftest import ended, small_space
from tuner import schedulers
from tuner.sampler import SearchStudy
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

REFUSED = {
    ("cmaes", "categorical"), ("cmaes", "conditional"), ("cmaes", "one"), ("gp", "conditional"),
    ("qmc", "categorical"), ("qmc", "conditional"), ("grid", "numbers"),
}  # fmt: skip


def space_of(sampler: str, scheduler: str, search: str) -> Space:
    return small_space(
        search=SEARCHES[search],
        train={"width": 0.1, "epochs": 9},
        sampler=sampler,
        scheduler=scheduler if scheduler == "none" else {"name": scheduler, "min_epochs": 1, "reduction": 2},
        budget={"trials": 100},
    )


def figure(params: dict[str, Any], epoch: int) -> float:
    """A curve that follows from the configuration."""
    numbers = [float(value) for value in params.values() if not isinstance(value, str)]
    return 1 / (1 + sum(numbers)) + epoch / 100


def run_one(study: SearchStudy, end: str) -> str | None:
    """One trial as a search drives it; how it ended, None where there is nothing left."""
    proposal = study.ask()
    if proposal is None:
        return None
    assert study.space.contains(proposal.params)
    reason = None
    for epoch in range(1, proposal.config.epochs + 1):
        if end != "completed" and epoch == 4:
            study.finish(proposal, ended(proposal, end, value=None, epochs=epoch - 1, replays=[]))
            return end
        study.report(proposal.number, epoch, figure(proposal.params, epoch))
        if not proposal.is_baseline:
            reason = schedulers.stops(study.space.scheduler, 9, proposal.number, epoch - 1, study.curves())
        if reason:
            break
    status = "stopped_early" if reason else "completed"
    value = figure(proposal.params, epoch)
    study.finish(proposal, ended(proposal, status, value=value, epochs=epoch, best_epoch=epoch, replays=[]))
    return status


OFFERED = [
    combination
    for combination in itertools.product(SAMPLERS, SCHEDULERS, SEARCHES)
    if (combination[0], combination[2]) not in REFUSED
]

COVERING = [
    ("tpe", "asha", "conditional"), ("tpe", "hyperband", "categorical"), ("gp", "median", "numbers"),
    ("cmaes", "none", "numbers"), ("qmc", "asha", "one"), ("random", "hyperband", "one"), ("grid", "none", "steps"),
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
    space = space_of(sampler, scheduler, search)
    where = place(tmp_path, storage)
    study = SearchStudy(space, "abc123", where)
    ends = [run_one(study, end) for end in ("completed", "completed", "diverged", "failed", *["completed"] * 5)]
    left = study.ask()  # killed while it ran
    study.report(left.number, 1, 0.5)

    again = SearchStudy(space, "abc123", where)
    found = again.ask()
    assert found == left
    again.finish(found, ended(found, value=0.5, replays=[]))
    ends += ["completed"] + [run_one(again, "completed") for _ in range(3)]
    states = {"completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED}
    trials = again._study.get_trials(deepcopy=False)
    assert all(trial.state.is_finished() for trial in trials)
    trials = [
        trial for trial in trials if not trial.user_attrs["record"]["replayed_from"]
    ]  # the same point drawn again
    assert [trial.state for trial in trials] == [states.get(end, TrialState.FAIL) for end in ends if end]
    assert [trial.user_attrs["record"]["status"] for trial in trials] == [end for end in ends if end]
    if scheduler == "none":
        assert "stopped_early" not in ends


@pytest.mark.parametrize(("sampler", "search"), sorted(REFUSED))
def test_what_cannot_work_is_refused_at_load(sampler: str, search: str) -> None:
    with pytest.raises(SpaceError, match=r"sampler: .*(draws no|needs)"):
        space_of(sampler, "none", search)


def test_each_kind_is_covered_on_sqlite() -> None:
    assert [set(part) for part in zip(*COVERING, strict=True)] == [set(SAMPLERS), set(SCHEDULERS), set(SEARCHES)]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_grid_is_walked_once_and_over_all_sessions(storage: str, tmp_path: Path) -> None:
    where = place(tmp_path, storage)
    space = space_of("grid", "none", "conditional")
    seen: list[str] = []
    for _ in range(40):
        study = SearchStudy(space, "abc123", where)
        if run_one(study, "completed") is None:
            break
        seen.append(str(study.records()[-1]["params"]))
    assert len(seen) == len(set(seen)) == len(space.grid()) == 31
    assert SearchStudy(space, "abc123", where).ask() is None
