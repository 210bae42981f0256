"""The Ray Tune run of a search: who may start, who is stopped, what happened, and what is left to do.

Ray schedules; the study (tuner/sampler.py) decides and remembers. Nothing that Ray saves is read back: a search goes
on as a new Tune experiment that is fed from the study.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune import Checkpoint, FailureConfig, Stopper, TuneConfig
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from model import checkpoint
from tuner import records, schedulers
from tuner.records import Proposal, SearchFailed, Status
from tuner.sampler import SearchStudy
from tuner.space import Budget
from tuner.tracking import Trackers
from tuner.trial import TrialTask, failure, nothing_yet, previews, take_device
from tuner.use import Meter

_FAILURES_IN_A_ROW = 3
"""So many trials that failed one after another for the same reason are a bug or a broken machine, not bad luck."""

_SECONDS_BETWEEN_SAVES = 10.0
"""so much of the hours used may be forgotten when the driver is killed"""

_SECONDS_TO_ANSWER = 10.0
"""so long a cluster may take to accept a connection"""

_DEATHS = 3
"""So many deaths of a trial's worker process are the trial's own doing. That of its node does not count."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What a trial holds, and how many run at once. None: as many as fit."""

    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    concurrent: int | None = None

    @property
    def devices(self) -> float:
        """What a trial is charged for: GPUs, or CPUs where it has none."""
        return self.gpus_per_trial or self.cpus_per_trial


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A Ray that this process is connected to: already, at `address`, or a local one of its own. ValueError if there
    is none at `address`."""
    if ray.is_initialized():
        yield
        return
    if address:
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray speaks of things that this search does not use: its own results, its snapshots, its token.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # counts trials that went on after their worker died
    try:
        ray.init(
            address=address or "local",  # never by chance the cluster of somebody else on this machine
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except ConnectionError as error:
        if not address:
            raise
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """ValueError if nothing listens at host:port: Ray would ask for two minutes, then end this process."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):  # auto, or what Ray itself refuses
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"--address must be that of a running Ray cluster, found none at {address} ({error}); start one with "
        "`ray start --head`, or leave --address out for a Ray of this search's own"
    )


def default_resources(cpus: float | None, gpus: float | None, concurrent: int | None) -> Resources:
    """What was asked for; else a whole GPU a trial where the cluster has some, with its share of the node's cores, or
    one CPU. ValueError if no node can hold a trial."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = gpus if gpus is not None else float(any(node.get("GPU") for node in nodes))
    shares = [node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU")] if gpus >= 1 else []
    found = Resources(cpus if cpus is not None else float(max(1, min(shares, default=1))), gpus, concurrent)
    asked = {"CPU": found.cpus_per_trial, "GPU": found.gpus_per_trial}
    if not any(all(node.get(name, 0) >= wanted for name, wanted in asked.items()) for node in nodes):
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
        apart = "" if any(asked[name] > most[name] for name in asked) else " on different nodes"
        short = [name for name in asked if apart or asked[name] > most[name]]
        wanted = " and ".join(f"{asked[name]:g} {name}" for name in short)
        largest = " and ".join(f"{most[name]:g}" for name in short)
        raise ValueError(
            f"a trial must fit one node of the cluster: it asks for {wanted}, found at most {largest}{apart}; "
            f"lower --{short[0].lower()}s-per-trial"
        )
    return found


def fit_at_once(resources: Resources) -> tuple[int, str]:
    """How many trials the cluster as it is runs at once, and what bounds them."""
    there = ray.cluster_resources()
    count, name, wanted = min(
        (int(there.get(name, 0) // wanted), name, wanted)
        for name, wanted in (("CPU", resources.cpus_per_trial), ("GPU", resources.gpus_per_trial))
        if wanted
    )
    return count, f"{wanted:g} {name} a trial, {there.get(name, 0):g} there"


def run_on_worker(function: Callable[..., Any], resources: Resources, *arguments: Any) -> Any:
    """Calls `function(*arguments)` on a worker with a trial's resources; the head may have no GPU. Raises what the
    function raises."""
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial, max_retries=0)
    try:
        return ray.get(remote(function).remote(*arguments))
    except ray.exceptions.RayTaskError as error:  # its text is a traceback
        raise error.cause from error


def run_trials(
    study: SearchStudy, task: TrialTask, run_directory: Path, budget: Budget, resources: Resources, trackers: Trackers
) -> str:
    """Runs trials until the budget is spent, nothing new is left ("finished") or the user stops it ("stopped").

    SearchFailed when trials crash one after another.
    """
    trials = run_directory / "trials"
    session = _Session(study, trials, budget, resources, trackers)
    if session.nothing_left():
        return session.close()
    fit, why = fit_at_once(resources)
    if (resources.concurrent or 0) > fit:
        logger.warning("--concurrent %d: only %d fit at once (%s)", resources.concurrent, fit, why)
    attempt = sum(1 for _ in trials.glob("attempt-*")) + 1
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a signal sets our flag; Ray's handler would drop what runs
        "TUNE_MAX_PENDING_TRIALS_PG": str(session.slots),
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Ray's own record is never read back
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    on_cpu = resources.gpus_per_trial == 0
    trainable = tune.with_resources(
        tune.with_parameters(_trial_on_worker, task=task, resources=resources),
        {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial},
    )
    experiment = tune.Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=_StudySearcher(session),
            scheduler=_StudyScheduler(session),
            num_samples=-1,  # the searcher says when it is over
            reuse_actors=on_cpu,  # a new process a trial costs a second; on a GPU it returns the memory
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["folder"],
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(trials.resolve()),
            stop=_Stop(session),
            callbacks=[_Began(session)],
            failure_config=FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        with _signals_set(session):
            experiment.fit()
    except Exception as error:
        session.error = session.error or _cause(error)
    finally:
        ended = session.close()
    return ended


def _cause(error: Exception) -> Exception:
    """What went wrong where Ray Tune tells of it: the text of a TuneError is a traceback."""
    cause = error.__cause__ or error.__context__
    return _cause(cause) if isinstance(error, tune.TuneError) and isinstance(cause, Exception) else error


def newest_checkpoint(trials: Path, trial: str) -> Path | None:
    """The whole checkpoint folder of a trial that has come furthest, over all attempts."""
    return checkpoint.newest(_folders(trials, trial, "checkpoint_*"))


def _folders(trials: Path, trial: str, pattern: str) -> list[Path]:
    """What lies in the folders of a trial: one an attempt, and one more for each time that its worker died."""
    return [path for name in (trial, f"{trial}.*") for path in trials.glob(f"attempt-*/{name}/{pattern}")]


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _prune(trials: Path, trial: str, keep: int) -> None:
    """Removes all but a trial's newest checkpoints. Ray would save its whole experiment each time that it does."""
    folders = sorted(_folders(trials, trial, "checkpoint_*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[: len(folders) - keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _previews(trials: Path, trial: str) -> dict[str, bytes]:
    """Pictures of the newest checkpoint, if it lies on a disk that the driver sees."""
    folders = sorted(_folders(trials, trial, "checkpoint_*/previews"), key=lambda f: f.stat().st_mtime)
    return previews(folders[-1].parent) if folders else {}


class _Session:
    """What the searcher, the scheduler and the stopper share: the trials that run, and what is to happen to them."""

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
        self.slots = resources.concurrent or max(1, fit_at_once(resources)[0])

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Ray pickles what it is handed, for a restore that never happens: it gets None."""
        return type(None), ()

    # What the searcher asks

    def next(self, key: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None to wait, or FINISHED."""
        if self.is_over():
            # Ray asks no more after FINISHED, and a trial that runs may yet lose its worker.
            return None if self.live else Searcher.FINISHED
        if len(self.live) >= self.slots:
            return None
        proposal = self.study.ask(new=self._has_room())
        self._take_in_replays()
        if proposal is None:
            # Nothing new now; a trial that is running may still change the sampler's mind.
            return None if self.live else Searcher.FINISHED
        checkpoint_folder = newest_checkpoint(self.trials, proposal.trial)
        progress = checkpoint.load_progress(checkpoint_folder) if checkpoint_folder else nothing_yet()
        for row in progress["history"]:  # the driver may have died between the checkpoint and the study
            self.study.report(proposal.number, row["epoch"], row["compared"])
        self.live[key] = proposal
        self.nodes[key] = _nodes_alive()
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
                _prune(self.trials, record["trial"], keep=0)  # it may have begun before the other network was done
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
        _prune(self.trials, proposal.trial, keep=2)  # the newest may have been cut short
        is_best = row["epoch"] == progress["best_epoch"]
        pictures = _previews(self.trials, proposal.trial) if is_best else {}
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
        self.blamed[proposal.trial] += nodes <= _nodes_alive()
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
        _prune(self.trials, proposal.trial, keep=1 if keeps else 0)
        if is_held:
            self._last_failures.clear()
            self.trackers.trial_held(record)
            return
        for trial in records.cannot_win(found) - self._pruned:
            _prune(self.trials, trial, keep=0)
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
        with _errors_end(self):
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
                folder = newest_checkpoint(self.trials, proposal.trial)
                progress = checkpoint.load_progress(folder) if folder else nothing_yet()
                self._finish(proposal, progress | {"status": "stopped_early", "reason": self.used_up()})
        for record in self.study.let_go(for_good=is_finished):
            _prune(self.trials, record["trial"], keep=0)
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


class _StudySearcher(Searcher):
    """Lets Ray Tune ask the study, and tells it what became of a trial."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with _errors_end(self._session):
            return self._session.next(trial_id)
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler took it in already: Ray does not pass the last result on to a searcher."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        with _errors_end(self._session):
            self._session.ended(trial_id, crashed=error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class _StudyScheduler(FIFOScheduler):
    """Stops trials by the values that the study holds; keeps nothing of its own."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        with _errors_end(self._session):
            progress, use = (json.loads(result[name]) for name in ("progress", "use"))  # Ray flattens what is nested
            if not self._session.reported(trial.trial_id, progress, result["node"], use):
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


@contextmanager
def _errors_end(session: _Session) -> Iterator[None]:
    """An error in the driver ends the search. Ray would swallow some, and raise others in the middle of its own."""
    try:
        yield
    except Exception as error:
        session.error = session.error or error


class _Began(tune.Callback):
    """Says when a trial comes to its worker; a report from there would cost each trial a turn of Ray's loop."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with _errors_end(self._session):
            self._session.began(trial.trial_id)


class _Stop(Stopper):
    """Ends the whole experiment when the user or the clock says so."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        with _errors_end(self._session):
            return self._session.must_stop()
        return True


def _trial_on_worker(config: dict[str, Any], task: TrialTask, resources: Resources) -> None:
    """What Ray runs: one trial, whose end is always reported, however it comes."""
    from model.config import RunConfig

    def report(progress: dict[str, Any], folder: Path | None) -> None:
        kept = Checkpoint.from_directory(str(folder)) if folder else None
        use = meter.read()  # not part of the progress: records of equal searches are equal
        told = {"progress": json.dumps(progress), "use": json.dumps(use), "node": node}
        tune.report(told, checkpoint=kept)

    node = ray.get_runtime_context().get_node_id()
    device = take_device(resources.gpus_per_trial, int(resources.cpus_per_trial))
    resume = Path(config["checkpoint"]) if config["checkpoint"] else None
    with Meter(device) as meter:
        try:
            task.run(RunConfig.from_dict(config["config"]), device, resume, report)
        except Exception as error:  # a trial that crashes is a result, with its reason
            report(nothing_yet() | failure(error), None)


@contextmanager
def _signals_set(session: _Session) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks for a clean stop; a second one does not wait for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        if session.stop_asked:
            raise KeyboardInterrupt
        session.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
