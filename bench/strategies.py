"""The platform's default strategy (TPE with ASHA) against others, on made-up problems and a virtual clock.

    python -m bench.strategies [--searches 100] [--workers 4]

A problem has four parameters, real fields of a search space, and a best configuration, drawn anew for each search, of
true score 0.95. Learning curves have 27 epochs, rise at a speed that depends on the configuration, and are seen with
noise 0.02; some learning rates diverge, some stay flat. In the variant `misleading` large learning rates learn fast
and end low, and the best one learns slowly.

Budgets are in full trainings, the baseline's included. The score of a strategy is the true final score of the
configuration that it would pick: the completed trial with the best value. Prints Markdown: means with standard errors
over searches, and in brackets the paired difference to the default in its own standard errors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from bench.testbed import Curve, Curves, Search, Start, Strategy, StudyStrategy, Trial, simulate
from model.arrays import Floats
from tuner import space_file
from tuner.space import FloatParam, IntParam, Param, Scheduler, Space

EPOCHS = 27
BUDGETS = (10, 20, 40)
"""full trainings"""
VARIANTS = ("plain", "misleading")
NOISE = 0.02
TOP = 0.95

SPACE = space_file.parse(
    {
        "name": "toy",
        "data": {},
        "train": {"epochs": EPOCHS},
        "search": {
            "learning_rate": {"type": "float", "low": 0.001, "high": 10.0, "log": True},
            "delta_cls_loss": {"type": "float", "low": 0.0001, "high": 1.0, "log": True},
            "dilate": {"type": "int", "low": 1, "high": 15, "step": 2},
            "augment_brightness": {"type": "float", "low": 0.0, "high": 0.4},
        },
        "scheduler": {"name": "asha"},
        "budget": {"trials": max(BUDGETS)},
    }
)
_WIDTHS = {"learning_rate": 0.12, "delta_cls_loss": 0.25, "dilate": 0.4, "augment_brightness": 0.6}
"""so far from the best, as shares of the ranges, the score falls to 0.95 * exp(-1/2)"""


@dataclass(frozen=True)
class Landscape:
    """A problem: what each configuration is worth and how it learns. Equal seeds are equal problems."""

    seed: int
    misleading: bool

    def best(self) -> dict[str, float]:
        """The best configuration, inside the space and with a learning rate from 0.03 to 0.6."""
        rng = np.random.default_rng([self.seed, 0])
        return {
            "learning_rate": float(10 ** rng.uniform(-1.5, -0.25)),
            "delta_cls_loss": float(10 ** rng.uniform(-3.5, -0.5)),
            "dilate": int(rng.integers(1, 7) * 2 + 1),
            "augment_brightness": float(rng.uniform(0.05, 0.35)),
        }

    def true_score(self, params: Mapping[str, Any]) -> float:
        """Of the last epoch, without noise; 0 where training diverges."""
        best = self.best()
        decades = float(np.log10(params["learning_rate"] / best["learning_rate"]))
        if self._diverges(decades, params):
            return 0.0
        if decades < -2:
            return 0.02
        distances = [(_unit(name, params[name]) - _unit(name, best[name])) / width for name, width in _WIDTHS.items()]
        return float(TOP * np.exp(-np.square(distances).sum() / 2))

    def curve(self, params: Mapping[str, Any]) -> Curve:
        """What a search sees."""
        text = json.dumps(dict(sorted(params.items())))
        rng = np.random.default_rng([self.seed, 1, zlib.crc32(text.encode())])
        decades = float(np.log10(params["learning_rate"] / self.best()["learning_rate"]))
        epochs_E = np.arange(1, EPOCHS + 1)
        if decades < -2:
            rise_E = np.ones(EPOCHS)
        else:
            scale = self._epochs_to_learn(decades, params)
            rise_E = (1 - np.exp(-epochs_E / scale)) / (1 - np.exp(-EPOCHS / scale))
        values_E = np.clip(self.true_score(params) * rise_E + NOISE * rng.standard_normal(EPOCHS), 0, 1)
        if self._diverges(decades, params):
            values_E[rng.integers(0, 3) :] = np.nan
        return Curve(values_E, float(rng.uniform(0.8, 1.2)))

    def _epochs_to_learn(self, decades: float, params: Mapping[str, Any]) -> float:
        """After which 63 % of the way is gone: fewer the larger the learning rate is, more with augmentation."""
        if self.misleading:
            return float(np.clip(12 * 10 ** (-0.9 * decades), 0.7, 30))
        return float(np.clip(4 * (1 + params["augment_brightness"]) * 10 ** (-0.5 * decades), 1.5, 15))

    def _diverges(self, decades: float, params: Mapping[str, Any]) -> bool:
        return decades > 1 and params["learning_rate"] > 1  # the baseline's learning rate is 1


def _unit(name: str, value: float) -> float:
    """A value's place in its range, 0 to 1."""
    param = SPACE.search[name]
    assert isinstance(param, FloatParam | IntParam)
    scale: Callable[[float], float] = np.log if param.log else float
    return (scale(value) - scale(param.low)) / (scale(param.high) - scale(param.low))


class RayOptuna:
    """Ray Tune's own OptunaSearch and ASHA, called in the order in which Ray 2.60's controller calls them
    (ray/tune/execution/tune_controller.py, `_process_trial_result`): the result that ends a trial, of its own accord or
    by the scheduler, goes to `on_trial_complete` alone, and the study takes it for the value of a complete trial. The
    baseline is the first point, and ASHA may stop it."""

    def __init__(self, space: Space) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.searcher = OptunaSearch(
            {name: _distribution(param) for name, param in space.search.items()},
            metric="value",
            mode="max",
            points_to_evaluate=[dict(space.baseline_params() or {})],
            seed=space.seed,
        )
        self.scheduler = ASHAScheduler(
            time_attr="training_iteration", metric="value", mode="max", max_t=space.train["epochs"],
            grace_period=space.scheduler.min_epochs, reduction_factor=space.scheduler.reduction,
        )  # fmt: skip
        self.asked = 0

    def ask(self) -> Start:
        self.asked += 1
        key = str(self.asked)
        params = self.searcher.suggest(key)
        assert params is not None
        self.scheduler.on_trial_add(None, SimpleNamespace(trial_id=key))
        return Start(params, key)

    def goes_on(self, trial: Trial) -> bool:
        result = self._result(trial)
        action = self.scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial.handle), result)
        if action == TrialScheduler.STOP:
            return False
        self.searcher.on_trial_result(trial.handle, result)
        return True

    def ended(self, trial: Trial) -> None:
        if trial.status == "diverged":
            self.searcher.on_trial_complete(trial.handle, error=True)
        else:
            self.searcher.on_trial_complete(trial.handle, self._result(trial))

    def _result(self, trial: Trial) -> dict[str, Any]:
        return {"training_iteration": trial.epoch, "value": float(trial.curve.values_E[max(trial.epoch, 1) - 1])}


def _distribution(param: Param) -> optuna.distributions.BaseDistribution:
    if isinstance(param, FloatParam):
        return optuna.distributions.FloatDistribution(param.low, param.high, log=param.log, step=param.step)
    assert isinstance(param, IntParam)
    return optuna.distributions.IntDistribution(param.low, param.high, log=param.log, step=param.step)


@dataclass(frozen=True)
class Row:
    """A strategy of the table."""

    name: str
    make: Callable[[Space, int], Strategy]
    """of a space and a budget in full trainings"""
    knows_budget: bool = False
    """what it does from the start depends on the budget"""
    stops: bool = True
    """some trials are stopped early; else only as many are started as can be trained to the end"""


def study(sampler: str, scheduler: str) -> Callable[[Space, int], Strategy]:
    """The platform with a sampler and a scheduler."""
    return lambda space, _budget: StudyStrategy(replace(space, sampler=sampler, scheduler=Scheduler(name=scheduler)))


def one_epoch_keeping(kept: int | None) -> Callable[[Space, int], Strategy]:
    """One epoch for every random candidate, the rest for the best (Egele et al. 2023, arXiv 2307.15422): for so many,
    or for as many as half of the budget trains; the other half, or the rest, are candidates."""

    def make(space: Space, budget: int) -> Strategy:
        training = space.train["epochs"]
        epochs = (budget - 1) * training  # the baseline takes the others
        top = kept or epochs // 2 // (training - 1)
        trials = 1 + epochs - top * (training - 1)
        scheduler = Scheduler(name="top_k", keep=top)
        return StudyStrategy(replace(space, sampler="random", scheduler=scheduler), trials)

    return make


ROWS = (
    Row("**TPE + ASHA (default)**", study("tpe", "asha")),
    Row("random", study("random", "none"), stops=False),
    Row("TPE", study("tpe", "none"), stops=False),
    Row("random + ASHA", study("random", "asha")),
    Row("Ray's OptunaSearch + ASHA", lambda space, _budget: RayOptuna(space)),
    Row("one epoch, top 3", one_epoch_keeping(3), knows_budget=True),
    Row("one epoch, half the budget", one_epoch_keeping(None), knows_budget=True),
    Row("TPE + Hyperband", study("tpe", "hyperband")),
    Row("TPE + median rule", study("tpe", "median")),
)


def searched(
    row: Row, space: Space, curves: Curves, budgets: Sequence[int], workers: int
) -> tuple[Search, list[Trial | None]]:
    """The search of the last and largest of some budgets in full trainings, and what the row picks for each."""
    epochs = space.train["epochs"]

    def run(budget: int) -> Search:
        strategy = row.make(space, budget)
        if row.stops:
            return simulate(strategy, curves, workers=workers, epochs=budget * epochs)
        return simulate(strategy, curves, workers=workers, trials=budget)

    # What a search of 40 trainings had found after 10 is what one of 10 finds, unless it was planned for 40.
    needed = budgets if row.knows_budget else (max(budgets),) * len(budgets)
    runs = {budget: run(budget) for budget in set(needed)}
    searches = [runs[budget] for budget in needed]
    picks = [
        search.pick(budget * epochs) if row.stops else search.pick_of_first(budget)
        for search, budget in zip(searches, budgets, strict=True)
    ]
    return searches[-1], picks


@dataclass(frozen=True)
class Outcome:
    """What one strategy did on one problem."""

    scores: tuple[float, ...]
    """true scores of the picks, for each of BUDGETS; 0 without one"""
    asks: int
    ask_seconds: float
    other_seconds: float
    """real ones, of the strategy alone"""


def outcome(job: tuple[int, bool, int, int]) -> Outcome:
    """Of a row, on a variant, for a seed, with so many workers."""
    row_number, misleading, seed, workers = job
    landscape = Landscape(seed, misleading)
    search, picks = searched(ROWS[row_number], replace(SPACE, seed=seed), landscape.curve, BUDGETS, workers)
    seconds = search.strategy_seconds
    return Outcome(
        tuple(landscape.true_score(pick.params) if pick else 0.0 for pick in picks),
        len(search.trials),
        seconds["ask"],
        seconds["goes_on"] + seconds["ended"],
    )


def standard_error(values_S: Floats) -> float:
    """Of the mean over searches."""
    return float(values_S.std(ddof=1) / np.sqrt(len(values_S)))


def distance(scores_S: Floats, ours_S: Floats) -> float:
    """The mean paired difference to ours, in its standard errors; negative is worse than ours."""
    difference_S = scores_S - ours_S
    error = standard_error(difference_S)
    return float(difference_S.mean() / error) if error else 0.0


def table(rows: Sequence[Row], columns: Sequence[str], scores_RSC: Floats) -> Iterator[str]:
    """Lines of Markdown; shapes: R rows, S searches, C columns. The first row is the default."""
    yield f"| strategy | {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for row, scores_SC in zip(rows, scores_RSC, strict=True):
        cells = [
            f"{scores_S.mean():.3f} ± {standard_error(scores_S):.3f}"
            + ("" if row is rows[0] else f" ({distance(scores_S, ours_S):+.1f})")
            for scores_S, ours_S in zip(scores_SC.T, scores_RSC[0].T, strict=True)
        ]
        yield f"| {row.name} | " + " | ".join(cells) + " |"


def lost(scores_RSB: Floats) -> list[str]:
    """Where the default is worse by more than two standard errors."""
    return [
        f"to {row.name} at {budget}"
        for row, scores_SB in zip(ROWS[1:], scores_RSB[1:], strict=True)
        for number, budget in enumerate(BUDGETS)
        if distance(scores_SB[:, number], scores_RSB[0, :, number]) > 2
    ]


def main() -> None:
    """Prints a table a variant, then what asking costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    costs: list[list[Outcome]] = [[] for _ in ROWS]
    with multiprocessing.Pool(options.processes) as pool:
        for variant in options.variants:
            jobs = [
                (row, variant == "misleading", seed, options.workers)
                for seed in range(options.searches)
                for row in range(len(ROWS))
            ]
            found = pool.map(outcome, jobs, chunksize=len(ROWS))
            by_row = [found[row :: len(ROWS)] for row in range(len(ROWS))]
            scores_RSB = np.array([[one.scores for one in row] for row in by_row])
            for kept, more in zip(costs, by_row, strict=True):
                kept.extend(more)
            print(f"\n{variant}, {options.workers} workers\n")
            print("\n".join(table(ROWS, [f"{budget} trainings" for budget in BUDGETS], scores_RSB)))
            where = lost(scores_RSB)
            print(
                f"\nThe default loses {', '.join(where) if where else 'to none'} beyond two standard errors.",
                flush=True,
            )
    print(f"\n| strategy, {max(BUDGETS)} trainings | trials a search | ms an ask | ms a search beyond asking |")
    print("| --- | --- | --- | --- |")
    for row, outcomes in zip(ROWS, costs, strict=True):
        asks = sum(one.asks for one in outcomes)
        ask_ms = 1000 * sum(one.ask_seconds for one in outcomes) / asks
        other_ms = 1000 * sum(one.other_seconds for one in outcomes) / len(outcomes)
        print(f"| {row.name} | {asks / len(outcomes):.0f} | {ask_ms:.1f} | {other_ms:.0f} |")
    print(f"\n{options.searches} searches a cell, {time.perf_counter() - began:.0f} s in {options.processes} processes")


if __name__ == "__main__":
    main()
