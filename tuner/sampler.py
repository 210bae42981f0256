"""The Optuna study: the record of a search. What is asked of it, told to it and read off it.

Every proposal, every epoch's value and every end is in the study before anything else happens, so that a search can
be killed at any moment and go on from the study alone. States are exact:

- WAITING: proposed, and not running: enqueued, or put back when the search was stopped; asked for again first
- RUNNING: on a worker now, or, with the user attribute `held`, taken off it by a scheduler that may let it go on; such
  a one has a record already, and is WAITING while no search runs
- COMPLETE: trained to its last epoch; the value is the objective at the best epoch, and the cost where there are two
- PRUNED: stopped early, with all its intermediate values
- FAIL: diverged, crashed or out of memory; the record says why

The whole record of a trial (see tuner/records.py) is its user attribute `record`: where a column is too short for it,
the number of parts, which are `record-0`, `record-1`, ... A baseline that lies outside the space is no point of the
study: its record is the study's user attribute `baseline`, in parts likewise.

Constraints are told as Optuna keeps them, so that samplers and `study.best_trial` see them: how far a figure lies
beyond its bound, 0 or less where it meets it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from model.config import DEFAULTS, JUDGING_FIELDS, Judgement, RunConfig
from tuner import draw, records, schedulers
from tuner.records import Proposal
from tuner.space import Space
from tuner.storage import holds_long_text, open_storage, open_to_read

MAX_REPLAYS_IN_A_ROW = 20
"""So many proposals in a row that need no training mean that there is nothing new to find."""

_LONGEST_TEXT = 30_000
"""characters of a record in one attribute, where a column holds 64 KiB: as JSON they may take twice as much"""

_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped_early": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}


class SearchStudy:
    """One search's study, in a journal file that one process writes to, or in the database of a URL; else in memory.

    ValueError if the database cannot be used, or if the study has `begun` and is not there.
    """

    def __init__(self, space: Space, run_id: str, where: Path | str | None, begun: bool = False) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.run_id = run_id
        self._baseline_asked = False
        self._running: dict[int | None, Proposal] = {}
        self._waits = False
        name = study_name(space, run_id, where)
        opened = open_storage(where)
        if begun and not _is_there(opened, name):
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
        # A sampler does not remember what it drew before a stop; the count keeps it from drawing the same again.
        seed = space.seed + len(self._study.get_trials(deepcopy=False))
        sampler = draw.sampler(space, seed)
        if space.scheduler.name != "none" and space.compares_objective:
            sampler = draw.SeesCurves(sampler, self._study, self._reached)
        self._samplers = sampler, optuna.samplers.RandomSampler(seed + 2**31)
        if "queued" not in self._study.user_attrs:
            self._queue_first_trials()
        self._held: dict[int, Proposal] = {}
        self._judged: dict[int, int] = {}
        """the last epoch at which a trial was compared"""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            if trial.user_attrs.get("held") and trial.user_attrs.get("record") is not None:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                self._held[trial.number] = self._proposal(trial.number, trial.params)
            elif trial.state is TrialState.RUNNING:
                if trial.user_attrs.get("held"):  # killed when it was about to go on, its record taken back already
                    self._storage.set_trial_user_attr(trial._trial_id, "held", False)
                self.put_back(trial.number)
        self._trained: set[str] = set()
        """the trials whose networks have been trained, or in part"""
        self._by_network: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        """the records of what was trained, by the fields that decide the weights"""
        for record in self.records():
            self._remember(record)

    def _queue_first_trials(self) -> None:
        baseline = self.space.baseline_params()
        if baseline is not None:
            self._study.enqueue_trial(baseline, skip_if_exists=True)
        for point in self.space.start_from:
            if dict(point) != baseline:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)
        self._study.set_user_attr("baseline_in_space", baseline is not None)
        self._study.set_user_attr("queued", True)

    def warm_start(self, others: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Lets the sampler know what another search found, once: how many of its completed trials lie in this space,
        and how many do not, or do not say what it cost or what the constraints ask for, and are dropped.

        They are points of the study without a record: nothing is charged for them, and none can win.
        """
        if (before := self.warm_started()) is not None:
            return before
        taken = dropped = 0
        known = {trial.user_attrs.get("warm_start") for trial in self._study.get_trials(deepcopy=False)}
        by_trial = {record["trial"]: record for record in others}
        for record in others:
            if record["status"] != "completed" or record["value"] is None:
                continue
            config = record["config"]
            params = {name: config[name] for name in self.space.search if name in config}
            params = {name: params[name] for name in self.space.active(params)}
            values = records.values(self.space, record, by_trial.get(record["replayed_from"] or record["trial"]))
            figures = records.figures(record)
            is_whole = values is not None and all(bound.metric in figures for bound in self.space.constraints)
            if not (is_whole and self.space.contains(params)):
                dropped += 1
                continue
            taken += 1
            if record["trial"] in known:  # the last session was killed here
                continue
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=params,
                    distributions={name: draw.distribution(self.space.search[name]) for name in params},
                    values=values,
                    constraints=records.excesses(self.space, record),
                    user_attrs={"warm_start": record["trial"]},
                )
            )
        self._study.set_user_attr("warm_start", (taken, dropped))
        return taken, dropped

    def warm_started(self) -> tuple[int, int] | None:
        """What `warm_start` answered, in an earlier session too; None before it was called."""
        found = self._attr("warm_start")
        return None if found is None else (found[0], found[1])

    # Asking

    def ask(self, new: bool = True) -> Proposal | None:
        """The next trial for a worker; the baseline before any other. None when there is none now.

        That is a trial that was interrupted or enqueued, else the best of those held at a rung that may go on, else a
        `new` one, unless the budget has no room for it.

        Proposals whose network is trained already are told from its replay on the way; one whose network is being
        trained waits, and so does whoever asks for a new one.
        """
        if not (self._attr("baseline_in_space") or self._attr("baseline") or self._baseline_asked):
            self._baseline_asked = True
            config = self.space.baseline_config(self.space.seed)
            baseline = Proposal(self.trial_id(None), None, self._outside_params(config), config, True)
            self._running[None] = baseline
            return baseline
        new = new and not self._waits
        if not (new and self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))):
            if (held := self._promote(no_more=False)) is not None:
                return held
            new = new and self._attr("exhausted_at") != len(self._trained)
        found = self._next_new() if new else None
        if found is None and not self._waits:
            found = self._promote(no_more=True)
        return found

    def take_interrupted(self) -> list[Proposal]:
        """The trials that were on a worker, have not ended and wait to go on: they are to be finished now."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        taken = [trial for trial in waiting if "started" in trial.user_attrs]
        for trial in taken:
            self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        return [self._proposal(trial.number, trial.params) for trial in taken]

    def has_held(self) -> bool:
        """Whether trials are held at rungs."""
        return bool(self._held)

    def _next_new(self) -> Proposal | None:
        is_grid = self.space.sampler == "grid"
        for known in itertools.count() if is_grid else range(MAX_REPLAYS_IN_A_ROW):
            if is_grid and not self._queue_next_of_grid():
                return None
            # A model that insists on what is known already is not asked for ever.
            self._study.sampler = self._samplers[known >= MAX_REPLAYS_IN_A_ROW // 2]
            trial = self._study.ask()
            params = self._suggest(trial)
            proposal = self._proposal(trial.number, params)
            if self._is_being_trained(proposal):
                self.put_back(trial.number)
                self._waits = True
                return None
            source = self._trained_twin(proposal)
            if source is None:
                return self._starts(proposal)
            self._tell_from_replay(proposal, source)
        # It is exhausted until there is another network.
        self._study.set_user_attr("exhausted_at", len(self._trained))
        return None

    def _starts(self, proposal: Proposal) -> Proposal:
        assert proposal.number is not None  # the baseline that has none is started apart
        self._running[proposal.number] = proposal
        attributes = self._storage.get_trial(self._storage_id(proposal.number)).user_attrs
        self._judged[proposal.number] = attributes.get("judged", 0)
        return proposal

    def _passes(self, number: int, epoch: int) -> None:
        """A trial goes on behind a rung, and is not compared at it again, also after a stop."""
        self._storage.set_trial_user_attr(self._storage_id(number), "judged", epoch)

    def _promote(self, no_more: bool) -> Proposal | None:
        """Lets a held trial go on. Its record is taken back: it has not ended."""
        by_masks: defaultdict[int | str | None, list[int]] = defaultdict(list)
        for number, proposal in self._held.items():
            by_masks[self._masks(proposal.params)].append(number)
        # One that failed after a rung takes nobody's place when the last ones are chosen.
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)) if no_more else []
        failed = {trial.number for trial in trials}
        for masks, held in by_masks.items():
            rivals = [p for p in self._running.values() if not p.is_baseline and self._masks(p.params) == masks]
            running = [rival.number for rival in rivals if rival.number is not None]
            free = [number for number in held if not self._is_being_trained(self._held[number])]
            curves = {n: curve for n, curve in self.curves(like=held[0]).items() if n not in failed}
            length = self.space.trial_length
            found = schedulers.promoted(self.space.scheduler, length, free, running, curves, no_more)
            if found is not None:
                return self._take_up(found) or self._promote(no_more)
        return None

    def _take_up(self, number: int) -> Proposal | None:
        """Takes the record of a held trial back: it has not ended. None if its network has been trained meanwhile."""
        proposal, trial = self._held.pop(number), self._storage_id(number)
        self._storage.set_trial_user_attr(trial, "record", None)
        self._passes(number, max(self._storage.get_trial(trial).intermediate_values))
        self._storage.set_trial_user_attr(trial, "held", False)
        twins = self._by_network[_network_of(proposal.config.to_dict())]
        twins[:] = [record for record in twins if record["trial"] != proposal.trial]
        source = self._trained_twin(proposal)
        if source is None:
            return self._starts(proposal)
        self._tell_from_replay(proposal, source)
        return None

    def leaves(self, proposal: Proposal, epoch: int) -> str | None:
        """Why the scheduler takes a trial off its worker at an epoch that was reported, or None."""
        assert proposal.number is not None  # only the baseline may have none, and it is not compared
        number, scheduler, length = proposal.number, self.space.scheduler, self.space.trial_length
        since = self._judged.get(number, 0)
        self._judged[number] = epoch
        if not schedulers.compares(scheduler, length, number, since, epoch):
            return None
        reason = schedulers.leaves(scheduler, length, number, since, self.curves(number), self.space.unit)
        if reason is None:
            self._passes(number, epoch)
        return reason

    def _reached(self, trial: optuna.trial.FrozenTrial) -> list[float] | None:
        """What a trial that has not completed is worth so far, to a sampler; one objective a value."""
        if not trial.intermediate_values or len(trial.constraints) < len(self.space.constraints):
            return None
        reached = trial.intermediate_values[max(trial.intermediate_values)]
        if self.space.cost is None:
            return [reached]
        record = self._record(trial.number, trial.user_attrs, "record")
        return [reached, record["values"][1]] if record and record["values"] else None

    def _queue_next_of_grid(self) -> bool:
        """Enqueues the next point that is not in the study yet, unless one waits already; False at the end."""
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state is TrialState.WAITING for trial in trials):
            return True
        known = [trial.params for trial in trials if "warm_start" not in trial.user_attrs]
        place = int(self._attr("grid_place") or 0)
        while place < len(self._grid) and self._grid[place] in known:
            place += 1
        self._study.set_user_attr("grid_place", place)
        if place == len(self._grid):
            return False
        self._study.enqueue_trial(self._grid[place])
        return True

    @cached_property
    def _grid(self) -> list[dict[str, Any]]:
        """All points, in an order that the seed fixes: a part of them is a sample of all."""
        points = self.space.grid()
        random.Random(self.space.seed).shuffle(points)
        return points

    def _is_being_trained(self, proposal: Proposal) -> bool:
        wanted = proposal.config.training_fields()
        others = (other.config for other in self._running.values())
        return any(all(getattr(other, name) == value for name, value in wanted.items()) for other in others)

    def _suggest(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Every parameter whose conditions hold, in the order of the space."""
        params: dict[str, Any] = {}
        for name, param in self.space.search.items():
            if all(params.get(parent) in values for parent, values in param.when.items()):
                params[name] = draw.suggest(trial, name, param)
        return params

    def _proposal(self, number: int, params: dict[str, Any]) -> Proposal:
        seed = self.space.seed  # one seed for all trials: they differ by their configuration alone
        config = self.space.config(params, seed)
        is_baseline = number == 0 and self._attr("baseline_in_space")
        return Proposal(self.trial_id(number), number, params, config, is_baseline)

    def _trained_twin(self, proposal: Proposal) -> dict[str, Any] | None:
        """The record of a trial that trained the same network to its end, or to where it diverged, and was judged in
        the proposed way too. One that was stopped early was compared as it was judged itself, so it answers for nothing
        but the very same configuration; one that crashed may do better another time."""
        for record in self._by_network[_network_of(proposal.config.to_dict())]:
            match record["status"]:
                case "completed" if _replay(record, proposal.config):
                    return record
                case "diverged":
                    return record
                case "stopped_early" if Judgement.of(DEFAULTS | record["config"]) == proposal.config.judgement():
                    return record
        return None

    def _tell_from_replay(self, proposal: Proposal, source: dict[str, Any]) -> None:
        replay = _replay(source, proposal.config) or {"value": None, "epoch": None, "thresholds": None}
        if source["status"] == "stopped_early":  # pruned trials tell Optuna by their last epoch
            for row in source["history"]:
                self.report(proposal.number, row["epoch"], row["compared"])
        self.finish(
            proposal,
            source
            | {
                "trial": proposal.trial,
                "number": proposal.number,
                "baseline": False,
                "params": proposal.params,
                "config": proposal.config.to_dict(),
                "value": replay["value"],
                "best_epoch": replay["epoch"],
                "thresholds": replay["thresholds"],
                "replayed_from": source["trial"],
                "started": None,
                "ended": None,
                "seconds": 0.0,
                "device_seconds": 0.0,
            }
            | ({"fold": replay.get("fold"), "folds": replay.get("folds", [])} if "folds" in source else {}),
            source,
        )

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

    def hold(self, proposal: Proposal, record: dict[str, Any]) -> dict[str, Any]:
        """A trial that a scheduler has taken off its worker and may let go on. Returns the record as it is kept."""
        assert proposal.number is not None
        kept = self._keep(proposal, record, None)
        self._storage.set_trial_user_attr(self._storage_id(proposal.number), "held", True)
        self._held[proposal.number] = proposal
        return kept

    def let_go(self, for_good: bool) -> list[dict[str, Any]]:
        """The end of a session for the trials that are held: stopped early `for_good`, or put aside until the search
        goes on. Returns the records of those that have ended."""
        ended = []
        for number in [*self._held]:
            if not for_good:
                self._storage.set_trial_state_values(self._storage_id(number), TrialState.WAITING)
                continue
            del self._held[number]
            self._study.tell(number, None, state=TrialState.PRUNED)
            trial = self._storage.get_trial(self._storage_id(number))
            record = self._record(number, trial.user_attrs, "record")
            assert record is not None
            ended.append(record)
        return ended

    def _keep(self, proposal: Proposal, record: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
        """Writes a record, with what is judged of it."""
        self._waits = False
        self._running.pop(proposal.number, None)
        excesses = records.excesses(self.space, record)
        record = records.judged(self.space, record, trained)
        self._remember(record)
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

    def _remember(self, record: dict[str, Any]) -> None:
        if not record["replayed_from"]:
            self._trained.add(record["trial"])
            self._by_network[_network_of(record["config"])].append(record)

    def put_back(self, number: int | None) -> None:
        """A running trial that was not finished: it is asked for again, with its parameters."""
        self._running.pop(number, None)
        self._waits = False
        if number is None:
            self._baseline_asked = False
        else:
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

    def curves(self, like: int | None = None) -> dict[int, dict[int, float]]:
        """The figure that schedulers compare, by number and epoch, of every trial that was trained; without the
        baseline. Where masks are a cost, only of the trials with as many as trial `like`, if that is given."""
        first = 1 if self._attr("baseline_in_space") else 0
        trials = self._study.get_trials(deepcopy=False)
        wanted = None if like is None else self._masks(trials[like].params)
        return {
            trial.number: trial.intermediate_values
            for trial in trials
            if trial.number >= first
            and trial.intermediate_values
            and not self._is_replay(trial)
            and (wanted is None or self._masks(trial.params) == wanted)
        }

    def _masks(self, params: Mapping[str, Any]) -> int | str | None:
        """How many positives keep their masks, as configured; None where that is no cost."""
        if self.space.cost is None or self.space.cost.metric != "num_segmented":
            return None
        fixed = self.space.train.get("num_segmented", DEFAULTS["num_segmented"])  # where a condition does not hold
        found: int | str = params.get("num_segmented", fixed)
        return found

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

    def _is_replay(self, trial: optuna.trial.FrozenTrial) -> bool:
        return bool((self._record(trial.number, trial.user_attrs, "record") or {}).get("replayed_from"))

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

    def _outside_params(self, baseline: RunConfig) -> dict[str, Any]:
        """Fields in which a baseline outside the space differs from what the space fixes."""
        fixed = RunConfig(**{**self.space.train, "seed": self.space.seed}).to_dict()
        skip = ("input_height", "input_width")
        return {k: v for k, v in baseline.to_dict().items() if k not in skip and v != fixed[k]}


def _network_of(config: dict[str, Any]) -> str:
    """The fields that decide the weights, as one word; what an older record does not say is the default."""
    return json.dumps({k: v for k, v in (DEFAULTS | config).items() if k not in JUDGING_FIELDS}, sort_keys=True)


def study_name(space: Space, run_id: str, where: Path | str | None) -> str:
    """What is searched; in a database, where many runs may lie, which run too."""
    return f"{space.name}-{space.fingerprint()}" + (f"-{run_id}" if isinstance(where, str) else "")


def _is_there(storage: optuna.storages.BaseStorage, study: str) -> bool:
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


def _replay(record: dict[str, Any], config: RunConfig) -> dict[str, Any] | None:
    """What a trained network gave when it was judged as a configuration wants it."""
    wanted = config.judgement()
    return next((replay for replay in record["replays"] if Judgement.of(replay) == wanted), None)


def count_running(where: Path | str, study: str | None = None) -> int:
    """How many trials of a study run now, for somebody who watches: nothing is written. In a journal there is one."""
    if isinstance(where, Path) and not where.exists():
        return 0
    storage = open_to_read(where)
    running = 0
    names = [study] if study else optuna.get_all_study_names(storage)
    for name in (name for name in names if _is_there(storage, name)):
        study_id = storage.get_study_id_from_name(name)
        trials = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        running += sum(not trial.user_attrs.get("held") for trial in trials)
        attributes = storage.get_study_user_attrs(study_id)
        outside = attributes.get("baseline_in_space") is False
        running += outside and "baseline" not in attributes  # it is the first to run
    return running
