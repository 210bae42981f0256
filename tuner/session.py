"""One session of a search: which trials run, which end, what the budget still holds. Ray's part is tuner/search.py."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model import checkpoint
from tuner import checkpoints, records, schedulers
from tuner.cluster import Resources, Slots, nodes_alive
from tuner.records import Proposal, SearchFailed, Status
from tuner.sampler import SearchStudy
from tuner.space import Budget
from tuner.tracking import Trackers
from tuner.trial import nothing_yet

OVER = "OVER"
"""nothing will start any more"""

_FAILURES_IN_A_ROW = 3
"""So many trials that failed one after another for the same reason are a bug or a broken machine, not bad luck."""

_SECONDS_BETWEEN_SAVES = 10.0
"""so much of the hours used may be forgotten when the driver is killed"""

_DEATHS = 3
"""So many deaths of a trial's worker process are the trial's own doing. That of its node does not count."""


class Session:
    """The trials that run, and what is to happen to them: what the adapters to Ray Tune (tuner/search.py) share."""

    def __init__(
        self, study: SearchStudy, trials: Path, budget: Budget, resources: Resources, trackers: Trackers
    ) -> None:
        self.study, self.trials, self.budget, self.resources, self.trackers = study, trials, budget, resources, trackers
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
        self.nodes: dict[str, set[str]] = {}
        """where a trial runs, or may have been sent to"""
        self.starts: Counter[str] = Counter()
        """how often a trial was given to a worker in this session"""
        self.blamed: Counter[str] = Counter()
        """how often its worker died without its node"""
        self._file = records.RecordsFile(trials.parent)
        self._baseline_has_ended = False
        self._replays = {record["trial"] for record in study.records() if record["replayed_from"]}
        self._pruned: set[str] = set()
        self._last_failures: list[str] = []
        self._used_up: str | None = None
        self._wall = study.wall_seconds()
        self._device = study.device_seconds()
        self._saved = self._wall, self._device
        self._clock = time.monotonic()
        self._slots = Slots(resources)

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
        if len(self.live) >= self._slots.count():
            return None
        proposal = self.study.ask(new=self._has_room())
        self._take_in_replays()
        if proposal is None:
            # Nothing new now; a trial that is running may still change the sampler's mind.
            return None if self.live else OVER
        checkpoint_folder = checkpoints.newest(self.trials, proposal.trial)
        progress = checkpoint.load_progress(checkpoint_folder) if checkpoint_folder else nothing_yet()
        for row in progress["history"]:  # the driver may have died between the checkpoint and the study
            self.study.report(proposal.number, row["epoch"], row["compared"])
        self.live[key] = proposal
        self.nodes[key] = nodes_alive()
        self.progress[key] = progress
        self.starts[proposal.trial] += 1
        self.trackers.trial_started(proposal.trial, proposal.params, proposal.config.to_dict(), progress["history"])
        again = self.starts[proposal.trial]
        return {
            "trial": proposal.trial,
            "folder": proposal.trial if again == 1 else f"{proposal.trial}.{again}",
            "config": proposal.config.to_dict(),
            "checkpoint": str(checkpoint_folder.resolve()) if checkpoint_folder else None,
        }

    def _take_in_replays(self) -> None:
        """Asking may have told some trials from others' networks, or taken a held one back."""
        found = self.study.records()
        self._file.write(found)
        for record in found:
            if record["replayed_from"] and record["trial"] not in self._replays:
                self._replays.add(record["trial"])
                checkpoints.prune(
                    self.trials, record["trial"], keep=0
                )  # it may have begun before the other network was done
                self.trackers.trial_ended(record)

    def _has_room(self) -> bool:
        """Whether the budget has room for a further trial."""
        trials = self.budget.trials
        return trials is None or len(records.charged(self.study.records())) + len(self.live) < trials

    def is_over(self) -> bool:
        """Whether nothing may start any more. The baseline always runs to its end."""
        if self.stop_asked or self.failure is not None or self.error is not None:
            return True
        return (self._baseline_ended() or self._baseline_runs()) and self.used_up() is not None

    def nothing_left(self) -> bool:
        """Whether there is nothing for a worker to do."""
        return self.is_over() or not (self._has_room() or self.study.has_held())

    # What happens

    def began(self, key: str) -> None:
        """A trial is on a worker now; it may have waited for one."""
        self._pass_time()
        self.started[key] = self._wall
        self.study.first_started(self.live[key].number, self._wall)

    def reported(self, key: str, progress: dict[str, Any], node: str, use: dict[str, float]) -> bool:
        """Takes in a trial's progress on a node, and what it used there since the last; False when it is to stop."""
        proposal = self.live[key]
        self.nodes[key] = {node}
        if progress["status"] == Status.FAILED:  # what it had reached stays known
            progress = self.progress[key] | {name: progress[name] for name in ("status", "reason", "traceback")}
        self.progress[key] = progress
        if progress["status"] in (Status.DIVERGED, Status.FAILED) or not progress["history"]:
            return True
        row = progress["history"][-1]
        self.study.report(proposal.number, row["epoch"], row["compared"])
        checkpoints.prune(self.trials, proposal.trial, keep=2)  # the newest may have been cut short
        is_best = row["epoch"] == progress["best_epoch"]
        pictures = checkpoints.previews(self.trials, proposal.trial) if is_best else {}
        self.trackers.epoch_ended(proposal.trial, row, use, pictures)
        used_up = self.used_up()
        if progress["status"] == Status.COMPLETED or proposal.is_baseline:
            return True
        reason = used_up or self.study.leaves(proposal, row["epoch"])
        if reason is not None:
            self.reason_stopped[key] = reason
        return reason is None

    def ended(self, key: str, crashed: bool) -> None:
        """A trial has left its worker."""
        if key not in self.live:
            return
        used_up = self.used_up()
        proposal, progress = self.live.pop(key), self.progress.pop(key)
        nodes, started = self.nodes.pop(key), self.started.pop(key, None)
        status, reason = progress["status"], progress["reason"]
        if key in self.reason_stopped:
            status, reason = Status.STOPPED_EARLY, self.reason_stopped.pop(key)
        elif status != "running":  # whatever its process did after that
            pass
        elif crashed and not self._is_dead_for_good(proposal, nodes):
            self.study.put_back(proposal.number)
            return
        elif crashed:
            status, reason = Status.FAILED, f"its worker process died {_DEATHS} times; memory may have run out"
        elif used_up and not self.stop_asked and not proposal.is_baseline:
            status, reason = Status.STOPPED_EARLY, used_up
            # An epoch that was cut held its devices too.
            cut = self._wall - started if started is not None else 0.0
            progress = progress | {"seconds": max(progress["seconds"], cut)}
        else:
            self.study.put_back(proposal.number)
            return
        self._finish(proposal, progress | {"status": str(status), "reason": reason})

    def _is_dead_for_good(self, proposal: Proposal, nodes: set[str]) -> bool:
        """Whether a trial whose worker died is given up; else it goes on from its last checkpoint."""
        self.blamed[proposal.trial] += nodes <= nodes_alive()
        return self.blamed[proposal.trial] >= _DEATHS

    def _finish(self, proposal: Proposal, progress: dict[str, Any]) -> None:
        record = {
            **proposal.identity(),
            "started": self.study.first_started(proposal.number, self._wall),
            "ended": self._wall,
            "device_seconds": progress["seconds"] * self.resources.devices,
            **progress,
        }
        is_stopped = progress["status"] == Status.STOPPED_EARLY
        is_held = is_stopped and self._used_up is None and schedulers.may_go_on(self.study.space.scheduler)
        record = self.study.hold(proposal, record) if is_held else self.study.finish(proposal, record)
        self._save_clock()
        found = self.study.records()
        self._file.write(found)
        keeps = is_held or progress["status"] == Status.COMPLETED
        checkpoints.prune(self.trials, proposal.trial, keep=1 if keeps else 0)
        if is_held:
            self._last_failures.clear()
            self.trackers.trial_held(record)
            return
        for trial in records.cannot_win(found) - self._pruned:
            checkpoints.prune(self.trials, trial, keep=0)
            self._pruned.add(trial)
        self.trackers.trial_ended(record)
        if progress["status"] != Status.FAILED:
            self._last_failures.clear()
            return
        self._last_failures.append(progress["reason"])
        last = self._last_failures[-_FAILURES_IN_A_ROW:]
        if len(last) == _FAILURES_IN_A_ROW and len(set(last)) == 1:
            self.failure = f"{_FAILURES_IN_A_ROW} trials in a row failed for the same reason: {progress['reason']}"

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
                folder = checkpoints.newest(self.trials, proposal.trial)
                progress = checkpoint.load_progress(folder) if folder else nothing_yet()
                self._finish(proposal, progress | {"status": "stopped_early", "reason": self.used_up()})
        for record in self.study.let_go(for_good=is_finished):
            checkpoints.prune(self.trials, record["trial"], keep=0)
            self.trackers.trial_ended(record)
        self._save_clock()
        self._file.write(self.study.records())

    def must_stop(self) -> bool:
        """Whether all running trials are to end now. The baseline always runs to its end."""
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
        self._device += passed * len(self.started) * self.resources.devices
        if self._wall - self._saved[0] > _SECONDS_BETWEEN_SAVES:
            self._save_clock()

    def _save_clock(self) -> None:
        self.study.add_seconds(self._wall - self._saved[0], self._device - self._saved[1])
        self._saved = self._wall, self._device
