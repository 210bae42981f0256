"""The files that wandb writes into a run's directory: where they lie, and what they hold.

wandb says nothing when a full disk swallows the rows of a run, when the file of an earlier session was cut off, or when
a server has refused a part. So files are read back, and wandb's own log is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

PROJECT = "segdec-tuner"
"""Where runs and sweeps lie, unless WANDB_PROJECT says."""
LOG = Path("wandb") / "tracker.log"
"""In a run's directory: what the logger process says. It holds a shared lock on it as long as it lives."""
LOCK = Path("wandb") / "tracker.lock"
"""In a run's directory: the logger process holds it, so that that of the next session waits for its end."""
SWEEP = Path("wandb") / "sweep.json"
"""In a run's directory: the sweep and the pages that a server has made for it."""
SPACE = Path("wandb") / "space.yaml"
"""In a run's directory: the space as it was searched, for agents of the sweep."""

OFFLINE = "-offline"
"""Ends the id of a run that could not be opened online; `tuner sync` gives it its own one back."""
_UPLOADED = Path("wandb") / "uploaded.txt"
_READ_LIMIT_S = 60.0

_LOST = ("file transfer: ", "filestream: ", "runfiles: ", "runupserter: failed", "sender: failed to log artifact")
"""Errors in wandb's log that it does not say aloud: parts of a run that were not taken."""


class Written(NamedTuple):
    """What a .wandb file holds."""

    epoch: int
    """the last one, 0 if there is none"""
    exit_code: int | None
    """None where its run was not ended"""


def written(file: Path) -> Written:
    """Reads a file back, as far as it goes."""
    spec = importlib.util.find_spec("wandb")
    assert spec is not None
    assert spec.origin is not None
    core = Path(spec.origin).parent / "bin" / "wandb-core"
    command = [str(core), "leet", "inspect", "-no-observability", "--json", "--run-file", str(file)]
    epoch, exit_code = 0, None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_READ_LIMIT_S)  # noqa: S603
    except subprocess.TimeoutExpired:
        return Written(epoch, exit_code)
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        if entry["type"] == "history":  # not the summary, which is written before its row
            epoch = int(entry["history"]["item"].get("epoch") or 0)
        elif entry["type"] == "exit":
            exit_code = entry["exit"].get("exit_code", 0)
    return Written(epoch, exit_code)


def lost_parts(log: Path) -> list[str]:
    """What wandb's own log says of parts that were not taken."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
            if entry["level"].startswith("ERROR") and entry["msg"].startswith(_LOST):
                found.append(" ".join(f"{entry['msg']} {entry.get('error', '')}".split()))
        except (ValueError, KeyError):
            continue
    return found


def files_of(directory: Path, run_id: str) -> list[Path]:
    """The .wandb files of a run, oldest first: one for each time that it was begun."""
    ids = (run_id, run_id + OFFLINE)
    files = [file for name in ids for file in (directory / "wandb").glob(f"*run-*/run-{name}.wandb")]
    return sorted(files, key=started)


def report_run(search_id: str) -> str:
    """The id of the report's run."""
    return f"{search_id}-report"


def started(file: Path) -> tuple[str, int]:
    """When a file was begun, by the name of its folder; of one second, who wrote last comes last."""
    return file.parent.name.removeprefix("offline-").removeprefix("run-")[:15], file.stat().st_mtime_ns


def mark(file: Path) -> Path:
    """wandb's own mark of what has been uploaded."""
    return file.with_suffix(".wandb.synced")


def uploaded(directory: Path) -> dict[str, Written]:
    """What a server has of each run: their folders may be gone since, by `wandb clean`."""
    file = directory / _UPLOADED
    found: dict[str, Written] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # of a line that a full disk cut off
            name, epoch, code = line.split()
            before = found[name].epoch if name in found else 0
            found[name] = Written(max(before, int(epoch)), None if code == "-" else int(code))
    return found


def note_uploaded(directory: Path, run_id: str, found: Written) -> None:
    """Keeps in mind what a server has got of a run."""
    code = "-" if found.exit_code is None else found.exit_code
    with (directory / _UPLOADED).open("a") as file:
        file.write(f"{run_id} {found.epoch} {code}\n")


def logged(directory: Path, run_id: str) -> list[Written]:
    """What there is of a run, oldest first: on a server, and in each of its files."""
    there = uploaded(directory).get(run_id)
    return ([there] if there else []) + [written(file) for file in files_of(directory, run_id)]
