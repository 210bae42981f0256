"""The main job as a story: search, then finals, then the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import model.folds
from model.files import FULL_DISK
from model.splits import Splits
from tuner import finals, folds, importance, mirror, nodes, plan, remote, report, storage, tracking
from tuner.cluster import Resources, connected, default_resources, run_on_worker, sharing_gpus
from tuner.mirror import Mirror, mirrored
from tuner.options import Options
from tuner.records import SearchFailed
from tuner.repeats import RepeatStudy
from tuner.run import Run, create
from tuner.run import load as load_run
from tuner.sampler import SearchStudy
from tuner.search import run_trials
from tuner.space import Space, fields_of
from tuner.space_file import load as load_space
from tuner.trial import Task, batch_problem

_CLEARLY_TOO_LONG = 2.0
"""A search is refused where the baseline is forecast to take so many times what a limit holds (docs/decisions.md)."""


def run_search(
    space: Space | str | Path,
    data: str | Path,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    console: Console | None = None,
    **options: Any,
) -> Run:
    """Searches a space on a data set, evaluates the best configuration and writes its report.

    `space` is a Space, a file or the name of a shipped one; `data` a folder or "synthetic"; `options` are those of
    `tuner search` (fields of tuner.options.Options). With a `console`, progress is shown there. ValueError for anything
    that cannot work, SearchFailed where trials keep crashing.
    """
    space = space if isinstance(space, Space) else load_space(space)
    chosen = Options(**options)
    if chosen.cpu_trials and space.cost and space.cost.metric == "device_seconds":
        raise ValueError(
            f"--cpu-trials must be 0 where device_seconds is an objective, found {chosen.cpu_trials}: beside trials on "
            "GPUs one without holds no device, so it would win; leave it out"
        )
    if chosen.warm_start:
        chosen = replace(chosen, warm_start=_warm(load_run(chosen.warm_start), space))
    if chosen.wandb == "online":
        tracking.check_online()
    if chosen.study:
        chosen = replace(chosen, study=storage.checked(chosen.study))
    if chosen.storage:
        chosen = replace(chosen, storage=remote.checked(chosen.storage))
        mirror.check_apart(str(chosen.storage), Path(runs) / (name or space.name))
        mirror.check_free(str(chosen.storage), name or space.name)
    run = create(space, data, Path(runs), name, chosen, console=console)
    try:
        return go_on(run, console)
    except BaseException:  # what went wrong before anything was searched: the name stays free
        if not run.info["sessions"]:
            shutil.rmtree(run.directory, ignore_errors=True)
        raise


def go_on(run: Run, console: Console | None = None) -> Run:
    """Does what is left of a run: trials, finals, report. A search that was stopped ends before the finals."""
    if run.info["state"] != "finished":
        run.check_version()
    with run.locked(), full_disk_explained(run), mirrored(run, console) as mirror, ExitStack() as stack:
        stack.enter_context(_cluster_if_needed(run))
        try:
            state = run.info["state"]
            if state != "finished":
                with storage.explained(run.study):
                    state = _search(run, console, mirror)
            elif not importance.is_current(run.directory):
                importance.write(run.directory, run.space)
            if state == "finished" and not run.options.no_report:
                if not (run.directory / "evaluation" / "selection.json").exists():
                    if not repeat(run, mirror, console):
                        return run
                    evaluate(run)
                    mirror.changed()
                stack.close()  # a report needs no cluster
                report.write(run.directory)
                tracking.log_report(watched(run), run.options.wandb, run.options.wandb_wait)
        except SearchFailed as failure:
            if run.options.no_report or not run.info["sessions"]:
                raise
            stack.close()
            report.write(run.directory)
            raise SearchFailed(f"{failure}; how it went: {run.directory / 'report' / 'index.html'}") from failure
    return run


def at(run: Run, address: str | None) -> Run:
    """The run with Ray elsewhere from now on, by an address as `--address` takes it; as it was with None."""
    if address is None:
        return run
    moved = replace(run, options=replace(run.options, address=address))
    with run.locked():
        if moved.options.address != run.options.address:
            run.note(options=run.info["options"] | {"address": moved.options.address})
    return moved


def _cluster_if_needed(run: Run) -> AbstractContextManager[None]:
    """A run with nothing left but its report needs none, and the one that it had may be gone."""
    selected = (run.directory / "evaluation" / "selection.json").exists()
    if run.info["state"] == "finished" and (run.options.no_report or selected):
        return nullcontext()
    return connected(run.options.address)


@contextmanager
def full_disk_explained(run: Run) -> Iterator[None]:
    """Tells a disk that is full, or a quota or a limit that is reached, as SearchFailed with the way out; and so a
    storage without which nothing goes on."""
    try:
        yield
    except remote.StorageFailed as error:
        raise SearchFailed(f"{error}; `tuner resume {run.directory}` goes on when it can be reached") from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        again = f"`tuner resume {run.directory}` goes on" if run.info["sessions"] else "start the search again"
        raise SearchFailed(f"the disk is full ({error}); make room, then {again}") from error


def repeat(run: Run, mirror: Mirror, console: Console | None = None, seeds: int | None = None) -> bool:
    """Trains the best configurations of a search again, where the space or `seeds`, trainings of each at most, ask for
    it; goes on with what was begun. Needs a cluster and the lock. Whether nothing is left of it: else it was stopped.

    ValueError while trials of the search are left to run.
    """
    _check_finished(run)
    asked = run.repeats(seeds)
    if asked is None:
        return True
    begun = bool(run.info.get("repeats"))
    study = RepeatStudy(run.space, run.info["id"], run.study, asked, run.records, begun)
    if study.selection() is None or study.is_over():
        if begun:
            run.note(repeats=fields_of(asked) | {"state": "finished"})
        return True
    resources = _resources(run)
    _, task, needs = _ready(run, resources, console)
    trackers = _trackers(run, console)
    seen = replace(watched(run), stage="repeats of", records_file=study.records_file)
    trackers.search_started(replace(seen, trials_asked=study.trainings, hours=asked.hours))
    run.note(repeats=fields_of(asked) | {"state": "running"})
    mirror.changed()
    state = "failed"
    try:
        with storage.explained(run.study):
            state = run_trials(
                study,
                task,
                run.directory,
                study.space.budget,
                resources,
                trackers,
                mirror,
                needs,
                profile=run.options.profile,
            )
    except KeyboardInterrupt:  # a second Ctrl-C
        state = "stopped"
        raise
    finally:
        trackers.search_ended(state)
        with suppress(OSError):
            run.note(repeats=fields_of(asked) | {"state": state})
    if mirror.lost:
        raise SearchFailed(mirror.lost)
    return state == "finished"


def check_open_test(run: Run, open_test: bool, seeds: int | None) -> None:
    """ValueError where thresholds would be chosen on test for a winner that repeats may yet change."""
    if not open_test:
        return
    if seeds is not None:
        raise ValueError(
            f"--seeds must come before the test split is opened, found {seeds} with --open-test; run `tuner finals "
            f"{run.directory} --seeds {seeds}` first"
        )
    if run.repeats() and not (run.directory / "evaluation" / "selection.json").exists():
        raise ValueError(
            f"--open-test needs a winner that is chosen, and {run.directory} has repeats to come; run `tuner finals "
            f"{run.directory}` first"
        )


def _check_finished(run: Run) -> None:
    """ValueError while trials are left to run: the winner of a part of a search would be frozen with its look at the
    test split."""
    if (state := run.info["state"]) != "finished":
        state = "stopped" if state == "running" else state  # it was killed, for we hold the lock
        raise ValueError(
            f"finals need a search that is finished, found one that is {state}; run `tuner resume {run.directory}`"
        )


def evaluate(run: Run, open_test: bool = False) -> None:
    """Evaluates winner and baseline; needs a cluster and the lock. ValueError while trials are left to run, or if a
    file is not what it was."""
    _check_finished(run)
    resources = _resources(run)
    found = run.splits()
    dealt = []
    if run.space.cross_validation:  # any of the pool may be in the winner's fold
        dealt = model.folds.deal(model.folds.pool(found), run.space.cross_validation, run.space.seed)
    judged = (found.train if dealt else []) + found.validation + found.test
    run.verify(judged)  # before the opening of the test split is logged
    nodes.check(_needs(run), judged, resources)
    trials = mirror.trials_of(run)
    metric = run.space.objective.metric
    selected = run.selection()
    if selected is not None and not selected.is_repeated:
        selected = None
    finals.evaluate(run.directory, trials, found, metric, resources, open_test, run.source.read, dealt, selected)


def _search(run: Run, console: Console | None, mirror: Mirror) -> str:
    """Runs the trials that are left; how it ended: finished or stopped."""
    space, options, info = run.space, run.options, run.info
    resources = _resources(run)
    if problem := batch_problem(space.baseline_config(0).batch_size, int(resources.gpus_per_trial)):
        raise ValueError(problem)
    found, task, needs = _ready(run, resources, console)
    if not info["sessions"]:
        resources = _measured(run, found, resources, console)
    sessions = _closed(run, info["sessions"])
    study = SearchStudy(space, info["id"], run.study, begun=bool(sessions))
    if options.warm_start:
        _warm_start(study, options.warm_start, console)
    trackers = _trackers(run, console)
    trackers.search_started(watched(run))
    session = {"started": time.time(), "ended": None}
    run.note(state="running", sessions=[*sessions, session])
    mirror.begin()
    state = "failed"
    went_well = False
    try:
        state = run_trials(
            study, task, run.directory, space.budget, resources, trackers, mirror, needs, profile=options.profile
        )
        went_well = True
    except KeyboardInterrupt:  # a second Ctrl-C
        state = "stopped"
        raise
    finally:
        trackers.search_ended(state)
        # What ended a search says more than that its end cannot be noted either.
        with nullcontext() if went_well else suppress(OSError):
            run.note(state=state, sessions=[*sessions, session | {"ended": time.time()}])
        if went_well or state == "failed":  # a second Ctrl-C waits for nothing
            importance.write(run.directory, space)
    if mirror.lost:
        raise SearchFailed(mirror.lost)
    return state


def _ready(run: Run, resources: Resources, console: Console | None) -> tuple[Splits, Task, nodes.Needs]:
    """What trials are given, once the data are what they were and the nodes are ready for them. ValueError if not."""
    found = run.splits()
    run.verify(found.train + found.validation, console)
    task, needs = folds.task_of(run.space, found, run.source.read), _needs(run)
    nodes.check(needs, found.train + found.validation, resources)
    nodes.prepare(needs, task.decoded, resources, console)
    return found, task, needs


def _trackers(run: Run, console: Console | None) -> tracking.Trackers:
    options = run.options
    return tracking.build(options.wandb, options.tensorboard, console is not None, console, options.wandb_wait)


def _needs(run: Run) -> nodes.Needs:
    """What a node must have, where checkpoints lie among it."""
    place = mirror.trials_of(run).place.address
    return nodes.needs(run.source, run.space.data.height, run.space.data.width, place, run.options.address)


def _resources(run: Run) -> Resources:
    """What a trial holds: as was asked for, else as was chosen when the run began."""
    asked = {name: getattr(run.options, name) for name in ("cpus_per_trial", "gpus_per_trial")}
    chosen: dict[str, Any] = run.info.get("resources") or {}
    cpus, gpus = (chosen.get(name) if value is None else value for name, value in asked.items())
    return default_resources(cpus, gpus, run.options.concurrent, run.options.cpu_trials)


def _measured(run: Run, found: Splits, resources: Resources, console: Console | None) -> Resources:
    """What a trial holds, by the memory that the largest took on a worker if its part of a GPU is ours to choose.

    ValueError if a limit of time or money clearly cannot hold the baseline, by two of its steps there.
    """
    space, budget, options = run.space, run.space.budget, run.options
    chooses = options.gpus_per_trial is None and resources.gpus_per_trial > 0 and "resources" not in run.info
    is_limited = budget.hours is not None or budget.device_hours is not None or budget.money is not None
    if not (chooses or is_limited):
        return resources
    share = resources.cpus_per_trial, resources.gpus_per_trial
    what = "measuring what a trial takes of a GPU" if chooses else "timing the baseline: does the budget hold it?"
    with console.status(what) if console else nullcontext():
        function = plan.measure if chooses else plan.baseline_seconds
        measured = run_on_worker(function, resources, space, found._replace(test=[]), *share, run.source.read)
    if chooses:
        resources = sharing_gpus(
            measured["trial_bytes"],
            measured["gpu_bytes"],
            options.cpus_per_trial,
            plan.at_once(options.concurrent, plan.trials_of(space)),
            options.concurrent,
            options.cpu_trials,
        )
    seconds = measured["baseline_seconds"] if chooses else measured
    plan.check_budget(budget, seconds, resources.devices, _CLEARLY_TOO_LONG)
    if chooses:
        why = plan.chosen(measured, resources.gpus_per_trial, resources.cpus_per_trial)
        held = {"cpus_per_trial": resources.cpus_per_trial, "gpus_per_trial": resources.gpus_per_trial}
        run.note(resources=held | {"why": why})
        if console:
            console.print(why, markup=False, highlight=False, soft_wrap=True)
    return resources


def _warm(other: Run, space: Space) -> str:
    """The folder of a run to start from, wherever a resume is called from. ValueError if it searched for another
    figure."""
    if (theirs := other.space.objective.metric) != space.objective.metric:
        raise ValueError(
            f"a warm start needs a run with the same objective, {space.objective.metric}, found {theirs} in "
            f"{other.directory}; leave --warm-start out"
        )
    return str(other.directory.resolve())


def _warm_start(study: SearchStudy, other: str, console: Console | None) -> None:
    taken, dropped = study.warm_started() or study.warm_start(load_run(other).records)
    if console is not None:
        lacking = ", or lack a cost or a figure that it asks for" if study.space.cost or study.space.constraints else ""
        outside = f", {dropped} lie outside this space{lacking}" if dropped else ""
        console.print(f"warm start: {taken} completed trials of {other}{outside}")


def _closed(run: Run, sessions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Notes when sessions that were killed ended: opening the study changes the time of its journal."""
    last = run.last_written()
    closed = [s if s["ended"] else s | {"ended": max(s["started"], last)} for s in sessions]
    if closed != sessions:
        run.note(state="stopped", sessions=closed)
    return closed


def watched(run: Run) -> tracking.RunInfo:
    """The run as its trackers see it."""
    space = run.space
    info = run.info
    return tracking.RunInfo(
        name=info["name"],  # not the folder's, which may be renamed: what W&B has is filed under the first one
        id=info["id"],
        directory=run.directory,
        space=space.to_dict(),
        baseline=space.baseline_config(space.seed).to_dict(),
        trials_asked=space.budget.trials,
        hours=space.budget.hours,
        metric=space.objective.metric,
        mode="max",
        data=run.data,
    )
