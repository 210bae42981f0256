"""The test bed of bench/testbed.py: its clock, its order of events, and that it stops what a search on Ray stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.strategies import EPOCHS, SPACE, Landscape, RayOptuna, distance, one_epoch_keeping
from bench.testbed import Curve, Search, Start, StudyStrategy, Trial, simulate
from tests.tuner.conftest import small_space
from tests.tuner.test_search import run, scripted_space
from tuner import records
from tuner.cluster import connected
from tuner.space import Scheduler, Space


@dataclass
class Scripted:
    """Starts what it is told to, stops what it is told to, and writes down what it sees."""

    starts: list[Start]
    stops: dict[int, int] = field(default_factory=dict)
    """trial -> the epoch after which it is stopped"""
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def ask(self) -> Start | None:
        return self.starts.pop(0) if self.starts else None

    def goes_on(self, trial: Trial) -> bool:
        self.seen.append(("epoch", trial.number, trial.epoch))
        return self.stops.get(trial.number) != trial.epoch

    def ended(self, trial: Trial) -> None:
        self.seen.append((trial.status, trial.number, trial.epoch))


def as_told(params: Mapping[str, Any]) -> Curve:
    return Curve(np.array(params["values"]), params["seconds"])


def start(seconds: float, *values: float, epoch: int = 0) -> Start:
    return Start({"values": values, "seconds": seconds}, epoch=epoch)


def times(found: Search) -> list[tuple[float, float | None]]:
    return [(trial.started, trial.ended) for trial in found.trials]


def test_events_come_in_the_order_of_the_virtual_clock() -> None:
    strategy = Scripted([start(4, 0.1, 0.2), start(3, 0.3, 0.1), start(1, 0.4, 0.4)])
    found = simulate(strategy, as_told, workers=2, trials=9)
    assert times(found) == [(0, 8), (0, 6), (6, 8)]
    assert strategy.seen == [
        ("epoch", 1, 1),  # at 3
        ("epoch", 0, 1),  # at 4
        ("completed", 1, 2),  # at 6
        ("epoch", 2, 1),  # at 7
        ("completed", 0, 2),  # at 8, begun at 4
        ("completed", 2, 2),  # at 8, begun at 7
    ]
    assert [trial.spent for trial in found.trials] == [5, 3, 6]
    assert (found.epochs, found.clock) == (6, 8)


def test_a_trial_that_is_stopped_frees_its_worker_then() -> None:
    strategy = Scripted([start(2, 0.1, 0.1, 0.1), start(5, 0.2, 0.2, 0.2)], stops={0: 1})
    found = simulate(strategy, as_told, workers=1, trials=2)
    assert times(found) == [(0, 2), (2, 17)]
    assert [trial.status for trial in found.trials] == ["stopped_early", "completed"]


def test_what_diverges_ends_there_and_has_no_value_for_that_epoch() -> None:
    found = simulate(Scripted([start(1, 0.3, np.nan, 0.9)]), as_told, workers=1, trials=1)
    (trial,) = found.trials
    assert (trial.status, trial.epoch, trial.value, found.epochs) == ("diverged", 1, 0.3, 2)
    assert found.pick(10) is None


def test_a_trial_may_go_on_where_another_ended() -> None:
    found = simulate(Scripted([start(1, 0.9, 0.2, 0.3, epoch=1)]), as_told, workers=1, trials=1)
    assert (found.epochs, found.clock, found.trials[0].value) == (2, 2, 0.9)


def test_a_spent_budget_stops_what_runs_and_starts_nothing() -> None:
    strategy = Scripted([start(1, 0.1, 0.1), start(3, 0.2, 0.2), start(1, 0.3, 0.3)])
    found = simulate(strategy, as_told, workers=2, epochs=2)
    assert [(trial.status, trial.epoch, trial.ended) for trial in found.trials] == [
        ("completed", 2, 2),
        ("stopped_early", 0, 2),
    ]


def toy(seed: int, **parts: Any) -> Space:
    return replace(SPACE, seed=seed, **parts)


def course(found: Search) -> list[tuple[Any, ...]]:
    return [(dict(t.params), t.started, t.ended, t.status, t.epoch) for t in found.trials]


def test_equal_seeds_are_equal_searches() -> None:
    first, again, other = (
        simulate(StudyStrategy(toy(seed)), Landscape(seed, False).curve, epochs=5 * EPOCHS) for seed in (1, 1, 2)
    )
    assert course(first) == course(again)
    assert course(first) != course(other)


def test_a_longer_search_had_found_what_a_shorter_one_finds() -> None:
    short, long = (
        simulate(StudyStrategy(toy(3)), Landscape(3, False).curve, epochs=trainings * EPOCHS) for trainings in (4, 8)
    )
    picked, same = short.pick(4 * EPOCHS), long.pick(4 * EPOCHS)
    assert picked is not None
    assert same is not None
    assert same.params == picked.params


@pytest.mark.timeout(60)
def test_hundreds_of_small_searches_run_in_seconds() -> None:
    space = toy(0, scheduler=Scheduler(name="asha"), sampler="random")
    for seed in range(200):
        found = simulate(StudyStrategy(replace(space, seed=seed)), Landscape(seed, False).curve, epochs=2 * EPOCHS)
        assert found.epochs == 2 * EPOCHS


def test_the_study_is_told_every_end_as_what_it_was() -> None:
    strategy = StudyStrategy(toy(1))
    found = simulate(strategy, Landscape(1, False).curve, epochs=6 * EPOCHS)
    strategy.study.let_go(for_good=True)
    states = {"completed": "COMPLETE", "stopped_early": "PRUNED", "diverged": "FAIL"}
    last = {trial.handle.number: trial for trial in found.trials}  # a trial that was held and went on stands twice
    assert len(last) < len(found.trials)
    told = {t.number: (t.state.name, len(t.intermediate_values)) for t in strategy.study._study.trials}
    assert told == {number: (states[trial.status], trial.epoch) for number, trial in last.items()}
    assert {state for state, _ in told.values()} == set(states.values())
    assert found.trials[0].status == "completed"  # the baseline
    assert {record["number"]: record["value"] for record in strategy.study.records()} == {
        number: trial.value if trial.epoch else None for number, trial in last.items()
    }


def test_a_baseline_outside_the_space_is_simulated_too() -> None:
    space = small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"}, scheduler={"name": "asha"})
    strategy = StudyStrategy(space)
    found = simulate(strategy, lambda _: Curve(np.array([0.1, 0.2, 0.3])), trials=3)
    assert [record["number"] for record in strategy.study.records()] == [None, 0, 1]
    assert [trial.handle.is_baseline for trial in found.trials] == [True, False, False]
    assert found.trials[0].params == {"learning_rate": 1.0, "threshold_rule": "pr_curve"}


def test_one_epoch_spends_its_budget_on_candidates_and_the_best_of_them() -> None:
    budget = 10
    found = simulate(one_epoch_keeping(3)(toy(0), budget), Landscape(0, False).curve, epochs=budget * EPOCHS)
    candidates = 9 * EPOCHS - 3 * (EPOCHS - 1)
    assert found.trials[0].status == "completed"
    assert {trial.epoch for trial in found.trials[1 : 1 + candidates]} <= {0, 1}
    one_epoch_old = [t for t in found.trials[1 : 1 + candidates] if t.status == "stopped_early"]
    best = sorted(one_epoch_old, key=lambda trial: (-trial.value, trial.number))[:3]
    assert [trial.params for trial in found.trials[1 + candidates :]] == [trial.params for trial in best]
    assert {trial.status for trial in found.trials[1 + candidates :]} == {"completed"}
    assert found.epochs <= budget * EPOCHS  # those that diverged spent less than an epoch is worth


def test_ray_s_searcher_is_told_that_what_asha_stopped_is_complete() -> None:
    strategy = RayOptuna(toy(0))
    found = simulate(strategy, Landscape(0, False).curve, epochs=6 * EPOCHS)
    stopped = [n for n, t in enumerate(found.trials) if t.status == "stopped_early"]
    told = strategy.searcher._ot_study.trials
    assert len(stopped) > 5
    assert {told[n].state.name for n in stopped} == {"COMPLETE"}
    assert found.trials[0].params == toy(0).baseline_params()


def test_every_landscape_has_a_best_point_that_learns() -> None:
    for seed in range(20):
        for misleading in (False, True):
            landscape = Landscape(seed, misleading)
            best = landscape.best()
            assert SPACE.contains(best)
            assert landscape.true_score(best) == pytest.approx(0.95)
            assert landscape.curve(best).values_E[-1] == pytest.approx(0.95, abs=0.1)


def test_a_distance_is_in_standard_errors_of_the_pairs() -> None:
    ours = np.array([0.1, 0.5, 0.9])
    assert distance(ours + np.array([0.1, 0.2, 0.3]), ours) == pytest.approx(0.2 / (0.1 / 3**0.5))
    assert distance(ours, ours) == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_test_bed_stops_what_a_search_on_ray_stops(tmp_path: Path) -> None:
    """With one worker: after the scripted points, what TPE proposes is the same too."""
    space = scripted_space([2.0, 1.0, 3.0, 5.0, 4.0], {"name": "asha", "min_epochs": 1, "reduction": 2}, trials=9)

    def curve(params: Mapping[str, Any]) -> Curve:  # as ScriptedTask
        return Curve(params["delta_cls_loss"] / 10 + np.arange(1, 5) / 1000)

    with connected(None):
        assert run(space, tmp_path) == "finished"
    simulated = StudyStrategy(space, trials=9)
    simulate(simulated, curve, workers=1, epochs=100)
    simulated.study.let_go(for_good=True)
    told = [
        [(r["params"], r["status"], r["reason"], r["epochs"], r["value"]) for r in found]
        for found in (records.read(tmp_path), simulated.study.records())
    ]
    assert told[0] == told[1]
    assert {status for _, status, *_ in told[0]} == {"completed", "stopped_early"}
