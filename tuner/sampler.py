"""The Optuna study of a search: what it proposes, and when its trials stop and go on (what it keeps: tuner/study.py).

A trial that a scheduler took off its worker and may let go on has a record already, the state RUNNING and the user
attribute `held`; while no search runs it is WAITING. A baseline that lies outside the space is no point of the study:
its record is the study's user attribute `baseline`, in parts where a trial's would be.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from model.config import DEFAULTS, Judgement, RunConfig
from tuner import draw, records, schedulers
from tuner.records import Proposal
from tuner.selection import network_of
from tuner.space import MASK_COSTS, Space
from tuner.storage import open_to_read
from tuner.study import TrialStudy, is_there

MAX_REPLAYS_IN_A_ROW = 20
"""So many proposals in a row that need no training mean that there is nothing new to find."""

_KEPT_FOR_REPEATS = 8
"""networks whose checkpoints are kept where repeats may yet put one of them first"""


class SearchStudy(TrialStudy):
    """One search's study, in a journal file that one process writes to, or in the database of a URL; else in memory.

    ValueError if the database cannot be used, or if the study has `begun` and is not there.
    """

    needs_baseline = True

    def __init__(self, space: Space, run_id: str, where: Path | str | None, begun: bool = False) -> None:
        super().__init__(space, run_id, study_name(space, run_id, where), where, begun)
        self._baseline_asked = False
        self._waits = False
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
            self._study.enqueue_trial(baseline, {"drawn": "given"}, skip_if_exists=True)
        for point in self.space.start_from:
            if dict(point) != baseline:
                self._study.enqueue_trial(dict(point), {"drawn": "given"}, skip_if_exists=True)
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

    def has_held(self) -> bool:
        """Whether trials are held at rungs."""
        return bool(self._held)

    def _next_new(self) -> Proposal | None:
        is_grid = self.space.sampler == "grid"
        for known in itertools.count() if is_grid else range(MAX_REPLAYS_IN_A_ROW):
            if is_grid and not self._queue_next_of_grid():
                return None
            # A model that insists on what is known already is not asked for ever.
            learns = known < MAX_REPLAYS_IN_A_ROW // 2
            self._study.sampler = self._samplers[not learns]
            before = self._study.get_trials(deepcopy=False, states=draw.SEEN_BY_MODELS)
            trial = self._study.ask()
            if "drawn" not in trial.user_attrs and not (learns and draw.learns(self.space, len(before))):
                trial.set_user_attr("drawn", "random")
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
        twins = self._by_network[network_of(proposal.config.to_dict())]
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
        drawn = self._storage.get_trial_user_attrs(self._storage_id(number)).get("drawn", "model")
        return Proposal(self.trial_id(number), number, params, config, is_baseline, drawn)

    def _trained_twin(self, proposal: Proposal) -> dict[str, Any] | None:
        """The record of a trial that trained the same network to its end, or to where it diverged, and was judged in
        the proposed way too. One that was stopped early was compared as it was judged itself, so it answers for nothing
        but the very same configuration; one that crashed may do better another time."""
        for record in self._by_network[network_of(proposal.config.to_dict())]:
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

    def put_back(self, number: int | None) -> None:
        self._waits = False
        if number is None:
            self._baseline_asked = False
        super().put_back(number)

    def cannot_win(self) -> set[str]:
        repeats = self.space.repeats
        if repeats and repeats.prefer == "cheapest":
            return set()
        return records.cannot_win(self.records(), *((_KEPT_FOR_REPEATS,) if repeats else ()))

    def _keep(self, proposal: Proposal, record: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
        self._waits = False
        kept = super()._keep(proposal, record, trained)
        self._remember(kept)
        return kept

    def _remember(self, record: dict[str, Any]) -> None:
        if not record["replayed_from"]:
            self._trained.add(record["trial"])
            self._by_network[network_of(record["config"])].append(record)

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
        if self.space.cost is None or self.space.cost.metric not in MASK_COSTS:
            return None
        fixed = self.space.train.get("num_segmented", DEFAULTS["num_segmented"])  # where a condition does not hold
        found: int | str = params.get("num_segmented", fixed)
        return found

    def _is_replay(self, trial: optuna.trial.FrozenTrial) -> bool:
        return bool((self._record(trial.number, trial.user_attrs, "record") or {}).get("replayed_from"))

    def _outside_params(self, baseline: RunConfig) -> dict[str, Any]:
        """Fields in which a baseline outside the space differs from what the space fixes."""
        fixed = RunConfig(**{**self.space.train, "seed": self.space.seed}).to_dict()
        skip = ("input_height", "input_width")
        return {k: v for k, v in baseline.to_dict().items() if k not in skip and v != fixed[k]}


def study_name(space: Space, run_id: str, where: Path | str | None) -> str:
    """What is searched; in a database, where many runs may lie, which run too."""
    return f"{space.name}-{space.fingerprint()}" + (f"-{run_id}" if isinstance(where, str) else "")


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
    for name in (name for name in names if is_there(storage, name)):
        study_id = storage.get_study_id_from_name(name)
        trials = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        running += sum(not trial.user_attrs.get("held") for trial in trials)
        attributes = storage.get_study_user_attrs(study_id)
        outside = attributes.get("baseline_in_space") is False
        running += outside and "baseline" not in attributes  # it is the first to run
    return running
