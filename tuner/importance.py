"""How much each searched parameter mattered: importance.json in the run directory, a projection of the records.

Of the importances that Optuna computes only PED-ANOVA needs no further package (Watanabe et al., IJCAI 2023;
conditional parameters as in arXiv 2601.20800). It asks how differently a parameter is distributed among the best trials
and among all of them: it compares with what was drawn, not with the whole range, so that the preferences of a sampler
do not look like an effect.

Trials are compared at equal epochs. Where a scheduler stops trials early, that is its first epoch of comparison, which
nearly all reach: those that went on are a chosen few, among which what decided early no longer varies. A trial that
diverged before is one of the worst; one that crashed says nothing; a result that was read off another's network is no
trial of its own.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from model.arrays import Floats
from model.files import write_json
from tuner import draw, records
from tuner.records import Status
from tuner.space import Space

FILE = "importance.json"
MIN_TRIALS = 10
"""With fewer, what is found is luck."""

_BEST_AT_LEAST = 5
"""so many trials are the best (Optuna's advice), and a fifth of them where that is more: with a tenth, effects are told
from luck only in half again as many trials"""

_PARTS = 20
"""the trials are left out in so many parts for the standard error"""

_SHUFFLES = 200

logger = logging.getLogger(__name__)

Points = Sequence[tuple[Mapping[str, Any], float]]
"""parameters and value, higher is better"""


def write(run_directory: Path, space: Space) -> None:
    """Writes importance.json from records.jsonl. What goes wrong is told and ends nothing."""
    try:
        write_json(run_directory / FILE, of(space, records.read(run_directory)))
    except Exception as error:
        logger.warning("the importance of parameters was not written: %s: %s", type(error).__name__, error)


def is_current(run_directory: Path) -> bool:
    """Whether it was written from as many records as there are: a session that was killed leaves an earlier one."""
    try:
        found = json.loads((run_directory / FILE).read_text())
        return bool(found["records"] == len(records.read(run_directory)))
    except (OSError, KeyError, TypeError, ValueError):
        return False


def of(space: Space, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What docs/run-directory.md says of importance.json; the same for the same records."""
    epoch = space.scheduler.min_epochs if space.scheduler.name != "none" else None
    points = _points(space, trials, epoch)
    varied = [name for name in space.search if len({repr(params.get(name)) for params, _ in points}) > 1]
    found = {"schema": 1, "metric": space.objective.metric, "records": len(trials)}
    found |= {"epoch": epoch, "trials": len(points)}
    if len(points) < MIN_TRIALS or not varied or len({value for _, value in points}) == 1:
        return found | {"best": None, "parameters": []}
    best = max(_BEST_AT_LEAST, round(len(points) / 5))
    return found | {"best": best, "parameters": _importances(space, points, varied, best / len(points))}


def _points(space: Space, trials: Sequence[dict[str, Any]], epoch: int | None) -> Points:
    """The trials that are compared; those that diverged below all others."""
    points: list[tuple[Mapping[str, Any], float | None]] = []
    for record in records.charged(trials):
        if not space.contains(record["params"]) or record["status"] == Status.FAILED:
            continue
        if epoch is None:
            value = record["value"] if record["status"] == Status.COMPLETED else None
        else:
            rows = [row for row in record["history"] if row["epoch"] <= epoch and row["value"] is not None]
            if space.cross_validation:  # a row is the mean over all folds before it
                rows = rows[-1:]
            value = max(row["value"] for row in rows) if rows and rows[-1]["epoch"] == epoch else None
        if value is not None or record["status"] == Status.DIVERGED:
            points.append((record["params"], value))
    worst = min((value for _, value in points if value is not None), default=0.0) - 1.0
    return [(params, worst if value is None else value) for params, value in points]


def _importances(space: Space, points: Points, names: list[str], share: float) -> list[dict[str, Any]]:
    """The most important first; `ci90` by the jackknife over parts of the trials, `chance` by shuffling the values."""
    rng = np.random.default_rng(space.seed)
    study = _study(space, [params for params, _ in points], names)
    losses_N = -np.array([value for _, value in points])

    def divergences(losses: Floats) -> Floats:
        """(P,) how far a parameter among the best is from itself among all, 0 for no difference; of the trials whose
        loss is a number"""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being experimental, and of what `chance` says better
            evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
            found = evaluator.evaluate(study, names, target=lambda trial: float(losses[trial.number]))
        return np.array([found[name] for name in names])

    raw_P = divergences(losses_N)
    total = raw_P.sum() or 1.0
    parts = min(_PARTS, len(points))
    part_N = rng.permutation(len(points)) % parts
    without = [divergences(np.where(part_N == part, np.nan, losses_N)) for part in range(parts)]
    shares = np.array([one / (one.sum() or 1.0) for one in without])
    error_P = 1.645 * np.sqrt((parts - 1) * shares.var(axis=0))
    shuffled = [divergences(rng.permutation(losses_N)) for _ in range(_SHUFFLES)]
    chance_P = np.quantile(shuffled, 1 - 0.05 / len(names), axis=0) / total  # one search in twenty, by Bonferroni
    found = [
        {
            "name": name,
            "importance": float(share),
            "ci90": [float(max(0.0, share - error)), float(min(1.0, share + error))],
            "chance": float(chance),
        }
        for name, share, error, chance in zip(names, raw_P / total, error_P, chance_P, strict=True)
    ]
    return sorted(found, key=lambda one: -one["importance"])


def _study(space: Space, points: Sequence[Mapping[str, Any]], names: list[str]) -> optuna.Study:
    """A study in memory that holds these points, by number; what they are worth is said when it is asked."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=space.seed))
    finally:
        optuna.logging.set_verbosity(verbosity)
    distributions = {name: draw.distribution(space.search[name]) for name in names}
    for params in points:
        there = [name for name in names if name in params]
        study.add_trial(
            optuna.trial.create_trial(
                value=0.0,
                params={name: params[name] for name in there},
                distributions={name: distributions[name] for name in there},
            )
        )
    return study
