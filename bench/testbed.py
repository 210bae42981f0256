"""A test bed for strategies of search: learning curves are replayed on a virtual clock, nothing need be trained.

Whole searches take a fraction of a second, so that hundreds of them can be compared in CI. What is tested is the real
thing: `StudyStrategy` drives the platform's study (tuner/sampler.py) and its schedulers (tuner/schedulers.py) as
tuner/search.py does on Ray. Time is in virtual seconds, spending in epochs.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tuner import schedulers
from tuner.sampler import Proposal, SearchStudy
from tuner.space import Space
from tuner.trial import nothing_yet


class Values(Protocol):
    """The objective after each epoch: an array, or what is trained when it is asked for (bench/strategies_real.py)."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True)
class Curve:
    """What training a configuration would give."""

    values_E: Values
    """the objective after each epoch; the training diverges in the first epoch whose value is not finite"""
    epoch_seconds: float = 1.0
    """virtual"""


Curves = Callable[[Mapping[str, Any]], Curve]
"""The searched fields of a configuration -> its curve; the same one whenever it is asked for."""


@dataclass(eq=False)
class Trial:
    """One trial of a simulated search, as far as it has come."""

    number: int
    params: Mapping[str, Any]
    curve: Curve
    started: float
    """virtual seconds"""
    epoch: int = 0
    status: str = "running"
    ended: float | None = None
    """virtual seconds"""
    spent: int | None = None
    """epochs that all trials had spent when this one ended"""
    handle: Any = None
    """the strategy's own"""

    @property
    def value(self) -> float:
        """The objective at the best epoch so far."""
        return float(self.curve.values_E[: self.epoch].max())


@dataclass(frozen=True)
class Start:
    """A trial that is to run."""

    params: Mapping[str, Any]
    handle: Any = None
    """the strategy's own"""
    epoch: int = 0
    """that it has behind it: the trial goes on from there"""


class Strategy(Protocol):
    """What proposes trials and stops them; called in the order of the virtual clock."""

    def ask(self) -> Start | None:
        """The next trial; None when there is nothing to start before something else ends."""

    def goes_on(self, trial: Trial) -> bool:
        """Takes in an epoch of a trial that has not reached its last one."""

    def ended(self, trial: Trial) -> None:
        """Takes in the end of a trial: `completed`, `stopped_early` or `diverged`."""


@dataclass(frozen=True)
class Search:
    """What became of a simulated search."""

    trials: list[Trial]
    """in the order of their starts"""
    epochs: int
    """spent by all trials"""
    clock: float
    """virtual seconds"""
    strategy_seconds: dict[str, float]
    """real ones that the strategy itself took, by method"""

    def pick(self, budget: int) -> Trial | None:
        """The completed trial with the largest value, the earlier one of equals, had the search ended after a budget
        of epochs: a strategy that knows no budget does the same until it is spent."""
        done = [t for t in self.trials if t.status == "completed" and t.spent is not None and t.spent <= budget]
        return max(done, key=lambda trial: trial.value, default=None)

    def pick_of_first(self, trials: int) -> Trial | None:
        """The same where the first so many trials are all, and run to their ends."""
        done = [trial for trial in self.trials[:trials] if trial.status == "completed"]
        return max(done, key=lambda trial: trial.value, default=None)


def simulate(
    strategy: Strategy, curves: Curves, *, workers: int = 4, epochs: int | None = None, trials: int | None = None
) -> Search:
    """Runs a search on a virtual clock.

    Whenever a worker is free the strategy is asked; a worker whose trial was stopped is free at once. The search is
    over when `epochs` are spent (what runs then is stopped early), when `trials` have run, or when the strategy has
    nothing left. Of two epochs that end in one moment the one that began first comes first.
    """
    assert epochs is not None or trials is not None
    began: list[Trial] = []
    agenda: list[tuple[float, int, Trial]] = []
    order, took = itertools.count(), dict.fromkeys(("ask", "goes_on", "ended"), 0.0)
    clock, spent = 0.0, 0

    def timed(name: str, *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = getattr(strategy, name)(*arguments)
        took[name] += time.perf_counter() - start
        return answer

    def end(trial: Trial, status: str) -> None:
        trial.status, trial.ended, trial.spent = status, clock, spent
        timed("ended", trial)

    def fill() -> None:
        while len(agenda) < workers and (trials is None or len(began) < trials):
            if (asked := timed("ask")) is None:
                return
            trial = Trial(len(began), asked.params, curves(asked.params), clock, asked.epoch, handle=asked.handle)
            began.append(trial)
            heapq.heappush(agenda, (clock + trial.curve.epoch_seconds, next(order), trial))

    fill()
    while agenda and (epochs is None or spent < epochs):
        clock, _, trial = heapq.heappop(agenda)
        spent += 1
        trial.epoch += 1
        if not np.isfinite(trial.curve.values_E[trial.epoch - 1]):
            trial.epoch -= 1
            end(trial, "diverged")
        elif trial.epoch == len(trial.curve.values_E):
            end(trial, "completed")
        elif not timed("goes_on", trial):
            end(trial, "stopped_early")
        else:
            heapq.heappush(agenda, (clock + trial.curve.epoch_seconds, next(order), trial))
        if epochs is None or spent < epochs:
            fill()
    for _, _, trial in sorted(agenda, key=lambda entry: entry[:2]):
        end(trial, "stopped_early")
    return Search(began, spent, clock, took)


@dataclass
class StudyStrategy:
    """The platform itself: its study, in memory, and the scheduler that the space names."""

    space: Space
    trials: int | None = None
    """new ones are proposed until so many have begun"""
    study: SearchStudy = field(init=False)
    begun: set[str] = field(default_factory=set)
    reasons: dict[int, str] = field(default_factory=dict)
    epochs: dict[int | None, int] = field(default_factory=dict)
    """how far the trials that are held have come, by their numbers in the study"""

    def __post_init__(self) -> None:
        self.study = SearchStudy(self.space, "bed", None)

    def ask(self) -> Start | None:
        proposal = self.study.ask(new=self.trials is None or len(self.begun) < self.trials)
        if proposal is None:
            return None
        self.begun.add(proposal.trial)
        # A baseline outside the space names as its parameters only what makes it one.
        params = {name: getattr(proposal.config, name) for name in self.space.search}
        return Start(params, proposal, self.epochs.pop(proposal.number, 0))

    def goes_on(self, trial: Trial) -> bool:
        """As `_Session.reported` of tuner/search.py."""
        proposal: Proposal = trial.handle
        self._report(trial)
        reason = None if proposal.is_baseline else self.study.leaves(proposal, trial.epoch)
        if reason:
            self.reasons[trial.number] = reason
        return reason is None

    def ended(self, trial: Trial) -> None:
        """As `_Session.ended` and `_Session._finish`."""
        proposal: Proposal = trial.handle
        if trial.status == "completed":
            self._report(trial)
        reason = {"completed": None, "diverged": "not finite"}.get(trial.status, "the budget was used up")
        record = (
            nothing_yet()
            | proposal.identity()
            | {
                "status": trial.status,
                "reason": self.reasons.get(trial.number, reason),
                "epochs": trial.epoch,
                "history": [
                    {"epoch": epoch, "value": float(value), "compared": float(value)}
                    for epoch, value in enumerate(trial.curve.values_E[: trial.epoch], start=1)
                ],
                "started": trial.started,
                "ended": trial.ended,
                "seconds": trial.epoch * trial.curve.epoch_seconds,
                "device_seconds": trial.epoch * trial.curve.epoch_seconds,
            }
        )
        if trial.epoch:
            best = {"value": trial.value, "epoch": int(trial.curve.values_E[: trial.epoch].argmax()) + 1}
            own = proposal.config.judgement()._asdict() | best | {"thresholds": None}
            record |= {"value": best["value"], "best_epoch": best["epoch"], "replays": [own]}
        if trial.number in self.reasons and schedulers.may_go_on(self.space.scheduler):
            self.epochs[proposal.number] = trial.epoch
            self.study.hold(proposal, record)
        else:
            self.study.finish(proposal, record)

    def _report(self, trial: Trial) -> None:
        value = float(trial.curve.values_E[trial.epoch - 1])
        self.study.report(trial.handle.number, trial.epoch, value)
