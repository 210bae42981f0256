"""Which configuration a search has found, of all its trainings: single ones, and repeats with further seeds.

A pure function of records.jsonl and repeats.jsonl, so that repeats, finals and report agree. The statistics are in
tuner/race.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.config import DEFAULTS, JUDGING_FIELDS
from tuner import records
from tuner.race import Belief, Standing, interval
from tuner.space import Constraint

FILE = "repeats.jsonl"
"""the records of repeats, with the key `repeats`: the trial of the search whose configuration it is"""

_FEWEST_AT_RANDOM = 4
_MOST_AT_RANDOM = 2000
"""draws that are simulated: more change nothing that could be seen"""


@dataclass(frozen=True)
class Contender:
    """A configuration that the search has trained to its end, with all its trainings."""

    record: dict[str, Any]
    """of the search's trial; of several ways of judging one network, the best"""
    trained: dict[str, Any]
    """the record of the training that this one may have been read off"""
    trainings: tuple[dict[str, Any], ...]
    """the records of those that completed, the search's first"""
    diverged: int
    """how many of its repeats did"""
    beyond: tuple[str, ...]
    """the figures whose mean over its trainings violates a constraint"""

    @property
    def trial(self) -> str:
        """Id of the search's trial."""
        found: str = self.record["trial"]
        return found

    @property
    def values(self) -> list[float]:
        """What each training came to."""
        return [training["value"] for training in self.trainings]

    @property
    def by_seed(self) -> dict[int, float]:
        """The same by the seed of the training."""
        return {training["seed"]: training["value"] for training in self.trainings}

    @property
    def is_out(self) -> bool:
        """Whether it cannot win: with another seed it diverges, or in the mean it violates a constraint."""
        return bool(self.diverged or self.beyond)

    @property
    def cost(self) -> float:
        """What a training of it costs, in the mean: the second objective if there is one, else device-seconds."""
        found = [
            training["values"][1] if training.get("values") else training["device_seconds"]
            for training in (self.trained, *self.trainings[1:])
        ]
        return float(sum(found) / len(found))


@dataclass(frozen=True)
class Selection:
    """All that can be said of which configuration is best."""

    contenders: tuple[Contender, ...]
    """those that may win, at least one"""
    out: tuple[Contender, ...]
    """those that a repeat has put out of the race"""
    prefer: str
    fell_back: bool = False
    """whether all that may win were put out, so that the search's own trainings must do"""

    @cached_property
    def belief(self) -> Belief:
        """Of the contenders' means over seeds."""
        return Belief([contender.by_seed for contender in self.contenders], self.contenders[0].record["seed"])

    @cached_property
    def winner(self) -> int:
        """The contender that is chosen."""
        best = self.belief.winner()
        if self.prefer == "best":
            return best
        # One that nobody has looked at twice is like the best only for want of knowledge.
        known = [n for n in self.alike if n == best or self.belief.count_A[n] > 1]
        return min(known, key=lambda n: (self.contenders[n].cost, -self.belief.means[n]))

    @cached_property
    def alike(self) -> list[int]:
        """The contenders that cannot be told from the one with the best mean, that one first; then by their means."""
        best = self.belief.winner()
        found = [n for n, is_alike in enumerate(self.belief.alike(best)) if is_alike]
        return sorted(found, key=lambda n: (n != best, -self.belief.means[n]))

    @property
    def is_repeated(self) -> bool:
        """Whether any configuration was trained more than once."""
        return bool(self.out) or any(len(contender.trainings) > 1 for contender in self.contenders)

    def standing(self, one: int) -> Standing:
        """What is known of a contender."""
        return self.belief.standing(one)

    def index(self, trial: str) -> int | None:
        """The contender that a trial of the search is; None where its network is better judged in another way."""
        return next((n for n, contender in enumerate(self.contenders) if contender.trial == trial), None)

    def judged_otherwise(self, trial: str) -> int | None:
        """The contender that is the network of a trial, judged in another way."""
        of_network = (n for n, contender in enumerate(self.contenders) if contender.trained["trial"] == trial)
        return next((n for n in of_network if self.contenders[n].trial != trial), None)


def read(run_directory: Path) -> list[dict[str, Any]]:
    """The records of a run's repeats, in their order; none if nothing was repeated."""
    path = run_directory / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def select(
    found: Sequence[dict[str, Any]],
    repeats: Iterable[dict[str, Any]],
    constraints: Sequence[Constraint] = (),
    prefer: str = "best",
) -> Selection | None:
    """Of the records of a search and of its repeats; None where no completed trial of the search meets the
    constraints, so that there is nothing to choose from."""
    of_trial: dict[str, list[dict[str, Any]]] = {}
    for repeat in repeats:
        of_trial.setdefault(repeat["repeats"], []).append(repeat)
    by_network: dict[str, dict[str, Any]] = {}
    for record in found:
        if record["status"] != records.Status.COMPLETED or record["value"] is None or not records.is_feasible(record):
            continue
        network = network_of(record["config"])
        if network not in by_network or record["value"] > by_network[network]["value"]:
            by_network[network] = record
    by_trial = {record["trial"]: record for record in found}
    trained = {r["trial"]: by_trial.get(r["replayed_from"], r) for r in by_network.values()}
    contenders = [
        _contender(record, trained[record["trial"]], of_trial.get(record["trial"], ()), constraints)
        for record in by_network.values()
    ]
    left = tuple(contender for contender in contenders if not contender.is_out)
    out = tuple(contender for contender in contenders if contender.is_out)
    fell_back = bool(out) and not left
    if fell_back:
        left = tuple(_contender(record, trained[record["trial"]], (), constraints) for record in by_network.values())
    if not left:
        return None
    return Selection(left, out, prefer, fell_back)


@dataclass(frozen=True)
class RandomSearch:
    """What random search would have come to at the cost of a search and its repeats, and by how much the winner is
    better; each with its 95 % interval."""

    trainings: int
    """that the cost pays for, of full length"""
    told_by: int
    """configurations drawn at random that were trained to the end, of the search itself"""
    worse: int
    """and those that a scheduler stopped"""
    value: float
    value_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


def against_random(
    selected: Selection, winner: int, found: Sequence[dict[str, Any]], repeats: Sequence[dict[str, Any]]
) -> RandomSearch | None:
    """Read off the trials that the search drew at random itself; None where those are too few to tell.

    Their values follow the model of tuner/race.py; the best of as many draws as the cost pays for is simulated from it,
    chosen by its single training as random search would (compare Dodge et al., "Show your work", EMNLP 2019, who need
    more draws than they predict).
    """
    trained = records.charged(found)
    full = [record["device_seconds"] for record in trained if record["status"] == records.Status.COMPLETED]
    at_random = [record for record in trained if record.get("drawn") == "random"]
    completed = [r for r in at_random if r["status"] == records.Status.COMPLETED and records.is_feasible(r)]
    worse = sum(record["status"] == records.Status.STOPPED_EARLY for record in at_random)
    if len(completed) < _FEWEST_AT_RANDOM or not sum(full):
        return None
    spent = sum(record["device_seconds"] for record in (*trained, *repeats))
    count = max(1, round(spent / (sum(full) / len(full))))
    belief = Belief([{0: record["value"]} for record in completed], worse=worse)
    best_D = belief.best_of(min(count, _MOST_AT_RANDOM))
    gain_D = selected.belief.draws[:, winner] - best_D
    return RandomSearch(
        count, len(completed), worse, float(best_D.mean()), interval(best_D), float(gain_D.mean()), interval(gain_D)
    )


def _contender(
    record: dict[str, Any],
    trained: dict[str, Any],
    repeats: Iterable[dict[str, Any]],
    constraints: Sequence[Constraint],
) -> Contender:
    repeats = list(repeats)
    completed = [one for one in repeats if one["status"] == records.Status.COMPLETED and one["value"] is not None]
    trainings = (record, *completed)
    beyond = []
    for bound in constraints if completed else ():
        excesses = [bound.excess(records.figures(training).get(bound.metric)) for training in trainings]
        if sum(excesses) > 0:
            beyond.append(bound.metric)
    diverged = sum(one["status"] == records.Status.DIVERGED for one in repeats)
    return Contender(record, trained, trainings, diverged, tuple(beyond))


def network_of(config: dict[str, Any]) -> str:
    """The fields that decide the weights, as one word; what an older record does not say is the default."""
    return json.dumps({k: v for k, v in (DEFAULTS | config).items() if k not in JUDGING_FIELDS}, sort_keys=True)
