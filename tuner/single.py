"""One trial outside any search, in this process: what `tuner trial` does, by hand or for a W&B agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.console import Console

from model.config import DEFAULTS
from tuner import collection, folds, records, tracing, tracking
from tuner.options import Options
from tuner.point import Point, parse
from tuner.records import Proposal, Status
from tuner.run import Run
from tuner.shares import cores_each
from tuner.space import Space
from tuner.space_file import load as load_space
from tuner.tracking import RunInfo, Trackers
from tuner.tracking.lines import LinesTracker
from tuner.tracking.progress import number as shown
from tuner.trial import (
    Task,
    batch_problem,
    failure,
    has_new_pictures,
    nothing_yet,
    previews,
    run_on,
    take_device,
    weights_folder,
)
from tuner.use import Meter


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    record: dict[str, Any]
    metric: str
    folder: Path
    """of the trial"""

    @property
    def completed(self) -> bool:
        """Neither crashed nor diverged."""
        return bool(self.record["status"] == Status.COMPLETED)

    @property
    def model(self) -> Path | None:
        """The folder with weights, configuration and thresholds of the best epoch."""
        checkpoint, record = _checkpoint(self.folder, self.record["epochs"]), self.record
        return checkpoint / weights_folder(record["best_epoch"], record.get("fold")) if self.completed else None

    def __str__(self) -> str:
        record = self.record
        if not self.completed:
            return f"{record['trial']} {record['status']}: {record['reason']}"
        at = f"at epoch {record['best_epoch']} of {record['epochs']}"
        if "folds" in record:
            at = f"over {record['epochs']} folds; of fold {record['fold']}, epoch {record['best_epoch']}"
        parts = [
            f"{record['trial']} completed: {self.metric} {shown(record['value'])} {at}",
            f"threshold {shown(record['thresholds']['segmentation_probability'])}",
        ]
        if not records.is_feasible(record):
            parts.append(records.beyond(record["violations"]))
        return ", ".join([*parts, f"model in {self.model}"])


def run_trial(
    space: Space | str | Path,
    data: str | Path,
    params: Mapping[str, Any] | Iterable[str],
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    console: Console | None = None,
    seed: int | None = None,
    cpus_per_trial: float | None = None,
    gpus_per_trial: float | None = None,
    wandb: Literal["off", "offline", "online"] | None = None,
    profile: bool = False,
) -> Outcome:
    """Trains and judges one point of a space, and adds its record to the collection RUNS/NAME.

    `params` are values by name, or words KEY=VALUE; one that is left out is as in the baseline. Options as in
    `tuner trial`; `seed` is that of the training, for the splits are the space's. ValueError for anything that cannot
    work; a trial that crashes or diverges is an outcome.
    """
    space = space if isinstance(space, Space) else load_space(space)
    words = [f"{key}={value}" for key, value in params.items()] if isinstance(params, Mapping) else params
    chosen = parse(space, words)
    options = Options(
        seed=seed,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        wandb=wandb or _usual_mode(),
        profile=profile,
    )
    if options.wandb == "online":
        tracking.check_online()
    cpus, gpus = _share(options)
    if problem := batch_problem(int(space.train.get("batch_size", DEFAULTS["batch_size"])), int(gpus)):
        raise ValueError(problem)
    device = take_device(gpus, int(cpus))  # before anything is made
    run = collection.join(space, data, Path(runs), name)
    found = run.splits()
    run.check_files(found.train + found.validation)
    _say(console, chosen)
    task = folds.task_of(run.space, found)
    baseline = run.space.baseline_config(space.seed if seed is None else seed)
    config = run.space.config(chosen.params, baseline.seed)
    with _signals(_interrupt), collection.reserved(run) as (number, folder):
        trial = records.trial_id(run.info["id"], number)
        if options.profile:
            (folder / tracing.FOLDER).mkdir()
            task = task.traced(folder / tracing.FOLDER)
        proposal = Proposal(trial, number, chosen.params, config, config == baseline)
        lines = [LinesTracker(console)] if console else []
        trackers = Trackers([tracking.build(options.wandb, tensorboard=False, terminal=False), *lines])
        trackers.search_started(_watched(run, baseline.to_dict()))
        state = "failed"
        try:
            record = _run(proposal, task, device, (cpus, gpus), run, folder, trackers)
            state = "finished"
        except KeyboardInterrupt:
            state = "stopped"
            raise
        finally:
            trackers.search_ended(state)
    return Outcome(record, run.space.objective.metric, folder)


def _run(
    proposal: Proposal,
    task: Task,
    device: torch.device,
    share: tuple[float, float],
    run: Run,
    folder: Path,
    trackers: Trackers,
) -> dict[str, Any]:
    """Trains to the end and keeps the record. KeyboardInterrupt, with the message that nothing is kept, if Ctrl-C or
    SIGTERM comes before that."""
    record = None
    try:
        started = time.monotonic()
        cpus, gpus = share
        progress = _train(proposal, task, device, gpus, folder, trackers)
        clock = {"started": 0.0, "ended": time.monotonic() - started}
        clock["device_seconds"] = progress["seconds"] * (gpus or cpus)
        with _signals(signal.SIG_IGN):
            if progress["status"] != Status.COMPLETED:
                _remove_checkpoints(folder)
            judged = records.judged(run.space, {**proposal.identity(), **clock, **progress})
            collection.add(run, judged)
            record = judged
            trackers.trial_ended(record)
    except KeyboardInterrupt:
        if record is None:
            _remove_checkpoints(folder)
            raise KeyboardInterrupt(f"no record and no checkpoint of trial {proposal.trial} is kept") from None
    assert record is not None
    return record


def _train(
    proposal: Proposal, task: Task, device: torch.device, gpus: float, folder: Path, trackers: Trackers
) -> dict[str, Any]:
    """The progress at the end, however it came; of a trial that has completed, its checkpoint in the folder."""
    reached = nothing_yet()

    def report(progress: dict[str, Any], checkpoint: Path | None) -> None:
        nonlocal reached
        reached = json.loads(json.dumps(progress))  # it changes on
        if checkpoint is None:
            return
        row = reached["history"][-1]
        pictures = previews(checkpoint) if has_new_pictures(reached) else {}
        trackers.epoch_ended(proposal.trial, row, meter.read(), pictures)
        if reached["status"] == Status.COMPLETED:
            shutil.copytree(checkpoint, _checkpoint(folder, reached["epochs"]))

    trackers.trial_started(proposal.trial, proposal.params, proposal.config.to_dict(), [])
    with Meter(device) as meter:
        try:
            run_on(task, proposal.config, device, gpus, None, report)
        except Exception as error:  # a trial that crashes is a result, with its reason
            return reached | failure(error)
    return reached


def _checkpoint(folder: Path, epochs: int) -> Path:
    return folder / f"checkpoint_{epochs:06d}"


def _remove_checkpoints(folder: Path) -> None:
    """Leaves the folder, whose number stays taken: W&B may have a run of its name."""
    for checkpoint in folder.glob("checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _usual_mode() -> Literal["offline", "online"]:
    """A W&B agent waits for the run that it has asked for."""
    return "online" if os.environ.get("WANDB_SWEEP_ID") else "offline"


def _share(options: Options) -> tuple[float, float]:
    """CPU cores and GPUs: what was asked for, else as in a search a GPU with its share of the cores, or one core: there
    may be other agents here, and threads that wait for each other are slow."""
    cpus, gpus = options.cpus_per_trial, options.gpus_per_trial
    if gpus is None:
        gpus = float(torch.cuda.is_available())
    if cpus is None:
        cpus = cores_each(os.cpu_count() or 1, torch.cuda.device_count(), gpus) if gpus else 1
    return cpus, gpus


def _watched(run: Run, baseline: dict[str, Any]) -> RunInfo:
    sweep = os.environ.get("WANDB_SWEEP_ID") or None
    return RunInfo(
        name=run.name,
        id=run.info["id"],
        directory=run.directory,
        space={},  # of which W&B would be asked to make a sweep
        baseline=baseline,
        trials_asked=None,
        hours=None,
        metric=run.space.objective.metric,
        mode="max",
        data=run.data,
        sweep=sweep,
        shared=True,
        wandb_run=(os.environ.get("WANDB_RUN_ID") or None) if sweep else None,
    )


def _say(console: Console | None, chosen: Point) -> None:
    """What became of the words, where it is not just what they say."""
    lines = {
        "not set, so as in the baseline": [f"{name}={chosen.params[name]}" for name in chosen.from_baseline],
        "left out, for their conditions are not met": chosen.left_out,
    }
    for what, names in lines.items():
        if console is not None and names:
            console.print(f"{what}: {', '.join(names)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """What Ctrl-C and SIGTERM do meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
