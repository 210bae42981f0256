"""What an Optuna study keeps of trials, whoever proposes them: their epochs, ends, records, and the clock.

Everything is in the study before anything else happens, so that a session can be killed at any moment and go on from
the study alone. States are exact:

- WAITING: proposed, and not running: enqueued, or put back when the session was stopped; asked for again first
- RUNNING: on a worker now
- COMPLETE: trained to its last epoch; the value is the objective at the best epoch, and the cost where there are two
- PRUNED: stopped early, with all its intermediate values
- FAIL: diverged, crashed or out of memory; the record says why

The whole record of a trial (see tuner/records.py) is its user attribute `record`: where a column is too short for it,
the number of parts, which are `record-0`, `record-1`, ...

Constraints are told as Optuna keeps them, so that samplers and `study.best_trial` see them: how far a figure lies
beyond its bound, 0 or less where it meets it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from tuner import draw, records
from tuner.records import Proposal
from tuner.space import Space
from tuner.storage import holds_long_text, open_storage

_LONGEST_TEXT = 30_000
"""characters of a record in one attribute, where a column holds 64 KiB: as JSON they may take twice as much"""

_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped_early": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}


class TrialStudy(ABC):
    """The trials of one study, in a journal file that one process writes to, or in the database of a URL; else in
    memory. What proposes them is for its kinds.

    ValueError if the database cannot be used, or if the study has `begun` and is not there.
    """

    records_file = records.FILE
    """where the records of its trials go, in the run's folder"""
    needs_baseline = False
    """whether one trial must run to its end, whatever the budget says: the baseline"""

    def __init__(self, space: Space, run_id: str, name: str, where: Path | str | None, begun: bool = False) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.run_id = run_id
        self._running: dict[int | None, Proposal] = {}
        opened = open_storage(where)
        if begun and not is_there(opened, name):
            raise ValueError(
                f"the study {name} of this run has begun and is not where it should be; bring its "
                f"{'journal' if isinstance(where, Path) else 'database'} back, or start a new run"
            )
        self._study = optuna.create_study(
            storage=opened,
            study_name=name,
            directions=[f"{objective.mode}imize" for objective in space.objectives],
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        storage = self._storage = self._study._storage  # a database with Optuna's cache before it
        if space.cost:
            self._study = draw.StudyOfTwo(name, storage, pruner=self._study.pruner)
        self._longest = None if holds_long_text(storage) else _LONGEST_TEXT
        self._joined: dict[int | None, dict[str, Any]] = {}
        """records that lie in parts"""
        self._study_id = storage.get_study_id_from_name(self._study.study_name)

    # Asking

    @abstractmethod
    def ask(self, new: bool = True) -> Proposal | None:
        """The next trial for a worker, one that was interrupted before a `new` one; None when there is none now."""

    def is_over(self) -> bool:
        """Whether nothing will be asked for any more, as far as is known before anything runs."""
        return False

    @abstractmethod
    def _proposal(self, number: int, params: dict[str, Any]) -> Proposal:
        """A trial of the study as its worker is to have it."""

    def take_interrupted(self) -> list[Proposal]:
        """The trials that were on a worker, have not ended and wait to go on: they are to be finished now."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        taken = [trial for trial in waiting if "started" in trial.user_attrs]
        for trial in taken:
            self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        return [self._proposal(trial.number, trial.params) for trial in taken]

    # What a scheduler does with them, if there is one

    def has_held(self) -> bool:
        """Whether trials are held at rungs."""
        return False

    def leaves(self, proposal: Proposal, epoch: int) -> str | None:
        """Why a trial leaves its worker at an epoch that was reported, or None."""
        return None

    def hold(self, proposal: Proposal, record: dict[str, Any]) -> dict[str, Any]:
        """A trial that a scheduler has taken off its worker and may let go on. Returns the record as it is kept."""
        raise AssertionError("without a scheduler nothing is held")

    def let_go(self, for_good: bool) -> list[dict[str, Any]]:
        """The end of a session for the trials that are held. Returns the records of those that have ended."""
        return []

    def cannot_win(self) -> set[str]:
        """Trials whose checkpoints nobody will need."""
        return set()

    # Telling

    def report(self, number: int | None, epoch: int, compared: float) -> None:
        """The figure of an epoch that schedulers compare. Telling it twice, after a resume, changes nothing."""
        if number is not None:
            self._storage.set_trial_intermediate_value(self._storage_id(number), epoch, compared)

    def finish(
        self, proposal: Proposal, record: dict[str, Any], trained: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The end of a trial: its record, then its state. `trained` is the record whose network a replay was read off.

        Returns the record as it is kept: with `values` where there are two objectives, `violations` where there are
        constraints.
        """
        kept = self._keep(proposal, record, trained)
        if proposal.number is not None:
            state = _STATES[record["status"]]
            values = records.values(self.space, record, trained or record) if state is TrialState.COMPLETE else None
            self._study.tell(proposal.number, values, state=state)
        return kept

    def _keep(self, proposal: Proposal, record: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
        """Writes a record, with what is judged of it."""
        self._running.pop(proposal.number, None)
        excesses = records.excesses(self.space, record)
        record = records.judged(self.space, record, trained)
        if proposal.number is None:
            for name, part in _parts("baseline", record, self._longest):
                self._study.set_user_attr(name, part)
            return record
        storage_id = self._storage_id(proposal.number)
        self._joined.pop(proposal.number, None)
        for name, part in _parts("record", record, self._longest):
            self._storage.set_trial_user_attr(storage_id, name, part)
        for metric, excess in excesses.items():  # as Trial.set_constraint does, which ignores what is told again
            self._storage.set_trial_system_attr(storage_id, f"constraints:{metric}", excess)
        return record

    def put_back(self, number: int | None) -> None:
        """A running trial that was not finished: it is asked for again, with its parameters."""
        self._running.pop(number, None)
        if number is not None:
            self._storage.set_trial_state_values(self._storage_id(number), TrialState.WAITING)

    def device_seconds_of(self, number: int | None, seconds: float, devices: float | None = None) -> float | None:
        """What a trial that has trained so many seconds has used of devices, which it may have changed; with
        `devices`, it holds so many from now on. None if nobody ever said what it holds."""
        trial = None if number is None else self._storage_id(number)
        attrs = self._study.user_attrs if trial is None else self._storage.get_trial_user_attrs(trial)
        name = "baseline_devices" if trial is None else "devices"
        held: list[tuple[float, float]] = [*attrs.get(name, ())]
        if devices is not None and (not held or held[-1][1] != devices):
            held = [*(one for one in held if one[0] < seconds), (seconds, devices)]
            if trial is None:
                self._study.set_user_attr(name, held)
            else:
                self._storage.set_trial_user_attr(trial, name, held)
        ends = [since for since, _ in held[1:]] + [seconds]
        return sum(max(0.0, end - since) * d for (since, d), end in zip(held, ends, strict=True)) if held else None

    def first_started(self, number: int | None, now: float) -> float:
        """When a trial ran for the first time, which is `now` if it never did: seconds of the search."""
        if number is None:
            known = self._attr("baseline_started")
            if known is None:
                self._study.set_user_attr("baseline_started", now)
        else:
            trial = self._storage_id(number)
            known = self._storage.get_trial_user_attrs(trial).get("started")
            if known is None:
                self._storage.set_trial_user_attr(trial, "started", now)
        return now if known is None else float(known)

    def has_started(self, number: int | None) -> bool:
        """Whether a trial has ever been on a worker."""
        if number is None:
            return self._attr("baseline_started") is not None
        return "started" in self._storage.get_trial_user_attrs(self._storage_id(number))

    def add_seconds(self, wall: float, device: float) -> None:
        """Time that the search has used, over all sessions, and what its trials held of devices meanwhile."""
        self._study.set_user_attr("wall_seconds", self.wall_seconds() + wall)
        self._study.set_user_attr("device_seconds", self.device_seconds() + device)

    # Reading

    def records(self) -> list[dict[str, Any]]:
        """The records of all trials that ended or are held, a baseline outside the space first."""
        found = [self._record(None, self._storage.get_study_user_attrs(self._study_id), "baseline")]
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished() or trial.user_attrs.get("held"):
                found.append(self._record(trial.number, trial.user_attrs, "record"))
        return [record for record in found if record]

    def _record(self, number: int | None, attributes: dict[str, Any], name: str) -> dict[str, Any] | None:
        """A record, joined where it lies in parts."""
        if not isinstance(attributes.get(name), int):
            return records.joined(attributes, name)
        if number not in self._joined:
            found = records.joined(attributes, name)
            assert found is not None
            self._joined[number] = found
        return self._joined[number]

    def wall_seconds(self) -> float:
        """Time that the search has used, over all sessions."""
        return float(self._attr("wall_seconds") or 0.0)

    def device_seconds(self) -> float:
        """Devices times the seconds that trials held them, over all sessions; what a crash or a stop lost included."""
        return float(self._attr("device_seconds") or 0.0)

    def trial_id(self, number: int | None) -> str:
        """The name of a trial everywhere."""
        return records.trial_id(self.run_id, number)

    def _attr(self, name: str) -> Any:
        # `study.user_attrs` would copy all of them, records too.
        return self._storage.get_study_user_attrs(self._study_id).get(name)

    def _storage_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def is_there(storage: optuna.storages.BaseStorage, study: str) -> bool:
    """Whether a storage has a study of this name."""
    try:
        storage.get_study_id_from_name(study)
    except KeyError:
        return False
    return True


def _parts(name: str, record: dict[str, Any], longest: int | None) -> list[tuple[str, Any]]:
    """A record as attributes that are short enough; the one that says how many, without which none counts, is last."""
    text = json.dumps(record) if longest else ""
    if longest is None or len(text) <= longest:
        return [(name, record)]
    pieces = [text[start : start + longest] for start in range(0, len(text), longest)]
    return [*((f"{name}-{n}", piece) for n, piece in enumerate(pieces)), (name, len(pieces))]
