"""What tracking costs: the runs of many trials in one logger process, and a search that is watched.

    python -m bench.tracking [--runs 64] [--peers 8] [--epochs 10] [--repeats 3] [--rounds 5] [--search-epochs 12]

1. W&B, offline: so many trials are open at once and report epoch after epoch, each with figures and four previews. This
   project's logger process, and Ray's own WandbLoggerCallback, which gives each trial a process; the callback is
   driven as Ray Tune drives it, without trials beside it. Of Ray's as many runs as --peers says, for each takes three
   processes. All of it is read back: a row or a picture that is lost ends the bench.
2. A search that is watched by nobody, by W&B offline, by TensorBoard, and by nobody once more, which shows the noise.
   In turn, --rounds times; the ratio is to the first of the same round. Once with real training on all cores, once with
   trials that sleep and report every 0.2 s, each epoch the best, so that each has its previews.

Nothing goes to a network.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image

from bench.memory import below, command, cpu_seconds, mib_of
from bench.overhead import SleepingTask
from model import checkpoint, layouts, splits, synthetic
from model.config import RunConfig
from tuner import search, space_file
from tuner.cluster import Resources, connected
from tuner.sampler import SearchStudy
from tuner.space import Space
from tuner.tracking import RunInfo, Trackers, WandbTracker, build
from tuner.tracking.wandb_files import written
from tuner.trial import TrialTask, nothing_yet, preview

FIGURES = (
    "value", "compared", "loss_total", "loss_segmentation", "loss_decision", "learning_rate", "seconds", "dice_mean",
    "dice_positive_mean", "iou_mean", "precision", "recall", "f1", "two_pixel_f1", "decision_ap", "decision_f1",
    "threshold",
)  # fmt: skip
USE = {"cpu_percent": 98.5, "memory_mib": 512.0}
DEADLINE_S = 300.0


def pictures() -> dict[str, bytes]:
    """Four previews, as large as they come."""
    found = {}
    for n in range(4):
        image, mask = synthetic.scene(n, True, 160, 160)
        logits = cv2.GaussianBlur(8.0 * mask - 4.0, (0, 0), 2)
        stream = io.BytesIO()
        Image.fromarray(preview(image, mask, logits, (logits > 0).astype(np.uint8))).save(stream, "png")
        found[str(n)] = stream.getvalue()
    return found


def row(epoch: int, trial: int) -> dict[str, float | None]:
    """A row of a history."""
    return {"epoch": epoch} | {name: (trial + 1) / (epoch + n + 1) for n, name in enumerate(FIGURES)}


@dataclass
class Logging:
    """What it took to log runs."""

    opening: float = 0.0
    """seconds until all runs are open"""
    epochs: float = 0.0
    """seconds until all epochs of all runs are logged"""
    ending: float = 0.0
    driver: float = 0.0
    """seconds that whoever reports has waited for all of it"""
    mib: tuple[float, float] = (0.0, 0.0)
    """the most, see `mib_of`"""
    cpu: float = 0.0
    """seconds of the processes that log, until the runs are ended"""
    began: float = field(default_factory=time.perf_counter)

    def call(self, function: Callable[..., Any], *values: Any) -> None:
        began = time.perf_counter()
        function(*values)
        self.driver += time.perf_counter() - began

    def passed(self) -> float:
        """Seconds since the last time."""
        now = time.perf_counter()
        passed, self.began = now - self.began, now
        return passed

    def look(self, processes: list[int]) -> None:
        """Measures the processes that log; the time does not count."""
        self.mib = max(self.mib, mib_of(processes))
        self.cpu = cpu_seconds(processes)
        self.passed()


def wait_for_runs(folder: Path, count: int) -> list[Path]:
    """The folders of so many runs, once they are all there."""
    return wait_for(lambda: found if len(found := [f.parent for f in folder.rglob("run-*.wandb")]) == count else None)


def wait_for_pictures(runs: list[Path], count: int) -> None:
    """Until each run has so many: the logging process writes them just before an epoch's row."""
    late = list(runs)

    def are_there() -> bool:
        while late and len(list((late[-1] / "files" / "media" / "images" / "preview").glob("*"))) >= count:
            late.pop()
        return not late

    wait_for(are_there)


def wait_for(condition: Callable[[], Any]) -> Any:
    """Its result, once it has one."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"what is logged must be there within {DEADLINE_S:g} s")
        time.sleep(0.02)
    return found


def check(runs: list[Path], epochs: int) -> None:
    """RuntimeError if a run has lost something."""
    for run in runs:
        found = written(next(run.glob("run-*.wandb")))
        if found != (epochs, 0):
            raise RuntimeError(f"a run must hold {epochs} epochs and end well, found {found} in {run}")


def ours(count: int, epochs: int, previews: dict[str, bytes]) -> Logging:
    """The runs of this project's logger process."""
    space = space_of(epochs, count)
    config = space.baseline_config(0).to_dict()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracker = WandbTracker("offline", wait_s=DEADLINE_S)
        took = Logging()
        took.call(tracker.search_started, info(space, folder))
        names = [f"bench0-{n:04d}" for n in range(count)]
        for trial in names:
            took.call(tracker.trial_started, trial, {"learning_rate": 0.1}, config, [])
        runs = wait_for_runs(folder, count)
        took.opening = took.passed()
        assert tracker.pid is not None
        took.look([tracker.pid, *below(tracker.pid)])
        for epoch in range(1, epochs + 1):
            for n, trial in enumerate(names):
                took.call(tracker.epoch_ended, trial, row(epoch, n), USE, previews)
            wait_for_pictures(runs, epoch * len(previews))
            took.epochs += took.passed()
            took.look([tracker.pid, *below(tracker.pid)])
        for trial in names:
            record = nothing_yet() | {
                "trial": trial, "params": {}, "config": config, "baseline": False, "replayed_from": None,
                "status": "completed", "value": 0.5, "best_epoch": 1, "epochs": epochs, "device_seconds": 1.0,
            }  # fmt: skip
            took.call(tracker.trial_ended, record)
        tracker.search_ended("finished")
        took.ending = took.passed()
        check(runs, epochs)
    return took


@dataclass(frozen=True)
class PeerTrial:
    """What Ray's callback asks of a trial of Ray Tune."""

    trial_id: str
    local_path: str
    experiment_dir_name: str = "bench"

    @property
    def config(self) -> dict[str, Any]:
        return {"learning_rate": 0.1}

    def __str__(self) -> str:
        return self.trial_id


def rays(count: int, epochs: int, previews: dict[str, bytes]) -> Logging:
    """The runs of Ray's callback; pictures are arrays, as a trial of Ray's reports them."""
    from ray.air.integrations.wandb import WandbLoggerCallback

    arrays = {f"preview/{name}": np.asarray(Image.open(io.BytesIO(png))) for name, png in previews.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trials = [PeerTrial(f"bench0-{n:04d}", str(folder / str(n))) for n in range(count)]
        for trial in trials:
            Path(trial.local_path).mkdir()
        callback = WandbLoggerCallback(project="bench")
        took = Logging()
        took.call(callback.setup)
        for trial in trials:
            took.call(callback.on_trial_start, 0, trials, trial)
        runs = wait_for_runs(folder, count)
        took.opening = took.passed()
        took.look(peers())
        for epoch in range(1, epochs + 1):
            for n, trial in enumerate(trials):
                result = row(epoch, n) | {f"use/{name}": value for name, value in USE.items()} | arrays
                took.call(callback.on_trial_result, epoch, trials, trial, result | {"training_iteration": epoch})
            wait_for_pictures(runs, epoch * len(previews))
            took.epochs += took.passed()
            took.look(peers())
        for trial in trials:
            took.call(callback.on_trial_complete, epochs, trials, trial)
        callback.on_experiment_end(trials)
        took.ending = took.passed()
        check(runs, epochs)
    return took


def peers() -> list[int]:
    """The processes of Ray's callback: for each trial a logger, its wandb-core and a queue."""
    actors = ("ray::_WandbLoggingActor", "ray::_QueueActor")
    roots = [process for process in below(os.getpid()) if command(process).startswith(actors)]
    return [*roots, *(process for root in roots for process in below(root))]


def space_of(epochs: int, trials: int) -> Space:
    """Nothing that changes how long a training takes."""
    document = {
        "name": "tracking",
        "data": {"height": 64, "width": 128, "validation_share": 0.25, "test_share": 0.25},
        "train": {"width": 0.1, "epochs": epochs, "precision": "float32"},
        "search": {"learning_rate": {"type": "float", "low": 0.05, "high": 0.5, "log": True}},
        "objective": {"metric": "dice_positive_mean"},
        "scheduler": {"name": "none"},
        "budget": {"trials": trials},
    }
    return space_file.parse(document, "bench")


def info(space: Space, folder: Path) -> RunInfo:
    """A search as its trackers see it."""
    trials, metric = space.budget.trials, space.objective.metric
    return RunInfo("bench", "bench0", folder, space.to_dict(), None, trials, None, metric, "max")


@dataclass(frozen=True)
class DrawingTask(SleepingTask):
    """Sleeps and reports; each epoch is the best, and has all figures and previews."""

    previews: dict[str, bytes] = field(default_factory=dict)

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        def drawn(progress: dict[str, Any], folder: Path) -> None:
            epoch = progress["epochs"]
            progress["best_epoch"] = epoch
            progress["history"][-1] |= row(epoch, 0)
            (folder / "previews").mkdir(exist_ok=True)
            for name, png in self.previews.items():
                (folder / "previews" / f"{name}.png").write_bytes(png)
            checkpoint.seal(folder)
            report(progress, folder)

        super().run(config, device, resume, drawn)


class Timed(Trackers):
    """Counts what the driver waits for its trackers."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__([trackers])
        self.seconds: dict[str, list[float]] = {}
        """by event"""

    def _tell(self, event: str, *values: Any) -> None:
        began = time.perf_counter()
        super()._tell(event, *values)
        self.seconds.setdefault(event, []).append(time.perf_counter() - began)


@dataclass(frozen=True)
class Watched:
    """What a search took, in seconds."""

    wall: float
    epoch: float
    """that the driver waits for its trackers at the report of an epoch, the mean"""
    end: float
    """that the end of the search waits for them"""
    driver_cpu: float
    logger_cpu: float


def watched(
    task: Any, space: Space, resources: Resources, wandb: Literal["off", "offline"], tensorboard: bool
) -> Watched:
    """A search from its first to its last event."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trials").mkdir()
        study = SearchStudy(space, "bench0", folder / "study.journal")
        trackers = Timed(build(wandb, tensorboard, terminal=False, wait_s=DEADLINE_S))
        cpu, logger_cpu = time.process_time(), children_cpu()
        began = time.perf_counter()
        trackers.search_started(info(space, folder))
        state = search.run_trials(study, task, folder, space.budget, resources, trackers)
        trackers.search_ended(state)
        wall = time.perf_counter() - began
        logged = [file.parent for file in folder.rglob("run-*.wandb")]
        check(logged, space.train["epochs"])
        epochs = trackers.seconds["epoch_ended"]
        assert len(epochs) == space.train["epochs"] * (space.budget.trials or 0)
        return Watched(
            wall, statistics.mean(epochs), trackers.seconds["search_ended"][0], time.process_time() - cpu,
            children_cpu() - logger_cpu,
        )  # fmt: skip


def children_cpu() -> float:
    """Of children that have ended: among a search's only the logger process and its own do."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def offline() -> Iterator[None]:
    """No network, no account and no word from wandb, here and in what Ray starts."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    with connected(None):
        yield


def compare_loggers(count: int, peer_count: int, epochs: int, repeats: int) -> None:
    """Prints the first table."""
    previews = pictures()
    size = sum(map(len, previews.values())) / 1024
    print(f"{epochs} epochs a run, each with {len(FIGURES)} figures and {len(previews)} previews of {size:.0f} KiB\n")
    print(
        "| W&B runs at once | s to open | ms a logged epoch | s to end | ms an event, driver | CPU ms an epoch "
        "| RSS, MiB | shared counted once, MiB | the same a run |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows: list[tuple[str, Callable[..., Logging], int]] = [
        ("this project, one logger process", ours, count),
        ("this project, one logger process", ours, peer_count),
        ("Ray's callback, a process a trial", rays, peer_count),
    ]
    found: list[list[Logging]] = [[] for _ in rows]
    for _ in range(repeats):
        for logged, (_, function, runs) in zip(found, rows, strict=True):
            logged.append(function(runs, epochs, previews))
    for logged, (what, _, runs) in zip(found, rows, strict=True):
        reports, events = runs * epochs, runs * (epochs + 2)
        cells = [
            spread([one.opening for one in logged]),
            spread([1000 * one.epochs / reports for one in logged]),
            spread([one.ending for one in logged], 2),
            spread([1000 * one.driver / events for one in logged], 2),
            spread([1000 * one.cpu / reports for one in logged]),
            *(spread([one.mib[n] for one in logged], 0) for n in (0, 1)),
            spread([one.mib[1] / runs for one in logged]),
        ]
        print(f"| {runs}, {what} | {' | '.join(cells)} |", flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Median (lowest to highest)."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


WAYS: tuple[tuple[str, Literal["off", "offline"], bool], ...] = (
    ("nobody", "off", False),
    ("W&B, offline", "offline", False),
    ("TensorBoard", "off", True),
    ("nobody, again", "off", False),
)


def compare_searches(what: str, task: Any, space: Space, resources: Resources, rounds: int) -> None:
    """Prints a table of searches."""
    watched(task, space, resources, "off", False)  # what is read for the first time
    found: dict[str, list[Watched]] = {name: [] for name, _, _ in WAYS}
    for n in range(rounds):
        for name, wandb, tensorboard in WAYS[n % len(WAYS) :] + WAYS[: n % len(WAYS)]:
            found[name].append(watched(task, space, resources, wandb, tensorboard))
    print(
        f"\n| {what}; watched by | s | ratio to nobody | ms an epoch, driver | s at its end | driver CPU, s "
        "| logger CPU, s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, took in found.items():
        cells = [
            spread([one.wall for one in took]),
            spread([one.wall / alone.wall for one, alone in zip(took, found["nobody"], strict=True)], 3),
            spread([1000 * one.epoch for one in took], 2),
            spread([one.end for one in took], 2),
            spread([one.driver_cpu for one in took]),
            spread([one.logger_cpu for one in took]),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def trained(place: Path, space: Space) -> TrialTask:
    """Real training on a small procedural set."""
    data = place / "set"
    synthetic.write(data, count=24, height=space.data.height, width=space.data.width)
    found = splits.assign(layouts.read(data), data, space.data.validation_share, space.data.test_share, 0)
    return TrialTask.of(space, found.train, found.validation)


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64, help="of this project at once")
    parser.add_argument("--peers", type=int, default=8, help="runs of Ray's callback at once")
    parser.add_argument("--epochs", type=int, default=10, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="of the first part")
    parser.add_argument("--rounds", type=int, default=5, help="of the second part")
    parser.add_argument("--search-epochs", type=int, default=12, help="of each trial of the second part")
    parser.add_argument("--sleeping", action="store_true", help="trials that sleep alone")
    options = parser.parse_args()
    with offline(), tempfile.TemporaryDirectory() as place:
        if options.repeats and not options.sleeping:
            compare_loggers(options.runs, options.peers, options.epochs, options.repeats)
        if options.rounds:
            epochs = options.search_epochs
            space = space_of(epochs, trials=8)
            if not options.sleeping:
                os.environ["SEGDEC_TUNER_CACHE"] = str(Path(place) / "cache")
                real = trained(Path(place), space)
                what = f"8 trainings of {epochs} epochs on {os.cpu_count()} cores"
                compare_searches(what, real, space, Resources(), options.rounds)
            sleeping, resources = DrawingTask(0.2 * epochs, pictures()), Resources(cpus_per_trial=0.1, concurrent=8)
            compare_searches(f"8 trials at once, {epochs} epochs of 0.2 s", sleeping, space, resources, options.rounds)


if __name__ == "__main__":
    main()
