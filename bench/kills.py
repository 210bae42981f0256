"""Searches that are killed at random moments and resumed: is anything lost, done twice, or left in between?

    python -m bench.kills [--runs 20] [--study sqlite:///study.db] [--storage s3://bucket/kills]

Each run is a 12-trial search with real training on a small procedural set. At random moments SIGKILL hits the driver,
the worker of a trial, or both; what has lost its driver is resumed, as often as it takes. In the end there must be 12
distinct trials in a final state, none trained again after it was done, and the study and records.jsonl must agree.

With a storage, every other time that the driver was hit its machine is gone too, and the run goes on from the storage
in an empty folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import memory
from model import synthetic
from tuner.remote import Folder

TRIALS = 12
_SPACE = """
name: small
data: {height: 64, width: 128, validation_share: 0.25, test_share: 0.25}
train: {width: 0.1, epochs: 3, precision: float32}
search:
  learning_rate: {type: float, low: 0.1, high: 2.0, log: true}
  dilate: {type: int, low: 1, high: 7, step: 2}
objective: {metric: dice_positive_mean}
scheduler: {name: asha, min_epochs: 1, reduction: 2}
budget: {trials: 12}
"""


def tuner(place: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command, in a session of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "tuner", *arguments],
        cwd=place,
        env=environment | {"SEGDEC_TUNER_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(place / "stderr.txt").open("ab"),
        start_new_session=True,
    )


def of_session(leader: int) -> list[tuple[int, str]]:
    """(process, its command) of what a command and Ray started for it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getsid(number := int(folder.name)) == leader:
                found.append((number, memory.command(number)))
    return found


def kill(process: subprocess.Popen[bytes], whom: str) -> str:
    """SIGKILL to the driver, to the worker of a trial or to both; whom it hit."""
    workers = [number for number, command in of_session(process.pid) if command.startswith("ray::ImplicitFunc")]
    hit = []
    if whom in ("worker", "both") and workers:
        os.kill(random.choice(workers), signal.SIGKILL)
        hit.append("worker")
    if whom in ("driver", "both") or not workers:
        process.kill()
        hit.append("driver")
    return " and ".join(hit)


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended in that time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def one_run(
    place: Path, kills: int, study: str | None = None, wandb: str = "off", storage: str | None = None
) -> tuple[list[str], list[str]]:
    """Whom the kills hit, and what was wrong in the end. The study lies in a journal, or where a URL says."""
    synthetic.write(place / "set", count=24, height=64, width=128)
    (place / "small.yaml").write_text(_SPACE)
    run = place / "runs/small"
    command = ("search", "small.yaml", "--data", "set", "--wandb", wandb, "--no-report")
    command += ("--study", study) if study else ()
    command += ("--storage", storage) if storage else ()
    hit: list[str] = []
    ended_before: dict[str, Any] = {}
    again: list[str] = []
    for _ in range(2 * kills + 3):  # each kill costs a session, and so may what Ray makes of it
        process = tuner(place, *command)
        while storage and "run.json" not in _at(storage).entries() and not wait(process, 0.5):
            pass  # a run that has not begun cannot go on elsewhere
        while len(hit) < kills and not wait(process, random.uniform(3, 13)):
            whom = random.choice(["driver", "worker", "both"])
            is_last_chance = storage and len(hit) == kills - 1 and not any("machine" in one for one in hit)
            hit.append(kill(process, "driver" if is_last_chance else whom))
        done = wait(process, 600)
        for number, _ in of_session(process.pid):  # Ray's processes notice in a while that their driver is gone
            os.kill(number, signal.SIGKILL)
        if not done:
            return hit, ["it did not end in ten minutes"]
        found = records(run)
        is_here = (run / "run.json").exists()  # or it was killed before it had brought the run
        if is_here:
            again += [trial for trial, record in ended_before.items() if not is_kept(record, found.get(trial))]
            ended_before = found
        if process.returncode == 0:
            return hit, [f"changed after its end: {trial}" for trial in again] + problems(run)
        if process.returncode == 2:
            return hit, ["its command was refused"]
        command = ("resume", "runs/small") if is_here else command
        if is_here and storage and random.random() < 0.5 + (not any("machine" in one for one in hit)):
            shutil.rmtree(run)
            ended_before = _records_at(storage)  # what it was not told yet is told again
            command = ("resume", f"{storage}/small")
            hit[-1:] = [f"{hit[-1]} and machine"] if hit else ["machine"]
    return hit, ["it ended with a failure each time"]


def _at(storage: str) -> Folder:
    return Folder(storage) / "small"


def _records_at(storage: str) -> dict[str, Any]:
    try:
        return _parsed(_at(storage).read("records.jsonl"))
    except FileNotFoundError:
        return {}


def is_kept(record: dict[str, Any], later: dict[str, Any] | None) -> bool:
    """Whether a record is what it was. That of a held trial may be gone while it goes on, and be longer afterwards."""
    if record["status"] != "stopped_early":
        return later == record
    return later is None or later["history"][: record["epochs"]] == record["history"]


def records(run: Path) -> dict[str, Any]:
    """records.jsonl by trial."""
    path = run / "records.jsonl"
    return _parsed(path.read_bytes()) if path.exists() else {}


def _parsed(lines: bytes) -> dict[str, Any]:
    return {record["trial"]: record for record in map(json.loads, lines.splitlines())}


def problems(run: Path) -> list[str]:
    """What is wrong with a search that has ended."""
    import optuna

    from tuner.run import load
    from tuner.sampler import study_name
    from tuner.storage import open_to_read

    opened = load(run)
    name = study_name(opened.space, opened.info["id"], opened.study)
    trials = optuna.load_study(study_name=name, storage=open_to_read(opened.study)).trials
    found = records(run)
    wrong = [f"trial {t.number} is left {t.state.name} ({t.params})" for t in trials if not t.state.is_finished()]
    wrong += [] if len(found) == TRIALS else [f"{len(found)} records, not {TRIALS}"]
    if [trial.user_attrs.get("record") for trial in trials] != list(found.values()):
        wrong.append("the study and records.jsonl differ")
    for record in found.values():
        if [row["epoch"] for row in record["history"]] != list(range(1, record["epochs"] + 1)):
            wrong.append(f"{record['trial']} has epochs {[row['epoch'] for row in record['history']]}")
        if record["status"] not in ("completed", "stopped_early"):
            wrong.append(f"{record['trial']} {record['status']}: {record['reason']}")
    return wrong


def main() -> int:
    """Prints a line a run; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", help="as that of tuner search")
    parser.add_argument("--storage", help="as that of tuner search; each run lies in a folder of its own there")
    options = parser.parse_args()
    random.seed(options.seed)
    print("| run | killed | s | what was wrong |")
    print("| --- | --- | --- | --- |")
    counts: Counter[str] = Counter()
    for number in range(1, options.runs + 1):
        with tempfile.TemporaryDirectory(prefix="segdec-kills-") as place:
            began = time.perf_counter()
            storage = f"{options.storage}/{number}" if options.storage else None
            hit, wrong = one_run(Path(place), options.kills, options.study, storage=storage)
            if wrong:
                sys.stderr.write((Path(place) / "stderr.txt").read_text())
        counts.update(hit)
        counts["wrong"] += bool(wrong)
        seconds = time.perf_counter() - began
        print(f"| {number} | {', '.join(hit)} | {seconds:.0f} | {'; '.join(wrong) or 'nothing'} |", flush=True)
    whom = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "wrong")
    print(f"\n{counts['wrong']} of {options.runs} runs wrong; killed: {whom}")
    return min(counts["wrong"], 1)


if __name__ == "__main__":
    sys.exit(main())
