"""What draws proposals: Optuna's samplers, and the study as they see it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from tuner.space import FloatParam, IntParam, Param, Space

_STARTUP_TRIALS = 5
"""drawn at random before a model is fitted"""

SEEN_BY_MODELS = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
"""trials that a sampler counts among them, at most"""


def learns(space: Space, seen: int) -> bool:
    """Whether a proposal may follow from what is known, after so many trials; else it is drawn at random, or evenly."""
    return space.sampler in ("tpe", "gp", "cmaes") and seen >= _STARTUP_TRIALS


def suggest(trial: optuna.trial.Trial, name: str, param: Param) -> Any:
    """A value of a parameter; bounds are inclusive on both sides."""
    return trial._suggest(name, distribution(param))


def distribution(param: Param) -> BaseDistribution:
    """What a parameter is drawn from."""
    if isinstance(param, FloatParam):
        return optuna.distributions.FloatDistribution(param.low, param.high, log=param.log, step=param.step)
    if isinstance(param, IntParam):
        return optuna.distributions.IntDistribution(param.low, param.high, log=param.log, step=param.step)
    return optuna.distributions.CategoricalDistribution(param.choices)


def sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    """What tuner/space_file.py refuses never gets here: no sampler draws at random in silence."""
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if space.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        if space.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        if space.sampler == "qmc":
            # Its place in the sequence is in the study; the seed must stay what it was.
            return samplers.QMCSampler(seed=space.seed, scramble=True)
        if space.sampler == "tpe":
            # Without `group`, conditional parameters would be drawn one by one.
            return samplers.TPESampler(
                seed=seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True, group=True, constant_liar=True
            )
        return samplers.RandomSampler(seed=seed)  # grid: every point is enqueued


class StudyOfTwo(optuna.Study):
    """A study with two objectives. TPE ranks pruned trials by `direction`, which Optuna refuses here; what their epochs
    say is of the figure, the first one."""

    @property
    def direction(self) -> optuna.study.StudyDirection:
        return self.directions[0]


class SeesCurves(optuna.samplers.BaseSampler):
    """A sampler that is shown what unfinished trials have reached so far, as their value.

    Optuna's TPE places every stopped trial behind every completed one, and every running one, the best that a scheduler
    let go on among them, with the bad. On the problems of bench/strategies.py that costs more than the optimism of an
    early figure (bench/RESULTS.md).
    """

    def __init__(self, inner: optuna.samplers.BaseSampler, study: optuna.Study, show: _Show) -> None:
        self._inner = inner
        self._seen = _SeenStudy(study, show)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(self._seen, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(self._seen, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(self._seen, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(self._seen, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(self._seen, trial, state, values)


_Show = Callable[[FrozenTrial], list[float] | None]
"""what an unfinished or stopped trial is worth so far; None leaves it as it is"""


class _SeenStudy(StudyOfTwo):
    """A study whose trials look completed to whoever samples from it, as Optuna's own Hyperband shows one bracket."""

    def __init__(self, study: optuna.Study, show: _Show) -> None:
        super().__init__(study.study_name, study._storage, sampler=study.sampler, pruner=study.pruner)
        self._show = show
        self._stopped: dict[int, FrozenTrial] = {}

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [self._shown(trial) for trial in self._storage.get_all_trials(self._study_id, deepcopy=False)]
        found = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def _shown(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.state not in (TrialState.RUNNING, TrialState.PRUNED):
            return trial
        if trial.number in self._stopped:
            return self._stopped[trial.number]
        values = self._show(trial)
        if values is None:
            return trial
        shown = copy.copy(trial)
        shown.state, shown.values = TrialState.COMPLETE, values
        if trial.state is TrialState.PRUNED:  # which changes no more
            self._stopped[trial.number] = shown
        return shown
