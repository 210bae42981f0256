"""Which trials leave their workers early, and which of those go on later. Pure functions of the figures that the study
holds, so that there is nothing to save and nothing to refill after a resume; the baseline is not among them. What is
called an epoch here is a fold where trials have some (`Space.trial_length`).

A trial's curve is {epoch: figure}, higher is better; which figure that is says `Scheduler.compare`.

`asha`, `hyperband` and `top_k` hold a trial at a rung and let it go on when it turns out to be among the best there, as
in Li et al., MLSys 2020. To stop it for good instead wastes the first trials, which have nobody to be compared with
and run to their ends, good or bad: see bench/strategies.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np

from tuner.space import Scheduler

Curves = Mapping[int, Mapping[int, float]]
"""curves of the trials that were trained, by number"""

_ENOUGH_TO_COMPARE = 3
"""The median rule waits for so many others that came as far."""


def compares(scheduler: Scheduler, epochs: int, number: int, since: int, reached: int) -> bool:
    """Whether `leaves` has anything to compare: reading the curves of all trials takes time."""
    if scheduler.name == "median":
        return scheduler.min_epochs <= reached < epochs
    return any(since < rung <= reached < epochs for rung in rungs(scheduler, epochs, number))


def leaves(
    scheduler: Scheduler, epochs: int, number: int, since: int, curves: Curves, unit: str = "epoch"
) -> str | None:
    """Why a trial of `epochs` leaves its worker at the epoch that it has reached, or None. Compared are the epochs
    after `since`, where it was compared last; after a resume these may be several."""
    reached = max(curves[number])
    if not compares(scheduler, epochs, number, since, reached):
        return None
    if scheduler.name == "median":
        below = _below_median(number, reached, curves)
        return f"its best by {unit} {reached} is below the median of the others' means" if below else None
    own = rungs(scheduler, epochs, number)
    rung = max(rung for rung in own if since < rung <= reached)
    ranked = _ranked(scheduler, epochs, own, rung, curves)
    return None if number in ranked[: _share(scheduler, len(ranked))] else f"not among the best at {unit} {rung}"


def may_go_on(scheduler: Scheduler) -> bool:
    """Whether a trial that leaves its worker is held; else it is stopped for good."""
    return scheduler.name in ("asha", "hyperband", "top_k")


def promoted(
    scheduler: Scheduler, epochs: int, held: Collection[int], running: Collection[int], curves: Curves, no_more: bool
) -> int | None:
    """Which of the held trials goes on now; None for none.

    `no_more` says that no new trial will come. Then a rung that nobody is on the way to has seen all that it will
    see, and its best go on however few they are.
    """
    at_rung: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in held:
        own = rungs(scheduler, epochs, number)
        at_rung[max(rung for rung in own if rung in curves[number]), *own].append(number)
    ranked = {key: _ranked(scheduler, epochs, list(key[1:]), key[0], curves) for key in at_rung}
    for key in sorted(at_rung, reverse=True):  # what has come furthest first
        for number in ranked[key][: _share(scheduler, len(ranked[key]))]:
            if number in at_rung[key]:
                return number
    for key in sorted(at_rung) if no_more else ():
        rung, own = key[0], list(key[1:])
        if any(rungs(scheduler, epochs, n) == own and rung not in curves.get(n, {}) for n in running):
            continue
        for number in ranked[key][: _share(scheduler, len(ranked[key]), at_the_end=True)]:
            if number in at_rung[key]:
                return number
    return None


def rungs(scheduler: Scheduler, epochs: int, number: int = 0) -> list[int]:
    """Epochs (counted from 1) at which a trial is compared.

    `asha` begins with min_epochs; `hyperband` deals its trials in turn to brackets that begin later and later; `top_k`
    has no rung but the first.
    """
    if not may_go_on(scheduler):
        return []
    found = [scheduler.min_epochs]
    while scheduler.name != "top_k" and found[-1] * scheduler.reduction < epochs:
        found.append(found[-1] * scheduler.reduction)
    found = [rung for rung in found if rung < epochs]
    return found[_bracket(len(found), number) :] if scheduler.name == "hyperband" else found


def _bracket(rungs_in_all: int, number: int) -> int:
    """How many of the first rungs a trial skips. Of three brackets the first takes 4 of 7 trials, the next 2, the last
    1: cheap ones are dealt more often, so that each spends about as much (Li et al., JMLR 2018)."""
    place = number % (2**rungs_in_all - 1) + 1 if rungs_in_all else 1
    return rungs_in_all - place.bit_length() if rungs_in_all else 0


def _ranked(scheduler: Scheduler, epochs: int, own: list[int], rung: int, curves: Curves) -> list[int]:
    """The trials of one bracket that have reached a rung, the best first; of equals the earlier one."""
    there = [(-curve[rung], number) for number, curve in curves.items() if rung in curve]
    return [number for _, number in sorted(there) if rungs(scheduler, epochs, number) == own]


def _share(scheduler: Scheduler, there: int, at_the_end: bool = False) -> int:
    """How many of so many at a rung go on."""
    if scheduler.name == "top_k":
        return scheduler.keep if at_the_end else 0
    return max(there // scheduler.reduction, int(at_the_end))


def _below_median(number: int, epoch: int, curves: Curves) -> bool:
    """The median stopping rule of Vizier (Golovin et al., KDD 2017)."""
    means = [
        float(np.mean([value for at, value in curve.items() if at <= epoch]))
        for other, curve in curves.items()
        if other != number and max(curve) >= epoch
    ]
    return len(means) >= _ENOUGH_TO_COMPARE and max(curves[number].values()) < float(np.median(means))
