"""A collection: the trials of a space that are in no search, run by hand or by agents, in one run directory.

Several processes add to it at once. Each makes the folder of its trial, which reserves the number, and holds a lock in
there until it ends; the lock of the directory it takes only while it adds its record.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.files import write_atomically
from tuner import records
from tuner.run import TRIALS, NameTaken, Run, create, load
from tuner.space import Space


def join(space: Space, data: str | Path, runs: Path, name: str | None = None) -> Run:
    """The collection of this name, made by the first trial. ValueError if it is of another space, or is a search."""
    name = name or f"{space.name}-trials"
    try:
        return create(space, data, runs, name, kind=TRIALS)
    except NameTaken:
        run = load(runs / name, data)
    if run.kind != TRIALS:
        raise ValueError(
            f"a trial outside any search must go into a collection of such trials, found the search {run.directory}; "
            "choose another name with --name"
        )
    theirs = run.info["space_fingerprint"]
    if (ours := space.fingerprint()) != theirs:
        raise ValueError(
            f"all trials of a collection must be of one space, fingerprint {theirs} in {run.directory}, found {ours}; "
            "name another collection with --name, or restore the space"
        )
    return run


@contextmanager
def reserved(run: Run) -> Iterator[tuple[int, Path]]:
    """A number that no other trial has or had, and the folder of its trial; running until this ends."""
    trials = run.directory / "trials" / "attempt-1"
    trials.mkdir(parents=True, exist_ok=True)
    run_id = run.info["id"]
    recorded = {record["number"] for record in run.records}
    for number in itertools.count():
        folder = trials / records.trial_id(run_id, number)
        if number not in recorded and _is_made_here(folder):
            break
    with (folder / "trial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield number, folder


def _is_made_here(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def add(run: Run, record: dict[str, Any]) -> None:
    """Adds a record to records.jsonl, which is never seen in parts."""
    line = json.dumps(record, allow_nan=False) + "\n"
    path = run.directory / records.FILE
    with (run.directory / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + line.encode())
