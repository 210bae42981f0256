"""A search on hosts that join, die, are cut off and are taken away with notice: is anything lost or done twice?

    python -m bench.chaos [--seconds 300] [--seed 0] [--hosts 3] [--storage s3://bucket/folder | --moto]

Real hosts (tests/hosts.py; needs root on Linux): each with its own network and processes, so that what happens to one
happens as to a machine. For so many seconds, every few of them one of four things is drawn: a host dies, is cut off for
longer than its cluster waits, is cut off for a moment, or gets a notice and dies when it has run out. A new host joins
for each that goes. Trials are scripted, and note every epoch that they train. When the time is over, hosts stay, and
the search runs to its end: every trial must be completed or stopped early, and no epoch may be trained again that a
checkpoint had been made of, which is what a trial had noted before its death.

With `--storage` checkpoints and the mirror of the run lie there; with `--moto` at an S3 server that the script starts,
and that cannot be reached for 30 s in the middle. What a trial reports meanwhile has no checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.config import RunConfig
from model.files import write_json
from tests import hosts, s3
from tuner import checkpoints, records, search
from tuner.cluster import Resources
from tuner.mirror import Mirror, StorageMirror
from tuner.remote import Folder
from tuner.sampler import SearchStudy
from tuner.space import Space
from tuner.space_file import parse
from tuner.tracking import Tracker, Trackers
from tuner.trial import nothing_yet

_EPOCHS = 6
_OUTAGE_S = 30.0


@dataclass(frozen=True)
class Training:
    """Epochs of some seconds, each noted when it begins and when its checkpoint is where it stays."""

    folder: Path
    seconds: float

    def run(self, config: RunConfig, _device: torch.device, resume: Path | None, report: Any) -> None:
        progress = checkpoint.load_progress(resume) if resume else nothing_yet()
        pace = random.Random(config.learning_rate)
        for epoch in range(progress["epochs"] + 1, config.epochs + 1):
            self._note("begins", config, epoch)
            time.sleep(self.seconds * pace.uniform(0.5, 1.5))
            value = min(1.0, config.learning_rate) * epoch / config.epochs
            progress |= {
                "epochs": epoch,
                "history": [*progress["history"], {"epoch": epoch, "value": value, "compared": value}],
                "value": value,
                "best_epoch": epoch,
                "seconds": progress["seconds"] + self.seconds,
                "status": "completed" if epoch == config.epochs else "running",
            }
            with tempfile.TemporaryDirectory(prefix="segdec-chaos-trial-") as scratch:
                write_json(Path(scratch) / "progress.json", progress)
                checkpoint.seal(Path(scratch))
                report(progress, Path(scratch))
            self._note("goes on after", config, epoch)  # so its report was heard

    def _note(self, what: str, config: RunConfig, epoch: int) -> None:
        with (self.folder / "epochs.txt").open("a") as log:
            log.write(f"{what}\t{config.learning_rate!r}\t{epoch}\t{socket.gethostname()}\t{time.time()}\n")


class Starts(Tracker):
    """Counts how often trials were taken from their workers by what happened to a host."""

    def __init__(self) -> None:
        self.again = 0
        self._live: set[str] = set()

    def trial_started(self, trial: str, *_: Any) -> None:
        self.again += trial in self._live
        self._live.add(trial)

    def trial_held(self, record: dict[str, Any]) -> None:
        self._live.discard(record["trial"])


class Chaos:
    """What happens to the hosts, one thing after another, until the time is over."""

    def __init__(self, made: hosts.Hosts, count: int, seconds: float, seed: int) -> None:
        self.happened: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._made, self._seconds = made, seconds
        self._draw = random.Random(seed)
        self._live = [made.add(f"host{n}") for n in range(count)]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            over = time.monotonic() + self._seconds
            while time.monotonic() < over:
                time.sleep(self._draw.uniform(1, 6))
                what = self._draw.choice(["killed", "cut off and back", "cut off for 2 s", "drained"])
                host = self._live.pop(self._draw.randrange(len(self._live)))
                self._do(what, host)
                self.happened[what] += 1
        except BaseException as error:
            self.failure = error

    def _do(self, what: str, host: hosts.Host) -> None:
        print(f"{host.name} is {what}", flush=True)
        if what == "cut off for 2 s":
            host.cut_off()
            time.sleep(2)
            host.join_again()
            self._live.append(host)
            return
        if what == "killed":
            host.kill()
        elif what == "drained":
            notice = self._draw.randrange(1, 10)
            host.drain(notice)
            time.sleep(notice)
            host.kill()
        else:
            host.cut_off()
        self.happened["joined"] += 1
        self._live.append(self._made.add(f"host{len(self._made.hosts)}"))
        if what == "cut off and back":  # its cluster has given it up meanwhile, and so do its own processes
            time.sleep(8)
            host.join_again()


def space(trials: int) -> Space:
    """Points that are worth as much as their learning rate, with rungs."""
    return parse(
        {
            "name": "chaos",
            "data": {"height": 64, "width": 128},
            "train": {"epochs": _EPOCHS, "width": 0.1},
            "search": {"learning_rate": {"type": "float", "low": 0.001, "high": 1.0}},
            "objective": {"metric": "dice_mean"},
            "sampler": "random",
            "scheduler": {"name": "asha", "min_epochs": 2, "reduction": 2},
            "budget": {"trials": trials},
        }
    )


def main() -> int:
    """Prints what was done and what came of it; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of chaos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=3, help="at a time")
    parser.add_argument("--epoch", type=float, default=2.0, help="seconds of an epoch, on average")
    storage = parser.add_mutually_exclusive_group()
    storage.add_argument("--storage", help="an address, as that of tuner search")
    storage.add_argument("--moto", action="store_true", help="an S3 server of this script's own, with an outage")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's server names every request
    with tempfile.TemporaryDirectory(prefix="segdec-chaos-") as place:
        return one_search(
            Path(place), options.seconds, options.seed, options.hosts, options.epoch, options.storage, options.moto
        )


def one_search(
    place: Path, seconds: float, seed: int, count: int, epoch: float, storage: str | None = None, moto: bool = False
) -> int:
    """Runs the search, with as many trials as keep the hosts at work for so long."""
    searched = space(trials=max(4, round(seconds * count / (epoch * _EPOCHS) * 0.6)))
    (place / "trials").mkdir()
    study = SearchStudy(searched, "chaos", place / "study.journal")
    starts = Starts()
    outage: list[float] = []
    with ExitStack() as stack:
        made = stack.enter_context(hosts.cluster())
        if moto:
            wire = stack.enter_context(s3.serving(f"{made.network}.1"))
            storage = "s3://bucket/chaos"
            stack.callback(_fails_later(wire, seconds / 2, outage).cancel)
        mirror = StorageMirror(place, Folder(storage) / f"run-{os.getpid()}", "chaos") if storage else Mirror(place)
        if isinstance(mirror, StorageMirror):
            mirror.start()
            mirror.begin()
        chaos = Chaos(made, count, seconds, seed)
        began = time.monotonic()
        chaos.start()
        state = search.run_trials(
            study,
            Training(place, epoch),  # type: ignore[arg-type]
            place,
            searched.budget,
            Resources(concurrent=count),
            Trackers([starts]),
            mirror,
        )
        lasted = time.monotonic() - began
        chaos.join()
        found = records.read(place)
        wrong, trained, again = problems(place, found, study, outage)
        if isinstance(mirror, StorageMirror):
            mirror.close(60)
            wrong += [] if _is_mirrored(mirror, place) else ["the storage lacks checkpoints"]
    if state != "finished":
        wrong.append(f"the search ended as {state}")
    if chaos.failure:
        wrong.append(f"the chaos itself failed: {chaos.failure}")
    print(f"\nhosts: {count} at a time, {', '.join(f'{n} {what}' for what, n in sorted(chaos.happened.items()))}")
    if outage:
        print(f"storage: out of reach for {_OUTAGE_S:.0f} s")
    print(f"search: {state} after {lasted:.0f} s")
    counts = ", ".join(f"{number} {status}" for status, number in records.count(found).items() if number)
    print(f"trials: {len(found)} of {searched.budget.trials}, {counts}; {starts.again} starts after a host was lost")
    print(f"epochs: {trained} trained, {again} of them again")
    print(f"wrong: {'; '.join(wrong) or 'nothing'}")
    return min(len(wrong), 1)


def _fails_later(wire: s3.Wire, seconds: float, began: list[float]) -> threading.Timer:
    """Cuts the storage off after so many seconds, once."""

    def fail() -> None:
        print("the storage is out of reach", flush=True)
        began.append(time.time())
        wire.fail("cut")
        time.sleep(_OUTAGE_S)
        wire.mend()

    timer = threading.Timer(seconds, fail)
    timer.start()
    return timer


def _is_mirrored(mirror: StorageMirror, place: Path) -> bool:
    """Whether the storage holds the last checkpoint of each completed trial that can be the winner."""
    found = records.read(place)
    kept = {record["trial"] for record in found if record["status"] == "completed"} - records.cannot_win(found)
    there = [checkpoints.newest(mirror.trials, trial) for trial in kept]
    return all(found and found.progress["epochs"] == _EPOCHS for found in there)


def problems(
    place: Path, found: list[dict[str, Any]], study: SearchStudy, outage: list[float]
) -> tuple[list[str], int, int]:
    """What is wrong, how many epochs were begun, and how many of them not for the first time. `outage`: when the
    storage could not be reached any more, if it was so."""
    wrong = [f"{r['trial']} {r['status']}: {r['reason']}" for r in found if r["status"] in ("failed", "diverged")]
    wrong += [] if len(found) == study.space.budget.trials else [f"{len(found)} records"]
    states = [trial.state.name for trial in study._study.trials]
    wrong += [f"a trial is left {state}" for state in states if state not in ("COMPLETE", "PRUNED")]
    for record in found:
        if [row["epoch"] for row in record["history"]] != list(range(1, record["epochs"] + 1)):
            wrong.append(f"{record['trial']} has epochs {[row['epoch'] for row in record['history']]}")
    heard: set[tuple[str, str]] = set()
    begun: Counter[tuple[str, str]] = Counter()
    for line in (place / "epochs.txt").read_text().splitlines():
        what, trial, epoch, host, moment = line.split("\t")
        if what == "goes on after":
            if not any(since < float(moment) < since + _OUTAGE_S + 10 for since in outage):
                heard.add((trial, epoch))
            continue
        if (trial, epoch) in heard:
            wrong.append(f"epoch {epoch} of {trial} was trained again on {host}, though its checkpoint was there")
        begun[trial, epoch] += 1
    return wrong, sum(begun.values()), sum(begun.values()) - len(begun)


if __name__ == "__main__":
    sys.exit(main())
