"""One session of a search: which trials run, which end, what the budget still holds. Ray's part is tuner/search.py."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from model.config import RunConfig
from tuner import checkpoints, cluster, records, schedulers, tracing
from tuner.checkpoints import Found, Trials
from tuner.cluster import Resources
from tuner.datasets import Source
from tuner.mirror import Mirror
from tuner.records import Proposal, SearchFailed, Status
from tuner.remote import StorageFailed
from tuner.space import Budget
from tuner.study import TrialStudy
from tuner.tracking import Trackers
from tuner.trial import has_new_pictures, nothing_yet

logger = logging.getLogger(__name__)

OVER = "OVER"
"""nothing will start any more"""

_FAILURES_IN_A_ROW = 3
"""So many trials that failed one after another for the same reason are a bug or a broken machine, not bad luck."""

_SECONDS_BETWEEN_SAVES = 10.0
"""so much of the hours used may be forgotten when the driver is killed"""

_SECONDS_BETWEEN_TRIES = 10.0
"""so long nothing starts whose checkpoint cannot be looked for, before the next try"""

_SECONDS_OF_AN_OUTAGE = 180.0
"""so long after the storage failed here, what a worker says may still be of that"""

_DEATHS = 3
"""So many deaths of a trial's worker process are the trial's own doing. That of its node does not count."""

_SECONDS_BETWEEN_LOOKS = 5.0
"""at the nodes of the cluster, which come and go"""

UNFIT = "unfit"
"""the status that a trial reports whose node cannot run it"""

UNREACHED = "unreached"
"""the status that a trial reports whose node does not reach the run's storage or its data"""

LEAVES = "leaves"
"""the status that a trial reports which was sent to a node that has a notice to go"""


class Session:
    """The trials that run, and what is to happen to them: what the adapters to Ray Tune (tuner/search.py) share."""

    def __init__(
        self,
        study: TrialStudy,
        trials: Trials,
        budget: Budget,
        resources: Resources,
        trackers: Trackers,
        mirror: Mirror,
        source: Source | None = None,
        profile: bool = False,
    ) -> None:
        self.study, self.trials, self.budget, self.resources, self.trackers = study, trials, budget, resources, trackers
        self.mirror, self.source = mirror, source
        self._profile = trials.local.parent / tracing.FOLDER if profile else None
        """where the trace of a trial is to lie, if one is asked for"""
        self._traced: str | None = None
        """the trial that makes one"""
        self.attempt = 1
        """the number of this session among all that wrote checkpoints"""
        self.live: dict[str, Proposal] = {}
        self.progress: dict[str, dict[str, Any]] = {}
        """what a trial has reached, in earlier sessions too"""
        self.started: dict[str, float] = {}
        """when a trial came to its worker, which some of the live ones may wait for"""
        self.reason_stopped: dict[str, str] = {}
        self.stop_asked = False
        self.failure: str | None = None
        self.error: Exception | None = None
        """what went wrong in the driver itself: Ray would go on without a word"""
        self.gpus: dict[str, float] = {}
        """how many a trial holds"""
        self.nodes: dict[str, set[str]] = {}
        """where a trial runs, or may have been sent to"""
        self.folders: dict[str, str] = {}
        """where its worker puts checkpoints, below `trials/`"""
        self.starts: Counter[str] = Counter()
        """how often a trial was given to a worker in this session"""
        self.unfit: dict[str, str] = {}
        """nodes that take no more trials, and why"""
        self._unfit_in_a_row: dict[str, str] = {}
        """those that turned out so since another one was seen to work"""
        self._waits_for_better = False
        """whether it was said that all nodes are unfit, and another one may come"""
        self._full: dict[str, int] = {}
        """those of them whose disk is full, and what it said"""
        self._elsewhere: set[str] = set()
        """trials whose worker ends by itself, since they are to go on at another node"""
        self._last_epoch: dict[str, float] = {}
        """when a trial began its epoch"""
        self._deaths: defaultdict[str, list[set[str]]] = defaultdict(list)
        """where a trial's workers have died: one node, or those that it may have been sent to"""
        self._file = records.RecordsFile(trials.local.parent, study.records_file)
        self._storage_failed = -math.inf
        """when the storage was last seen to be out of reach from here, by the monotonic clock"""
        self._next_look = 0.0
        """when the storage may be asked again for a checkpoint, by the monotonic clock"""
        self._baseline_has_ended = not study.needs_baseline
        self._replays = {record["trial"] for record in study.records() if record["replayed_from"]}
        self._pruned: set[str] = set()
        self._last_failures: list[str] = []
        self._used_up: str | None = None
        self._wall = study.wall_seconds()
        self._device = study.device_seconds()
        self._saved = self._wall, self._device
        self._clock = time.monotonic()
        self._looked = self._clock - _SECONDS_BETWEEN_LOOKS
        self._slots = 1

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Ray pickles what it is handed, for a restore that never happens: it gets None."""
        return type(None), ()

    @contextmanager
    def errors_end(self) -> Iterator[None]:
        """An error in the driver ends the search. Ray would swallow some, and raise others in the middle of its own."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    # What the searcher asks

    def next(self, key: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None to wait, or OVER."""
        if self.is_over():
            # Ray asks no more after OVER, and a trial that runs may yet lose its worker.
            return None if self.live else OVER
        self._look_at_nodes()
        if len(self.live) >= self._slots or time.monotonic() < self._next_look:
            return None
        proposal = self.study.ask(new=self._has_room())
        self._take_in_replays()
        if proposal is None:
            # Nothing new now; a trial that is running may still change the sampler's mind.
            return None if self.live else OVER
        try:
            found = self._newest(proposal)
        except StorageFailed:  # it has been trained in part, and nobody knows how far
            self.study.put_back(proposal.number)
            self._next_look = time.monotonic() + _SECONDS_BETWEEN_TRIES
            return None
        progress = found.progress if found else nothing_yet()
        for row in progress["history"]:  # the driver may have died between the checkpoint and the study
            self.study.report(proposal.number, row["epoch"], row["compared"])
        self.gpus[key] = self._gpus_of_next()
        if self.resources.cpu_trials:  # else all trials hold the same
            held = self.resources.devices_of(self.gpus[key])
            self.study.device_seconds_of(proposal.number, progress["seconds"], held)
        self.live[key] = proposal
        self.nodes[key] = cluster.nodes_alive()
        self.progress[key] = progress
        self.starts[proposal.trial] += 1
        self.trackers.trial_started(proposal.trial, proposal.params, proposal.config.to_dict(), progress["history"])
        again = self.starts[proposal.trial]
        folder = proposal.trial if again == 1 else f"{proposal.trial}.{again}"
        self.folders[key] = f"attempt-{self.attempt}/{folder}"
        self.mirror.changed()
        if self._profile and self._traced is None and not self._profile.exists():
            self._traced = key
        return {
            "trial": proposal.trial,
            "folder": folder,
            "start": self.folders[key],
            "config": proposal.config.to_dict(),
            "checkpoint": found.address if found else None,
            "gpus": self.gpus[key],
            "alone": self._has_died(proposal.trial),
            "traced": self._traced == key,
        }

    def _gpus_of_next(self) -> float:
        """A place on a GPU while there is one that is free; which trial gets it does not matter."""
        without = sum(1 for key in self.live if not self.gpus[key])
        is_free = len(self.live) - without < self._slots - self.resources.cpu_trials
        return self.resources.gpus_per_trial if is_free else 0.0

    def _newest(self, proposal: Proposal) -> Found | None:
        """The checkpoint that a trial goes on from. StorageFailed where the storage is out of reach, but for a trial
        that is new: it can have none but of a session whose last words the storage never got."""
        is_new = not (self.starts[proposal.trial] or self.study.has_started(proposal.number))
        if self.mirror.failing and is_new:
            return None
        try:
            return checkpoints.newest(self.trials, proposal.trial, proposal.config)
        except StorageFailed:
            self.mirror.changed()  # says so
            if is_new:
                return None
            raise

    def _prune(self, trial: str, keep: RunConfig | None = None) -> None:
        """Removes a trial's checkpoints, but the newest of a training that is kept, when the storage can be reached."""
        self.mirror.later(partial(checkpoints.prune, self.trials, trial, keep))

    def _take_in_replays(self) -> None:
        """Asking may have told some trials from others' networks, or taken a held one back."""
        found = self.study.records()
        self._file.write(found)
        for record in found:
            if record["replayed_from"] and record["trial"] not in self._replays:
                self._replays.add(record["trial"])
                self._prune(record["trial"])  # it may have begun before the other network was done
                self.trackers.trial_ended(record)

    def _has_room(self) -> bool:
        """Whether the budget has room for a further trial."""
        trials = self.budget.trials
        return trials is None or len(records.charged(self.study.records())) + len(self.live) < trials

    def is_over(self) -> bool:
        """Whether nothing may start any more. The baseline always runs to its end."""
        self.stop_asked = self.stop_asked or self.mirror.lost is not None
        if self.stop_asked or self.failure is not None or self.error is not None:
            return True
        return (self._baseline_ended() or self._baseline_runs()) and self.used_up() is not None

    def nothing_left(self) -> bool:
        """Whether there is nothing for a worker to do."""
        return self.is_over() or self.study.is_over() or not (self._has_room() or self.study.has_held())

    # What happens

    def began(self, key: str, node: str | None) -> None:
        """A trial is on a worker now, of a node that may be unknown; it may have waited for one."""
        self._pass_time()
        self.started[key] = self._last_epoch[key] = self._wall
        self.nodes[key] = {node} if node else self.nodes[key]
        self.study.first_started(self.live[key].number, self._wall)

    def reported(
        self, key: str, progress: dict[str, Any], node: str, use: dict[str, float], pictures: dict[str, bytes]
    ) -> bool:
        """Takes in a trial's progress on a node, what it used there since the last, and previews where they do not lie
        here; False when it is to stop."""
        proposal = self.live[key]
        self.nodes[key] = {node}
        if progress["status"] in (UNFIT, UNREACHED, LEAVES):  # and its process ends, so that it is given no other trial
            self._elsewhere.add(key)
            if progress["status"] != LEAVES:
                self._blame(node, progress)
            return True
        if progress["status"] == Status.FAILED:  # what it had reached stays known
            progress = self.progress[key] | {name: progress[name] for name in ("status", "reason", "traceback")}
        self.progress[key] = progress
        if progress["status"] in (Status.DIVERGED, Status.FAILED) or not progress["history"]:
            return True
        self._unfit_in_a_row.clear()
        self._waits_for_better = False
        row = progress["history"][-1]
        self.study.report(proposal.number, row["epoch"], row["compared"])
        if pictures:
            checkpoints.keep_previews(self.trials, self.folders[key], row["epoch"], pictures)
        elif has_new_pictures(progress):
            pictures = checkpoints.previews(self.trials, proposal.trial)
        self.trackers.epoch_ended(proposal.trial, row, use, pictures)
        used_up = self.used_up()
        lasted, self._last_epoch[key] = self._wall - self._last_epoch.get(key, self._wall), self._wall
        if progress["status"] == Status.COMPLETED:
            return True
        reason = None if proposal.is_baseline else used_up or self.study.leaves(proposal, row["epoch"])
        if reason is not None:
            self.reason_stopped[key] = reason
        # Where a node goes before a further epoch is done, the trial goes on elsewhere at once.
        return reason is None and cluster.draining().get(node, math.inf) > lasted

    def traced(self, key: str, files: dict[str, bytes]) -> None:
        """Takes in the trace of a trial."""
        assert self._profile is not None
        try:
            tracing.keep(self._profile, self.live[key].trial, files)
        except OSError as error:
            logger.warning("the trace of trial %s could not be kept: %s", self.live[key].trial, error)
        self.mirror.changed()

    def _blame(self, node: str, progress: dict[str, Any]) -> None:
        """A node takes no more trials, unless it failed at what fails here too: its trial waits, and so do others that
        have begun, until that is over. Then a node that is unfit all the same says so again."""
        if progress["status"] == UNREACHED and progress["errno"] is None and (what := self._out_of_reach()):
            logger.warning(
                "%s cannot be reached from here either, so the trial waits that node %s gave back: %s",
                what, cluster.name_of(node), progress["reason"],
            )  # fmt: skip
            self._next_look = time.monotonic() + _SECONDS_BETWEEN_TRIES
            return
        self._is_unfit(node, progress["reason"], progress["errno"])

    def _out_of_reach(self) -> str | None:
        """What is out of reach from here too, or was a moment ago."""
        self._note_storage()
        if time.monotonic() - self._storage_failed < _SECONDS_OF_AN_OUTAGE:
            return "the run's storage"
        try:
            self.trials.place.entries()
        except OSError:
            self.mirror.changed()  # says so
            self._storage_failed = time.monotonic()
            return "the run's storage"
        return "the data set" if self.source is not None and self.source.is_out_of_reach() else None

    def _note_storage(self) -> None:
        if self.mirror.failing:
            self._storage_failed = time.monotonic()

    def _is_unfit(self, node: str, reason: str, full: int | None) -> None:
        """A node takes no more trials. `full`: what its disk says that is full, or None."""
        if node not in self.unfit:
            logger.warning("%s", cluster.takes_no_more(node, reason))
        self.unfit[node] = self._unfit_in_a_row[node] = reason
        if full is not None:
            self._full[node] = full
        self._looked = -math.inf
        self._look_at_nodes()

    def _look_at_nodes(self) -> None:
        """From time to time: how many trials fit, and whether a node is left that could take one."""
        if self._clock - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = self._clock
        # Without a node, a trial waits for one.
        fit = self.resources.concurrent or max(1, cluster.fit_at_once(self.resources)[0])
        self._slots = fit + self.resources.cpu_trials
        there = self.unfit.keys() & cluster.nodes_alive()
        if not there or cluster.able_nodes(self.resources) - there or self.failure or self.error:
            return
        names = dict(sorted(((node, cluster.name_of(node)) for node in there), key=lambda pair: pair[1]))
        if cluster.better_may_come(self.resources, list(self._unfit_in_a_row.values())):
            if not self._waits_for_better:
                logger.warning("no node is left that could take a trial: waiting for one that the autoscaler starts")
            self._waits_for_better = True
            return
        if there <= self._full.keys():
            number = self._full[next(iter(names))]
            self.error = OSError(number, f"{os.strerror(number)} on {', '.join(names.values())}")
            return
        reasons = "; ".join(f"{name}: {self.unfit[node]}" for node, name in names.items())
        self.failure = (
            f"no node is left that could take a trial: {reasons}; when one is mended, or another has joined, "
            f"`tuner resume {self.trials.local.parent}` goes on"
        )

    def ended(self, key: str, crashed: bool, is_certain: bool = True, error: str | None = None) -> None:
        """A trial has left its worker. Not `is_certain`: what is thought to have crashed may have lost its node.
        `error`: what Ray says of a worker that could not run it."""
        if key not in self.live:
            return
        used_up = self.used_up()
        proposal, progress = self.live.pop(key), self.progress.pop(key)
        nodes, started = self.nodes.pop(key), self.started.pop(key, None)
        self.gpus.pop(key)
        self.folders.pop(key)
        self._traced = None if self._traced == key else self._traced
        self._last_epoch.pop(key, None)
        self.mirror.changed()
        status, reason = progress["status"], progress["reason"]
        if key in self.reason_stopped:
            status, reason = Status.STOPPED_EARLY, self.reason_stopped.pop(key)
        elif status != "running":  # whatever its process did after that
            pass
        elif key in self._elsewhere or (crashed and not self._is_dead_for_good(proposal, nodes, is_certain)):
            self._elsewhere.discard(key)
            self.study.put_back(proposal.number)
            return
        elif crashed:
            died = f"its worker process died {_DEATHS} times; memory may have run out"
            status, reason = Status.FAILED, f"no worker could run it: {error}" if error else died
        elif used_up and not self.stop_asked and not proposal.is_baseline:
            status, reason = Status.STOPPED_EARLY, used_up
            # An epoch that was cut held its devices too.
            cut = self._wall - started if started is not None else 0.0
            progress = progress | {"seconds": max(progress["seconds"], cut)}
        else:
            self.study.put_back(proposal.number)
            return
        self._finish(proposal, progress | {"status": str(status), "reason": reason})

    def _is_dead_for_good(self, proposal: Proposal, nodes: set[str], is_certain: bool) -> bool:
        """Whether a trial whose worker died is given up; else it goes on from its last checkpoint.

        A worker is known to be gone before its node is, so earlier deaths are judged by the nodes that are there now.
        """
        stay = cluster.nodes_that_stay()
        earlier = sum(before <= stay for before in self._deaths[proposal.trial])
        self._deaths[proposal.trial].append(nodes)
        return earlier + (is_certain and nodes <= stay) >= _DEATHS

    def _has_died(self, trial: str) -> bool:
        """Whether a process died that trained this trial, on a node that stays. It goes on in one of its own: what
        trains others beside it would die for all of them once more, if it was this trial's doing."""
        stay = cluster.nodes_that_stay()
        return any(before <= stay for before in self._deaths[trial])

    def _finish(self, proposal: Proposal, progress: dict[str, Any]) -> None:
        record = {
            **proposal.identity(),
            "started": self.study.first_started(proposal.number, self._wall),
            "ended": self._wall,
            "device_seconds": self._device_seconds(proposal, progress["seconds"]),
            **progress,
        }
        is_stopped = progress["status"] == Status.STOPPED_EARLY
        is_held = is_stopped and self._used_up is None and schedulers.may_go_on(self.study.space.scheduler)
        record = self.study.hold(proposal, record) if is_held else self.study.finish(proposal, record)
        self._save_clock()
        found = self.study.records()
        self._file.write(found)
        keeps = is_held or progress["status"] == Status.COMPLETED
        self._prune(proposal.trial, proposal.config if keeps else None)
        if is_held:
            self._last_failures.clear()
            self.trackers.trial_held(record)
            return
        for trial in self.study.cannot_win() - self._pruned:
            self._prune(trial)
            self._pruned.add(trial)
        self.trackers.trial_ended(record)
        if progress["status"] != Status.FAILED:
            self._last_failures.clear()
            return
        self._last_failures.append(progress["reason"])
        last = self._last_failures[-_FAILURES_IN_A_ROW:]
        if len(last) == _FAILURES_IN_A_ROW and len(set(last)) == 1:
            self.failure = f"{_FAILURES_IN_A_ROW} trials in a row failed for the same reason: {progress['reason']}"

    def _device_seconds(self, proposal: Proposal, seconds: float) -> float:
        known = self.study.device_seconds_of(proposal.number, seconds) if self.resources.cpu_trials else None
        return seconds * self.resources.devices if known is None else known

    def close(self) -> str:
        """Takes in what Ray stopped without a word; how the search ended. Raises what went wrong in the driver."""
        is_finished = not self.stop_asked and self.failure is None and self.error is None
        with self.errors_end():
            self._settle(is_finished)
        if self.error:
            raise self.error
        if self.failure:
            raise SearchFailed(self.failure)
        return "finished" if is_finished else "stopped"

    def _settle(self, is_finished: bool) -> None:
        """No trial is left running: it has ended, or waits until the search goes on."""
        for key in list(self.live):
            self.ended(key, crashed=False)
        if is_finished:
            for proposal in self.study.take_interrupted():
                found = self._newest(proposal)
                progress = found.progress if found else nothing_yet()
                self._finish(proposal, progress | {"status": "stopped_early", "reason": self.used_up()})
        for record in self.study.let_go(for_good=is_finished):
            self._prune(record["trial"])
            self.trackers.trial_ended(record)
        self._save_clock()
        self._file.write(self.study.records())

    def must_stop(self) -> bool:
        """Whether all running trials are to end now. The baseline always runs to its end."""
        self.stop_asked = self.stop_asked or self.mirror.lost is not None
        self._pass_time()
        self._note_storage()
        self._look_at_nodes()
        if self.stop_asked or self.failure is not None or self.error is not None:
            return True
        return self.used_up() is not None and self._baseline_ended()

    def _baseline_runs(self) -> bool:
        return any(proposal.is_baseline for proposal in self.live.values())

    def _baseline_ended(self) -> bool:
        self._baseline_has_ended = self._baseline_has_ended or records.baseline(self.study.records()) is not None
        return self._baseline_has_ended

    def used_up(self) -> str | None:
        """Which part of the budget is spent, as a reason; None while there is some of all. Once spent, it stays so,
        whatever the trials that are stopped for it turn out to have used."""
        self._pass_time()
        limits = self.budget
        device_hours = self._device / 3600
        money = device_hours * (limits.price_per_device_hour or 0)
        for name, spent, limit in (
            ("hours", self._wall / 3600, limits.hours),
            ("device-hours", device_hours, limits.device_hours),
            ("money", money, limits.money),
        ):
            if self._used_up is None and limit is not None and spent >= limit:
                self._used_up = f"the {name} of the budget {'was' if name == 'money' else 'were'} used up"
        return self._used_up

    def _pass_time(self) -> None:
        """Counts the time since the last call: of the search, and of the devices that its trials hold."""
        now = time.monotonic()
        passed, self._clock = now - self._clock, now
        self._wall += passed
        self._device += passed * sum(self.resources.devices_of(self.gpus[key]) for key in self.started)
        if self._wall - self._saved[0] > _SECONDS_BETWEEN_SAVES:
            self._save_clock()

    def _save_clock(self) -> None:
        self.study.add_seconds(self._wall - self._saved[0], self._device - self._saved[1])
        self._saved = self._wall, self._device
