"""The Ray Tune run of a search: our study behind Ray's searcher, scheduler, stopper and callback.

Ray schedules; the session (tuner/session.py) decides and the study (tuner/sampler.py) remembers. Nothing that Ray saves
is read back: a search goes on as a new Tune experiment that is fed from the study.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import ray
import torch
from ray import cloudpickle, tune
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.tune import FailureConfig, Stopper, TuneConfig
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuner import checkpoints, cluster, pack, pack_actors, tracing
from tuner.checkpoints import Torn, Trials, Writer
from tuner.cluster import Resources, fit_at_once
from tuner.datasets import DataFailed
from tuner.mirror import Mirror
from tuner.nodes import Needs
from tuner.pack import Asked, HostLost
from tuner.pack_actors import Hosts
from tuner.records import NodeUnfit
from tuner.remote import StorageFailed, Unusable
from tuner.scratch import scratch_folder
from tuner.session import LEAVES, OVER, UNFIT, UNREACHED, Session
from tuner.space import Budget
from tuner.study import TrialStudy
from tuner.tracking import Trackers
from tuner.trial import Task, failure, has_new_pictures, nothing_yet, previews, run_on, take_device
from tuner.use import Meter

if TYPE_CHECKING:
    from model.config import RunConfig

logger = logging.getLogger(__name__)


def run_trials(
    study: TrialStudy,
    task: Task,
    run_directory: Path,
    budget: Budget,
    resources: Resources,
    trackers: Trackers,
    mirror: Mirror | None = None,
    needs: Needs | None = None,
    *,
    packed: bool = True,
    profile: bool = False,
) -> str:
    """Runs trials until the budget is spent, nothing new is left ("finished") or the user stops it ("stopped"). A node
    that joins meanwhile must have what is needed. `packed`: those that share a GPU train in one process. `profile`: a
    trace of the first trial is left in the run's directory, unless there is one.

    SearchFailed when trials crash one after another.
    """
    mirror = mirror or Mirror(run_directory)
    trials = mirror.trials
    session = Session(study, trials, budget, resources, trackers, mirror, needs.source if needs else None, profile)
    if session.nothing_left():
        return session.close()
    fit, why = fit_at_once(resources)
    if not cluster.able_nodes(resources):
        logger.warning("no node can take a trial yet: waiting for the autoscaler, whose limits allow %d at once", fit)
    elif (resources.concurrent or 0) > fit:
        logger.warning("--concurrent %d: only %d fit at once (%s)", resources.concurrent, fit, why)
    session.attempt = trials.new_attempt()
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a signal sets our flag; Ray's handler would drop what runs
        "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # the session says how many, and that changes with the cluster
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # or Tune starts the trial again as it was given at first
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Ray's own record is never read back
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    hosts = pack_actors.opened(task) if packed and 0 < resources.gpus_per_trial < 1 else nullcontext()
    try:
        with hosts as opened, _processes_that_are_ready(needs), _signals_set(session):
            _experiment(session, task, needs, opened).fit()
    except Exception as error:
        session.error = session.error or _cause(error)
    finally:
        ended = session.close()
    return ended


def _experiment(session: Session, task: Task, needs: Needs | None, hosts: Hosts | None) -> tune.Tuner:
    """What Ray Tune runs of a session."""
    resources, trials = session.resources, session.trials
    given = {"task": task, "cpus": resources.cpus_per_trial, "trials": trials, "needs": needs, "hosts": hosts}
    return tune.Tuner(
        tune.with_parameters(_trial_on_worker, **given),
        tune_config=TuneConfig(
            search_alg=_StudySearcher(session),
            scheduler=_StudyScheduler(session),
            num_samples=-1,  # the searcher says when it is over
            reuse_actors=resources.gpus_per_trial == 0,  # a new process costs a second; on a GPU it returns the memory
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["folder"],
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{session.attempt}",
            storage_path=str(trials.local),
            stop=_Stop(session),
            callbacks=[_Began(session)],
            failure_config=FailureConfig(max_failures=0),
            verbose=0,
        ),
    )


def _cause(error: Exception) -> Exception:
    """What went wrong where Ray Tune tells of it: the text of a TuneError is a traceback."""
    cause = error.__cause__ or error.__context__
    return _cause(cause) if isinstance(error, tune.TuneError) and isinstance(cause, Exception) else error


def placement(config: dict[str, Any], resources: Resources, unfit: Collection[str]) -> tune.PlacementGroupFactory:
    """What a trial holds, and where: on any node but the unfit ones, and those that others need for their GPUs."""
    bundle = {"CPU": resources.cpus_per_trial, "GPU": config["gpus"]}
    beside = resources.gpus_per_trial and not config["gpus"]
    avoided = {*unfit, *(cluster.kept_for_gpus(resources) if beside else ())}
    where = {"bundle_label_selector": [cluster.elsewhere(avoided)]} if avoided else {}
    return tune.PlacementGroupFactory([bundle], **where)


class _StudySearcher(Searcher):
    """Lets Ray Tune ask the study, and tells it what became of a trial."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with self._session.errors_end():
            found = self._session.next(trial_id)
            return self.FINISHED if found == OVER else found
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler took it in already: Ray does not pass the last result on to a searcher."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        with self._session.errors_end():
            self._session.ended(trial_id, crashed=error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class _StudyScheduler(FIFOScheduler):
    """Stops trials by the values that the study holds; keeps nothing of its own."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        with self._session.errors_end():
            trial.update_resources(placement(trial.config, self._session.resources, self._session.unfit))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Before the searcher hears of it, which is not told what went wrong."""
        with self._session.errors_end():
            error = _error_of(trial)
            # Of a connection that broke it is not known yet whether the process died, or its node.
            lost = isinstance(error, ActorUnavailableError) or getattr(error, "preempted", False)
            said = f"{type(error.cause).__name__}: {error.cause}" if isinstance(error, RayTaskError) else None
            self._session.ended(trial.trial_id, crashed=True, is_certain=not lost, error=said)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        with self._session.errors_end():
            if result["prepared"] and result["training_iteration"] == 1:
                logger.warning("%s; it had joined late", result["prepared"])
            progress, use, pictures = (json.loads(result[name]) for name in ("progress", "use", "pictures"))
            pictures = {name: base64.b64decode(data) for name, data in pictures.items()}
            if trace := json.loads(result["trace"]):
                self._session.traced(trial.trial_id, {name: base64.b64decode(data) for name, data in trace.items()})
            if not self._session.reported(trial.trial_id, progress, result["node"], use, pictures):
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


def _error_of(trial: Any) -> Exception | None:
    """What Ray has just written of a trial's worker; None where that cannot be read here."""
    with suppress(Exception):
        return cast("Exception", cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    return None


class _Began(tune.Callback):
    """Says when a trial comes to its worker; a report from there would cost each trial a turn of Ray's loop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with self._session.errors_end():
            self._session.began(trial.trial_id, cluster.node_of(trial.temporary_state.ray_actor))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        for name in ("pictures", "trace"):
            result.pop(name, None)  # Ray keeps the last result of every trial


class _Stop(Stopper):
    """Ends the whole experiment when the user or the clock says so."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        with self._session.errors_end():
            return self._session.must_stop()
        return True


def _trial_on_worker(
    config: dict[str, Any], task: Task, cpus: float, trials: Trials, needs: Needs | None, hosts: Hosts | None
) -> None:
    """What Ray runs: one trial, whose end is always reported, however it comes. NodeUnfit where the trial is to go on
    elsewhere, HostLost where it is to go on without a host."""
    from model.config import RunConfig

    writer = Writer(trials, config["start"], config["config"])
    trace_folder: Path | None = None
    """where a trace is left that was not reported yet"""

    def report(progress: dict[str, Any], folder: Path | None, use: dict[str, float] | None = None) -> None:
        nonlocal trace_folder
        pictures: dict[str, str] = {}
        if folder:
            writer.write(folder, progress["epochs"], last=progress["status"] != "running")
            if trials.there and has_new_pictures(progress):  # the driver would have to fetch them
                pictures = {name: base64.b64encode(data).decode() for name, data in previews(folder).items()}
        trace = tracing.files(trace_folder) if trace_folder else {}
        if trace:
            trace_folder = None
        use = use or (meter.read() if meter else {})  # not part of the progress: records of equal searches are equal
        told = {"progress": progress, "use": use, "pictures": pictures}
        told["trace"] = {name: base64.b64encode(data).decode() for name, data in trace.items()}
        where = {"node": node, "prepared": prepared}
        tune.report({name: json.dumps(value) for name, value in told.items()} | where)  # Ray would flatten it

    node = ray.get_runtime_context().get_node_id()
    own = RunConfig.from_dict(config["config"])
    meter = prepared = None
    is_ready = False
    packs = hosts if config["gpus"] and not (config["alone"] or config["traced"]) else None
    try:
        if node in cluster.draining():  # Ray gave the trial to a process from before the notice
            raise _NodeLeaves
        prepared = needs.make_ready(*task.decoded) if needs else None
        is_ready = True
        if packs:  # this process asks CUDA for nothing, which would cost it memory of the GPU
            with scratch_folder() as scratch:
                resume = _fetched(config, own, trials, scratch)
                asked = Asked(own, config["gpus"], max(1, int(cpus)), resume, scratch)
                pack.train_at(packs.address(), asked, report)
            return
        device = _device(config["gpus"], int(cpus))
        with Meter(device) as meter, scratch_folder() as scratch:
            resume = _fetched(config, own, trials, scratch)
            if config["traced"]:
                trace_folder = scratch / tracing.FOLDER
                trace_folder.mkdir()
                task = task.traced(trace_folder)
            run_on(task, own, device, config["gpus"], resume, report)
    except _NodeLeaves:
        report(nothing_yet() | {"status": LEAVES}, None)
        raise  # ends the process, to which Ray would give the next trial
    except HostLost:
        raise  # as a process that dies
    except Exception as error:  # a trial that crashes is a result, with its reason
        full = cluster.full_disk(error)
        unreached = isinstance(error, StorageFailed | DataFailed) or not is_ready
        status = UNREACHED if unreached else UNFIT
        if isinstance(error, StorageFailed | Unusable):
            error = NodeUnfit(f"a node must reach the run's storage to take trials, and this one does not: {error}")
        if full is None and not isinstance(error, NodeUnfit | DataFailed):
            report(nothing_yet() | failure(error), None)
            return
        report(nothing_yet() | {"status": status, "reason": str(error), "errno": full}, None)
        raise NodeUnfit(str(error)) from None  # as above; what torch raises may not travel


class _NodeLeaves(Exception):
    """A trial has come to a node that has a notice to go."""


def _device(gpus: float, threads: int) -> torch.device:
    try:
        return take_device(gpus, threads)
    except RuntimeError as error:
        raise NodeUnfit(str(error)) from error


def _fetched(config: dict[str, Any], own: RunConfig, trials: Trials, scratch: Path) -> Path | None:
    """The checkpoint to go on from, on this machine: the one that the driver names, or an older one if that is torn."""
    address = config["checkpoint"]
    while address is not None:
        try:
            return checkpoints.fetch(address, scratch / "checkpoint")
        except Torn as error:
            logger.warning("%s; it is left out", error)
            shutil.rmtree(scratch / "checkpoint", ignore_errors=True)
            checkpoints.discard(address)
        found = checkpoints.patiently_newest(trials, config["trial"], own)
        address = found.address if found else None
    return None


@contextmanager
def _processes_that_are_ready(needs: Needs | None) -> Iterator[None]:
    """With an environment of its own, which here is of another library, a trial could have none of the processes that
    Ray has ready. Those of this machine alone have the driver's environment anyhow."""
    before = class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.DEFAULT_ENV_VARS = {}
    if needs is not None and needs.place is None:
        class_cache.ENV_VARS_TO_PROPAGATE = set()
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = before


@contextmanager
def _signals_set(session: Session) -> Iterator[None]:
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
