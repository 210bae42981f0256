"""What the machinery of a search costs beside its training.

    python -m bench.overhead

1. 16 trials of 2 s on 4 slots: this project's search, and Ray Tune with its default searcher, without and with reuse of
   actors; the ideal is 8 s.
2. 16 trials that report every 0.2 s at once: CPU time of the driver for each result.
3. The study at 100, 1,000 and 10,000 finished trials, in a journal and in SQLite: memory of the process, and time of
   an ask, of an epoch's report, of an end and of opening it again. `--studies` alone leaves 1 and 2 out.

Trials sleep and report; nothing is trained.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from bench.memory import own_mib
from model import checkpoint
from model.config import RunConfig
from model.files import write_json
from tuner import records, search, space_file
from tuner.cluster import Resources, connected
from tuner.sampler import Proposal, SearchStudy
from tuner.space import Space
from tuner.tracking import Trackers
from tuner.trial import nothing_yet


@dataclass(frozen=True)
class SleepingTask:
    """Reports as a trial does, with a checkpoint, and sleeps instead of training."""

    seconds: float

    def run(self, config: RunConfig, _device: torch.device, _resume: Path | None, report: Any) -> None:
        progress = nothing_yet()
        with tempfile.TemporaryDirectory() as scratch:
            for epoch in range(1, config.epochs + 1):
                time.sleep(self.seconds / config.epochs)
                done = epoch == config.epochs
                row = {"epoch": epoch, "value": config.learning_rate, "compared": config.learning_rate}
                progress |= {
                    "epochs": epoch, "history": [*progress["history"], row], "value": config.learning_rate,
                    "best_epoch": 1, "status": "completed" if done else "running",
                }  # fmt: skip
                write_json(Path(scratch) / "progress.json", progress)
                checkpoint.seal(Path(scratch))
                report(progress, Path(scratch))


def space_of(epochs: int, trials: int) -> Space:
    """Two parameters."""
    document = {
        "name": "overhead",
        "data": {"height": 64, "width": 128},
        "train": {"width": 0.1, "epochs": epochs},
        "search": {
            "learning_rate": {"type": "float", "low": 0.001, "high": 2.0, "log": True},
            "delta_cls_loss": {"type": "float", "low": 0.001, "high": 1.0, "log": True},
        },
        "budget": {"trials": trials},
    }
    return space_file.parse(document, "bench")


def ours(epochs: int, trials: int, slots: int, seconds: float) -> tuple[float, float]:
    """Wall seconds and the driver's CPU seconds."""
    space = space_of(epochs, trials)
    with tempfile.TemporaryDirectory() as folder:
        study = SearchStudy(space, "bench0", Path(folder) / "study.journal")
        (Path(folder) / "trials").mkdir()
        resources = Resources(cpus_per_trial=0.1, concurrent=slots)
        began, cpu = time.perf_counter(), time.process_time()
        search.run_trials(study, SleepingTask(seconds), Path(folder), space.budget, resources, Trackers([]))
        return time.perf_counter() - began, time.process_time() - cpu


def rays(trials: int, slots: int, seconds: float, reuse: bool) -> float:
    """Wall seconds of Ray's own way."""

    def sleep(config: dict[str, Any]) -> None:
        time.sleep(seconds)
        tune.report({"value": config["x"]})

    trainable = tune.with_resources(sleep, {"cpu": 0.1})
    options = tune.TuneConfig(num_samples=trials, max_concurrent_trials=slots, reuse_actors=reuse)
    with tempfile.TemporaryDirectory() as folder:
        run = tune.RunConfig(storage_path=folder, verbose=0)
        began = time.perf_counter()
        tune.Tuner(trainable, param_space={"x": tune.uniform(0, 1)}, tune_config=options, run_config=run).fit()
        return time.perf_counter() - began


def ended(proposal: Proposal) -> dict[str, Any]:
    """A record as long as a real one: 50 epochs, four ways of judging."""
    figures = dict.fromkeys(
        ("loss_total", "dice_mean", "iou_mean", "precision", "recall", "f1", "decision_ap"), 0.123456
    )
    history = [{"epoch": n, "value": 0.5, "compared": 0.5} | figures for n in range(1, 51)]
    judged = proposal.config.judgement()._asdict() | {"value": 0.5, "epoch": 1, "thresholds": figures}
    return nothing_yet() | proposal.identity() | {
        "status": "completed", "reason": None,
        "value": proposal.config.learning_rate, "best_epoch": 1, "epochs": 50, "started": 0.0, "ended": 1.0,
        "seconds": 1.0, "device_seconds": 1.0, "history": history, "replays": [judged] * 4,
    }  # fmt: skip


def filled(where: Path | str, trials: int) -> SearchStudy:
    """A study with so many finished trials; drawn at random, which is quick."""
    space = space_of(50, 1_000_000)
    study = SearchStudy(space, "bench0", where)
    model, study._samplers = study._samplers, (study._samplers[1], study._samplers[1])
    for _ in range(trials):
        proposal = study.ask()
        assert proposal is not None
        study.finish(proposal, ended(proposal))
    study._samplers = model
    return study


def study_of(trials: int, place: str) -> None:
    """Prints a row; the study lies in a journal or in sqlite."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "study"
        where = file if place == "journal" else f"sqlite:///{file}"
        study = filled(where, trials)
        asks, reports, ends, writes = [], [], [], []
        lines = records.RecordsFile(folder)
        lines.write(study.records())
        for _ in range(5):
            began = time.perf_counter()
            proposal = study.ask()
            asks.append(time.perf_counter() - began)
            assert proposal is not None
            began = time.perf_counter()
            study.report(proposal.number, 1, 0.5)
            reports.append(time.perf_counter() - began)
            began = time.perf_counter()
            study.finish(proposal, ended(proposal))
            ends.append(time.perf_counter() - began)
            began = time.perf_counter()
            lines.write(study.records())
            writes.append(time.perf_counter() - began)
        began = time.perf_counter()
        SearchStudy(study.space, "bench0", where)
        opening = time.perf_counter() - began
        size = file.stat().st_size / 2**20
    times = " | ".join(f"{1000 * sorted(each)[2]:.1f}" for each in (asks, reports, ends, writes))
    print(f"| {trials:,}, {place} | {times} | {opening:.1f} | {size:.0f} | {own_mib():.0f} |", flush=True)


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000, 10_000], help="of the study")
    parser.add_argument("--studies", action="store_true", help="the study alone")
    options = parser.parse_args()
    if not options.studies:
        searches()
    print(
        "\n| finished trials | ms an ask | ms a report | ms an end | ms records.jsonl | s opening again | study, MiB "
        "| own MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for place in ("journal", "sqlite"):
        for trials in options.trials:
            study_of(trials, place)


def searches() -> None:
    """Prints what a search takes beside its trials."""
    with connected(None):
        print("| 16 trials of 2 s on 4 slots | s | ratio to 8 s |")
        print("| --- | --- | --- |")
        for what, seconds in (
            ("this project", ours(1, 16, 4, 2.0)[0]),
            ("Ray, without reuse", rays(16, 4, 2.0, reuse=False)),
            ("Ray, with reuse", rays(16, 4, 2.0, reuse=True)),
        ):
            print(f"| {what} | {seconds:.1f} | {seconds / 8:.2f} |", flush=True)
        epochs = 50
        wall, cpu = ours(epochs, 16, 16, 0.2 * epochs)
        results = 16 * epochs
        print(
            f"\n16 live trials, {results} results in {wall:.0f} s: {1000 * cpu / results:.1f} ms of driver CPU a result"
        )


if __name__ == "__main__":
    main()
