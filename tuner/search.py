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
import threading
import time
import traceback
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
from tuner.records import SearchFailed, Status
from tuner.sampler import Proposal, SearchStudy
from tuner.space import Budget
from tuner.tracking import Trackers
from tuner.trial import TrialTask, nothing_yet, take_device

_FAILURES_IN_A_ROW = 3
"""So many trials that failed one after another for the same reason are a bug or a broken machine, not bad luck."""

_SECONDS_BETWEEN_SAVES = 10.0
"""so much of the hours used may be forgotten when the driver is killed"""

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
    """A Ray that this process is connected to: already, at `address`, or a local one of its own."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray speaks of things that this search does not use: its own results, its snapshots, its token.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # counts trials that went on after their worker died
    ray.init(
        address=address or "local",  # never by chance the cluster of somebody else on this machine
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def default_resources(cpus: float | None, gpus: float | None, concurrent: int | None) -> Resources:
    """What was asked for; else a whole GPU a trial where the cluster has some, or one CPU."""
    there = ray.cluster_resources()
    gpus = gpus if gpus is not None else (1.0 if there.get("GPU") else 0.0)
    per_gpu_cpus = max(1, int(there["CPU"] // max(there.get("GPU", 0), 1))) if gpus >= 1 else 1
    found = Resources(cpus if cpus is not None else float(per_gpu_cpus), gpus, concurrent)
    for name, wanted in (("CPU", found.cpus_per_trial), ("GPU", found.gpus_per_trial)):
        if wanted > there.get(name, 0):
            raise ValueError(
                f"a trial must fit the cluster: it asks for {wanted:g} {name}, found {there.get(name, 0):g}; "
                f"lower --{name.lower()}s-per-trial"
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
    """Calls `function(*arguments)` on a worker with a trial's resources; the head may have no GPU."""
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial, max_retries=0)
    return ray.get(remote(function).remote(*arguments))


def run_trials(
    study: SearchStudy, task: TrialTask, run_directory: Path, budget: Budget, resources: Resources, trackers: Trackers
) -> str:
    """Runs trials until the budget is spent, nothing new is left ("finished") or the user stops it ("stopped").

    SearchFailed when trials crash one after another.
    """
    trials = run_directory / "trials"
    session = _Session(study, trials, budget, resources, trackers)
    if session.nothing_left():
        return "finished"
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
    with _signals_set(session):
        experiment.fit()
    return session.close()


def newest_checkpoint(trials: Path, trial: str) -> Path | None:
    """The whole checkpoint folder of a trial that has come furthest, over all attempts."""
    return checkpoint.newest(_folders(trials, trial, "checkpoint_*"))


def _folders(trials: Path, trial: str, pattern: str) -> list[Path]:
    """What lies in the folders of a trial: one an attempt, and one more for each time that its worker died."""
    return [path for name in (trial, f"{trial}.*") for path in trials.glob(f"attempt-*/{name}/{pattern}")]


def _prune(trials: Path, trial: str, keep: int) -> None:
    """Removes all but a trial's newest checkpoints. Ray would save its whole experiment each time that it does."""
    folders = sorted(_folders(trials, trial, "checkpoint_*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[: len(folders) - keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _previews(trials: Path, trial: str) -> dict[str, bytes]:
    """Pictures of the newest checkpoint, if it lies on a disk that the driver sees."""
    folders = sorted(_folders(trials, trial, "checkpoint_*/previews"), key=lambda f: f.stat().st_mtime)
    return {file.stem: file.read_bytes() for file in sorted(folders[-1].glob("*.png"))} if folders else {}


class _Session:
    """What the searcher, the scheduler and the stopper share: the trials that run, and what is to happen to them."""

    def __init__(
        self, study: SearchStudy, trials: Path, budget: Budget, resources: Resources, trackers: Trackers
    ) -> None:
        self.study, self.trials, self.budget, self.resources, self.trackers = study, trials, budget, resources, trackers
        self.live: dict[str, Proposal] = {}
        self.progress: dict[str, dict[str, Any]] = {}
        self.started: dict[str, float] = {}
        """when a trial came to its worker, which some of the live ones may wait for"""
        self.before: dict[str, float] = {}
        """seconds of a running trial in earlier sessions"""
        self.judged: dict[str, int] = {}
        """the last epoch at which a trial was compared in this session"""
        self.reason_stopped: dict[str, str] = {}
        self.stop_asked = False
        self.failure: str | None = None
        self.nodes: dict[str, str] = {}
        """where a trial runs"""
        self.died: Counter[str] = Counter()
        """how often the worker of a trial died in this session"""
        self.blamed: Counter[str] = Counter()
        """how often it died without its node"""
        self._file = records.RecordsFile(trials.parent)
        self._last_failures: list[str] = []
        self._used_up: str | None = None
        self._device_seconds = sum(record["device_seconds"] for record in records.charged(study.records()))
        self._before = study.wall_seconds()
        self._clock = self._saved = time.monotonic()
        self.slots = resources.concurrent or max(1, fit_at_once(resources)[0])

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Ray pickles what it is handed, for a restore that never happens: it gets None."""
        return type(None), ()

    # What the searcher asks

    def next(self, key: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None to wait, or FINISHED."""
        if self.nothing_left():
            # Ray asks no more after FINISHED, and a trial that runs may yet lose its worker.
            return None if self.live else Searcher.FINISHED
        if len(self.live) >= self.slots:
            return None
        proposal = self.study.ask()
        self._file.write(self.study.records())  # asking may have replayed some
        if proposal is None:
            # Nothing new now; a trial that is running may still change the sampler's mind.
            return None if self.live else Searcher.FINISHED
        checkpoint_folder = newest_checkpoint(self.trials, proposal.trial)
        progress = checkpoint.load_progress(checkpoint_folder) if checkpoint_folder else nothing_yet()
        for row in progress["history"]:  # the driver may have died between the checkpoint and the study
            self.study.report(proposal.number, row["epoch"], row["compared"])
        self.live[key] = proposal
        self.before[key] = progress["seconds"]
        self.judged[key] = 0
        self.trackers.trial_started(proposal.trial, proposal.params, proposal.config.to_dict(), progress["epochs"])
        return {
            "trial": proposal.trial,
            "folder": f"{proposal.trial}.{died}" if (died := self.died[proposal.trial]) else proposal.trial,
            "config": proposal.config.to_dict(),
            "checkpoint": str(checkpoint_folder.resolve()) if checkpoint_folder else None,
        }

    def nothing_left(self) -> bool:
        """Whether no further trial may start."""
        used = records.charged(self.study.records())
        baseline_has_begun = records.baseline(used) is not None or self._baseline_runs()
        trials = self.budget.trials
        return (
            self.stop_asked
            or self.failure is not None
            or (trials is not None and len(used) + len(self.live) >= trials)
            or (baseline_has_begun and self.used_up() is not None)
        )

    # What happens

    def began(self, key: str) -> None:
        """A trial is on a worker now; it may have waited for one."""
        self.started[key] = self.elapsed()
        self._save_clock()  # or the clock of the next session would go on from before it
        self.study.first_started(self.live[key].number, self.started[key])

    def reported(self, key: str, progress: dict[str, Any], node: str) -> bool:
        """Takes in a trial's progress on a node; False when it is to stop."""
        proposal = self.live[key]
        self.nodes[key] = node
        if progress["status"] == Status.FAILED and key in self.progress:  # what it had reached stays known
            why = {name: progress[name] for name in ("status", "reason", "traceback")}
            progress = self.progress[key] | why
        self.progress[key] = progress
        if progress["status"] in (Status.DIVERGED, Status.FAILED) or not progress["history"]:
            return True
        row = progress["history"][-1]
        self.study.report(proposal.number, row["epoch"], row["compared"])
        _prune(self.trials, proposal.trial, keep=2)  # the newest may have been cut short
        is_best = row["epoch"] == progress["best_epoch"]
        previews = _previews(self.trials, proposal.trial) if is_best else {}
        self.trackers.epoch_ended(proposal.trial, row, previews)
        if progress["status"] == Status.COMPLETED or proposal.is_baseline:
            return True
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self._save_clock()
        if reason := self.used_up():
            self.reason_stopped[key] = reason
            return False
        return not self._is_cut(key, proposal, row["epoch"])

    def _is_cut(self, key: str, proposal: Proposal, epoch: int) -> bool:
        """Whether the scheduler stops a trial that has reached an epoch."""
        assert proposal.number is not None  # only the baseline may have none, and it is not compared
        scheduler, since = self.study.space.scheduler, self.judged[key]
        self.judged[key] = epoch
        if not schedulers.compares(scheduler, proposal.config.epochs, proposal.number, since, epoch):
            return False
        curves = self.study.curves(proposal.number)
        reason = schedulers.stops(scheduler, proposal.config.epochs, proposal.number, since, curves)
        if reason:
            self.reason_stopped[key] = reason
        return reason is not None

    def ended(self, key: str, crashed: bool) -> None:
        """A trial has left its worker."""
        if key not in self.live:
            return
        used_up = self.used_up()
        proposal = self.live.pop(key)
        progress = self.progress.pop(key, None) or nothing_yet()
        status, reason = progress["status"], progress["reason"]
        if key in self.reason_stopped:
            status, reason = Status.STOPPED_EARLY, self.reason_stopped.pop(key)
        elif crashed and not self._is_dead_for_good(key, proposal):
            self.study.put_back(proposal.number)
            return
        elif crashed:
            status, reason = Status.FAILED, f"its worker process died {_DEATHS} times; memory may have run out"
        elif status == "running" and used_up and not self.stop_asked and not proposal.is_baseline:
            status, reason = Status.STOPPED_EARLY, used_up
            # An epoch that was cut held its devices too.
            progress = progress | {"seconds": self._seconds_on_device(key) / self.resources.devices}
        elif status == "running":
            self.study.put_back(proposal.number)
            return
        self._finish(
            proposal, progress | {"status": str(status), "reason": reason}, self.started.pop(key, self.elapsed())
        )

    def _is_dead_for_good(self, key: str, proposal: Proposal) -> bool:
        """Whether a trial whose worker died is given up; else it goes on from its last checkpoint."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.died[proposal.trial] += 1
        self.blamed[proposal.trial] += self.nodes.pop(key, None) in alive | {None}
        return self.blamed[proposal.trial] >= _DEATHS

    def _finish(self, proposal: Proposal, progress: dict[str, Any], started: float) -> None:
        record = {
            "trial": proposal.trial,
            "number": proposal.number,
            "baseline": proposal.is_baseline,
            "seed": proposal.config.seed,
            "params": proposal.params,
            "config": proposal.config.to_dict(),
            "started": self.study.first_started(proposal.number, started),
            "ended": self.elapsed(),
            "device_seconds": progress["seconds"] * self.resources.devices,
            "replayed_from": None,
            **progress,
        }
        record = self.study.finish(proposal, record)
        self._device_seconds += record["device_seconds"]
        self._save_clock()
        self._file.write(self.study.records())
        _prune(self.trials, proposal.trial, keep=1 if progress["status"] == Status.COMPLETED else 0)
        self.trackers.trial_ended(record)
        if progress["status"] != Status.FAILED:
            self._last_failures.clear()
            return
        self._last_failures.append(progress["reason"])
        last = self._last_failures[-_FAILURES_IN_A_ROW:]
        if len(last) == _FAILURES_IN_A_ROW and len(set(last)) == 1:
            self.failure = f"{_FAILURES_IN_A_ROW} trials in a row failed for the same reason: {progress['reason']}"

    def close(self) -> str:
        """Takes in what Ray stopped without a word; how the search ended."""
        for key in list(self.live):
            self.ended(key, crashed=False)
        self._save_clock()
        self._file.write(self.study.records())
        if self.failure:
            raise SearchFailed(self.failure)
        return "stopped" if self.stop_asked else "finished"

    def must_stop(self) -> bool:
        """Whether all running trials are to end now. The baseline always runs to its end."""
        if self.stop_asked or self.failure is not None:
            return True
        return self.used_up() is not None and not self._baseline_runs()

    def _baseline_runs(self) -> bool:
        return any(proposal.is_baseline for proposal in self.live.values())

    def used_up(self) -> str | None:
        """Which part of the budget is spent, as a reason; None while there is some of all. Once spent, it stays so,
        whatever the trials that are stopped for it turn out to have used."""
        limits = self.budget
        device_hours = (self._device_seconds + sum(map(self._seconds_on_device, self.live))) / 3600
        money = device_hours * (limits.price_per_device_hour or 0)
        for name, spent, limit in (
            ("hours", self.elapsed() / 3600, limits.hours),
            ("device-hours", device_hours, limits.device_hours),
            ("money", money, limits.money),
        ):
            if self._used_up is None and limit is not None and spent >= limit:
                self._used_up = f"the {name} of the budget {'was' if name == 'money' else 'were'} used up"
        return self._used_up

    def _seconds_on_device(self, key: str) -> float:
        """Device-seconds of a running trial so far, those of earlier sessions too."""
        now = self.elapsed()
        return (self.before[key] + now - self.started.get(key, now)) * self.resources.devices

    def elapsed(self) -> float:
        """Seconds that the search has run, over all sessions."""
        return self._before + time.monotonic() - self._clock

    def _save_clock(self) -> None:
        now = time.monotonic()
        self.study.add_wall_seconds(now - self._saved)
        self._saved = now


class _StudySearcher(Searcher):
    """Lets Ray Tune ask the study, and tells it what became of a trial."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return self._session.next(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler took it in already: Ray does not pass the last result on to a searcher."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
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
        goes_on = self._session.reported(trial.trial_id, json.loads(result["progress"]), result["node"])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class _Began(tune.Callback):
    """Says when a trial comes to its worker."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._session.began(trial.trial_id)


class _Stop(Stopper):
    """Ends the whole experiment when the user or the clock says so."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.must_stop()


def _trial_on_worker(config: dict[str, Any], task: TrialTask, resources: Resources) -> None:
    """What Ray runs: one trial, whose end is always reported, however it comes."""
    from model.config import RunConfig

    def report(progress: dict[str, Any], folder: Path | None) -> None:
        kept = Checkpoint.from_directory(str(folder)) if folder else None
        tune.report({"progress": json.dumps(progress), "node": node}, checkpoint=kept)

    node = ray.get_runtime_context().get_node_id()
    device = take_device(resources.gpus_per_trial, int(resources.cpus_per_trial))
    resume = Path(config["checkpoint"]) if config["checkpoint"] else None
    try:
        task.run(RunConfig.from_dict(config["config"]), device, resume, report)
    except Exception as error:  # a trial that crashes is a result, with its reason
        reason = f"{type(error).__name__}: {error}"
        report(nothing_yet() | {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}, None)


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
