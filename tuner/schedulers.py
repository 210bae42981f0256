"""Which trials are stopped early. Pure functions of the figures that the study holds, so that there is nothing to save
and nothing to refill after a resume; the baseline is not among them.

A trial's curve is {epoch: figure}, higher is better; which figure that is says `Scheduler.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tuner.space import Scheduler

Curves = Mapping[int, Mapping[int, float]]
"""curves of the trials that were trained, by number"""

_ENOUGH_TO_COMPARE = 3
"""The median rule waits for so many others that came as far."""


def compares(scheduler: Scheduler, epochs: int, number: int, since: int, reached: int) -> bool:
    """Whether `stops` has anything to compare: reading the curves of all trials takes time."""
    if scheduler.name == "median":
        return scheduler.min_epochs <= reached < epochs
    return any(since < rung <= reached < epochs for rung in rungs(scheduler, epochs, number))


def stops(scheduler: Scheduler, epochs: int, number: int, since: int, curves: Curves) -> str | None:
    """Why a trial of `epochs` is stopped at the epoch that it has reached, or None. Compared are the epochs after
    `since`, where it was compared last; after a resume these may be several."""
    reached = max(curves[number])
    if not compares(scheduler, epochs, number, since, reached):
        return None
    if scheduler.name == "median":
        below = _below_median(number, reached, curves)
        return f"its best by epoch {reached} is below the median of the others' means" if below else None
    rung = max(rung for rung in rungs(scheduler, epochs, number) if since < rung <= reached)
    own = rungs(scheduler, epochs, number)
    rivals = [
        curve[rung]
        for other, curve in curves.items()
        if other != number and rung in curve and rungs(scheduler, epochs, other) == own
    ]
    return f"not among the best at epoch {rung}" if is_cut(curves[number][rung], rivals, scheduler.reduction) else None


def rungs(scheduler: Scheduler, epochs: int, number: int = 0) -> list[int]:
    """Epochs (counted from 1) at which a trial is compared.

    `asha` begins with min_epochs; `hyperband` deals its trials in turn to brackets that begin later and later.
    """
    if scheduler.name not in ("asha", "hyperband"):
        return []
    found = [scheduler.min_epochs]
    while found[-1] * scheduler.reduction < epochs:
        found.append(found[-1] * scheduler.reduction)
    found = [rung for rung in found if rung < epochs]
    return found[_bracket(len(found), number) :] if scheduler.name == "hyperband" else found


def _bracket(rungs_in_all: int, number: int) -> int:
    """How many of the first rungs a trial skips. Of three brackets the first takes 4 of 7 trials, the next 2, the last
    1: cheap ones are dealt more often, so that each spends about as much (Li et al., JMLR 2018)."""
    place = number % (2**rungs_in_all - 1) + 1 if rungs_in_all else 1
    return rungs_in_all - place.bit_length() if rungs_in_all else 0


def is_cut(value: float, rivals: list[float], reduction: int) -> bool:
    """Asynchronous successive halving (Li et al., MLSys 2020) at one rung: whether a value is outside the best
    1/reduction of those that reached the rung so far, and at least of the best one. The first to arrive goes on."""
    better = sum(other > value for other in rivals)
    return better >= max(1, (len(rivals) + 1) // reduction) if rivals else False


def _below_median(number: int, epoch: int, curves: Curves) -> bool:
    """The median stopping rule of Vizier (Golovin et al., KDD 2017)."""
    means = [
        float(np.mean([value for at, value in curve.items() if at <= epoch]))
        for other, curve in curves.items()
        if other != number and max(curve) >= epoch
    ]
    return len(means) >= _ENOUGH_TO_COMPARE and max(curves[number].values()) < float(np.median(means))
