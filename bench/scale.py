"""How a search's driver bears many trials at once.

    python -m bench.scale                       # both parts
    python -m bench.scale --processes 1 10 50   # real worker processes, as many as this machine carries
    python -m bench.scale --simulated 1 10 100 1000

1. A real search on a real Ray whose trials sleep and report, each in a process of its own: trials an hour against what
   the sleeping alone allows, the driver's share of a core, its memory, and the CPU time of a result.
2. The same session, study, journal and records (tuner/session.py) without Ray, at 1 to 1,000 trials at once, one result
   after another: CPU time of starting a trial, of a result and of an end, with records as long as real ones. So it says
   what our own part of the driver costs where the machine cannot hold the workers.

What follows for a cluster is in docs/scale.md.
"""

from __future__ import annotations

import argparse
import heapq
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from bench.memory import below, command, mib_of, own_mib
from bench.overhead import SleepingTask, ended, space_of
from tuner import search
from tuner import session as sessions
from tuner.cluster import Resources, connected
from tuner.mirror import Mirror
from tuner.sampler import SearchStudy
from tuner.session import Session
from tuner.space import Budget
from tuner.tracking import Tracker, Trackers

EPOCHS = 10
"""of a trial that sleeps"""

EPOCH_SECONDS = 3.0

EPOCHS_OF_RECORDS = 50


class _Watch(Tracker):
    """Notes when all of the first trials had reported, and what the driver had used by then."""

    def __init__(self, trials: int) -> None:
        self.trials, self.seen = trials, set[str]()
        self.ended = 0
        self.steady: tuple[float, float, int] | None = None
        self.results = 0

    def epoch_ended(self, trial: str, *_: Any) -> None:
        self.results += 1
        self.seen.add(trial)
        if self.steady is None and len(self.seen) == self.trials:
            self.steady = time.perf_counter(), time.process_time(), self.results

    def trial_ended(self, record: dict[str, Any]) -> None:
        self.ended += 1


def with_processes(at_once: int) -> None:
    """Prints a row: a search of twice as many trials as run at once, in real worker processes."""
    trials = 2 * at_once
    space = space_of(EPOCHS, trials)
    watch = _Watch(at_once)
    with connected(None), tempfile.TemporaryDirectory() as folder:
        study = SearchStudy(space, "bench0", Path(folder) / "study.journal")
        (Path(folder) / "trials").mkdir()
        resources = Resources(cpus_per_trial=1 / 128, concurrent=at_once)
        task = SleepingTask(EPOCHS * EPOCH_SECONDS)
        began = time.perf_counter()
        search.run_trials(study, task, Path(folder), space.budget, resources, Trackers([watch]))
        now, cpu = time.perf_counter(), time.process_time()
        assert watch.steady is not None
        steady_wall, steady_cpu, steady_results = watch.steady
        workers = [process for process in below(os.getpid()) if command(process).startswith("ray::")]
        shared = mib_of(workers)[1] / max(1, len(workers))
    results = watch.results - steady_results
    wall = now - steady_wall
    ideal = at_once / (EPOCHS * EPOCH_SECONDS) * 3600
    rate = results / EPOCHS / wall * 3600
    print(
        f"| {at_once:,} | {steady_wall - began:.0f} | {rate:,.0f} | {rate / ideal:.2f} | {results / wall:.1f} "
        f"| {(cpu - steady_cpu) / wall:.2f} | {1000 * (cpu - steady_cpu) / results:.1f} "
        f"| {own_mib():.0f} | {shared:.0f} |",
        flush=True,
    )


class _NoRay:
    """What the session asks of the cluster, answered without one."""

    @staticmethod
    def nodes_alive() -> set[str]:
        return {"a node"}

    @staticmethod
    def draining() -> dict[str, float]:
        return {}


def simulated(at_once: int, trials: int) -> None:
    """Prints a row: a session of so many trials, that many at once, each of 50 epochs, without Ray."""
    space = space_of(EPOCHS_OF_RECORDS, trials)
    times: dict[str, list[float]] = {"start": [], "result": [], "end": []}

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        began = time.process_time()
        found = function(*arguments)
        times[name].append(time.process_time() - began)
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sessions, "cluster", _NoRay),
    ):
        study = SearchStudy(space, "bench0", Path(folder) / "study.journal")
        mirror = Mirror(Path(folder))
        session = Session(
            study, mirror.trials, Budget(trials=trials), Resources(concurrent=at_once), Trackers(), mirror
        )
        events: list[tuple[float, int, int]] = []
        whole: dict[int, dict[str, Any]] = {}
        began, number, now = time.perf_counter(), 0, 0.0
        while True:
            while len(session.live) < at_once:
                found = timed("start", session.next, str(number))
                if not isinstance(found, dict):
                    break
                session.began(str(number), "a node")
                whole[number] = ended(session.live[str(number)])
                heapq.heappush(events, (now + 1 + number % 7 / 10, number, 1))  # epochs of different lengths
                number += 1
            if not events:
                break
            now, trial, epoch = heapq.heappop(events)
            done = epoch == EPOCHS_OF_RECORDS
            progress = whole[trial] | {
                "history": whole[trial]["history"][:epoch], "epochs": epoch,
                "status": "completed" if done else "running",
            }  # fmt: skip
            goes_on = timed("result", session.reported, str(trial), progress, "a node", {}, {})
            if done or not goes_on:
                timed("end", session.ended, str(trial), False)
                del whole[trial]
            else:
                heapq.heappush(events, (now + 1 + trial % 7 / 10, trial, epoch + 1))
        session.close()
        wall = time.perf_counter() - began
    cells = " | ".join(f"{1000 * sum(each) / len(each):.2f}" for each in times.values())
    last = " | ".join(f"{1000 * sum(each[-100:]) / len(each[-100:]):.2f}" for each in times.values())
    print(
        f"| {at_once:,} | {trials:,} | {len(times['result']):,} | {cells} | {last} | {own_mib():.0f} | {wall:.0f} |",
        flush=True,
    )


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 10, 50, 100], help="trials at once, with Ray")
    parser.add_argument("--simulated", type=int, nargs="*", default=[1, 10, 100, 1000], help="trials at once, without")
    options = parser.parse_args()
    if options.processes:
        print(
            f"{EPOCHS} epochs of {EPOCH_SECONDS:g} s a trial, twice as many trials as run at once; from the moment at "
            "which all of the first have reported\n\n"
            "| trials at once | s until all run | trials an hour | of what sleeping allows | results a second "
            "| cores of the driver | ms of its CPU a result | its own MiB | MiB a worker |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for at_once in options.processes:
        with_processes(at_once)
    if options.simulated:
        print(
            "\n| trials at once | trials | results | ms a start | ms a result | ms an end "
            "| last 100: ms a start | ms a result | ms an end | own MiB | s |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for at_once in options.simulated:
        simulated(at_once, max(100, 2 * at_once))


if __name__ == "__main__":
    main()
