"""Repeats of a search's best configurations: a second study beside the search's, in the same storage.

A trial of it is a training of one configuration of the search with a further seed; its user attribute `repeats` names
the search's trial. Which one comes next is for tuner/selection.py to say, of the records of both studies; so a session
can be killed at any moment and go on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from model.config import RULES, RunConfig
from tuner import draw, selection
from tuner.records import Proposal, charged
from tuner.sampler import study_name
from tuner.selection import Selection
from tuner.space import Budget, Repeats, Scheduler, Space
from tuner.study import TrialStudy

_FAILURES = 3
"""So many repeats of a configuration that crashed are enough: it is not trained again."""


class RepeatStudy(TrialStudy):
    """The repeats of one search whose `records` are final. ValueError if the database cannot be used, or if repeats
    have `begun` and are not there."""

    records_file = selection.FILE

    def __init__(
        self,
        space: Space,
        run_id: str,
        where: Path | str | None,
        repeats: Repeats,
        records: Sequence[dict[str, Any]],
        begun: bool = False,
    ) -> None:
        # No scheduler: a repeat that is cut would say nothing. How long repeats may take is for `repeats` to say.
        alone = replace(space, scheduler=Scheduler(), budget=Budget(hours=repeats.hours))
        super().__init__(alone, run_id, f"{study_name(space, run_id, where)}-repeats", where, begun)
        self.repeats = repeats
        self._searched = list(records)
        self._by_trial = {record["trial"]: record for record in self._searched}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.put_back(trial.number)

    @property
    def trainings(self) -> int:
        """How many there may be."""
        if self.repeats.trainings is not None:
            return self.repeats.trainings
        completed = [record for record in charged(self._searched) if record["status"] == "completed"]
        return -(-len(completed) // 2)

    def selection(self) -> Selection | None:
        """What the trainings so far say."""
        return selection.select(self._searched, self.records(), self.space.constraints, self.repeats.prefer)

    def ask(self, new: bool = True) -> Proposal | None:
        """The next repeat: one that was interrupted, else, if `new`, of the configuration that it tells most of. None
        when the trainings are spent, or one configuration is separated from the others."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting:
            chosen = self._next() if new else None
            if chosen is None:
                return None
            self._enqueue(chosen)
            waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        self._storage.set_trial_state_values(waiting[0]._trial_id, TrialState.RUNNING)
        proposal = self._proposal(waiting[0].number, waiting[0].params)
        self._running[proposal.number] = proposal
        return proposal

    def is_over(self) -> bool:
        return not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) and self._next() is None

    def records(self) -> list[dict[str, Any]]:
        return [record | {"repeats": self._repeated(record["number"])} for record in super().records()]

    def trial_id(self, number: int | None) -> str:
        return f"{self.run_id}-r{number:04d}"

    def _next(self) -> str | None:
        """The search's trial whose configuration is to be trained again."""
        found = self._study.get_trials(deepcopy=False)
        known = self.selection()
        if known is None or known.fell_back or len(found) >= self.trainings:
            return None
        failed = Counter(t.user_attrs["repeats"] for t in found if t.state is TrialState.FAIL)
        running = Counter(t.user_attrs["repeats"] for t in found if not t.state.is_finished())
        trials = [contender.trial for contender in known.contenders]
        # What keeps failing is as good as fully repeated.
        under_way = [running[t] + (self.repeats.seeds if failed[t] >= _FAILURES else 0) for t in trials]
        chosen = known.belief.next(self.repeats.seeds, under_way)
        return None if chosen is None else trials[chosen]

    def _enqueue(self, trial: str) -> None:
        """Its seed is one that this configuration has not had."""
        record = self._by_trial[trial]
        found = self._study.get_trials(deepcopy=False)
        before = sum(other.user_attrs["repeats"] == trial for other in found)
        seed = (record["seed"] + 1 + before) % (int(RULES["seed"].high or 0) + 1)
        names = self.space.search.keys() & record["params"].keys()  # a baseline outside the space has others
        params = {name: record["params"][name] for name in self.space.search if name in names}
        if not self.space.contains(params):
            params = {}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions={name: draw.distribution(self.space.search[name]) for name in params},
                user_attrs={"repeats": trial, "seed": seed},
            )
        )

    def _repeated(self, number: int) -> str:
        found: str = self._storage.get_trial(self._storage_id(number)).user_attrs["repeats"]
        return found

    def _proposal(self, number: int, params: dict[str, Any]) -> Proposal:
        attributes = self._storage.get_trial(self._storage_id(number)).user_attrs
        record = self._by_trial[attributes["repeats"]]
        config = RunConfig.from_dict(record["config"] | {"seed": attributes["seed"]})
        return Proposal(self.trial_id(number), number, record["params"], config, is_baseline=False)
