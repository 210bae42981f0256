"""Uploads what a search logged to W&B offline: each folder by wandb's own `wandb sync`, in a process of its own.

One process a folder, because `wandb sync` ends with code 0 whatever happens, gives up all folders for one that it
cannot read, and marks a run as uploaded whose rows or files a server has refused. So its messages and its log are read
here, and the mark is taken back unless everything arrived.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuner.tracking.wandb_runs import LOG, check_login, environment

State = Literal["uploaded", "already there", "would be uploaded", "empty", "left out", "failed"]

FAILURES_IN_A_ROW = 3
"""After so many nobody is there, and the rest is left for the next time."""
UPLOAD_LIMIT_S = 900.0
"""A folder holds a few megabytes."""

_RETRIES = {
    # wandb's own settings would try for hours. 2 + 4 + 8 + 16 s outlast a short outage.
    "WANDB__GRAPHQL_RETRY_MAX": "4",
    "WANDB__FILE_STREAM_RETRY_MAX": "4",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "4",
    "WANDB__FILE_STREAM_TIMEOUT_SECONDS": "60",
    "WANDB_HTTP_TIMEOUT": "30",
}
_HEADER_BYTES = 7
"""A .wandb file of this size or less holds nothing: its process was killed at once."""
_LOST = ("file transfer: ", "filestream: ", "runfiles: ")
"""Errors in wandb's log that it does not say: parts of a run that were not taken."""
_TORN = "the file ends with an incomplete record"
_BEGUN = "View run "


@dataclass(frozen=True)
class Outcome:
    """What became of a folder."""

    folder: str
    run: str
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.folder}: {self.state}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class _Part:
    """A .wandb file. A run has several where its trial was held or resumed; a server appends one to the other."""

    file: Path

    @property
    def run(self) -> str:
        return self.file.stem.removeprefix("run-")

    @property
    def mark(self) -> Path:
        """wandb's own mark of what has been uploaded."""
        return self.file.with_suffix(".wandb.synced")

    def outcome(self, state: State, reason: str = "") -> Outcome:
        return Outcome(self.file.parent.name, self.run, state, reason)


def upload(directory: Path, dry_run: bool = False) -> Iterator[Outcome]:
    """Uploads the offline folders in a run's directory, in order of their start; an outcome each, as it comes.

    ValueError before anything is done where there are none, where they are still written, or without an account.
    A dry run writes nothing and asks nobody. Whatever ends this, repeating it goes on with the rest.
    """
    parts = _parts(directory / "wandb")
    if not parts:
        raise ValueError(
            f"{directory} must hold what was logged to W&B offline, found none in {directory / 'wandb'}; "
            "search with `--wandb offline`, which is the default"
        )
    with _not_written(directory / LOG):
        if not dry_run and any(not part.mark.exists() for part in parts):
            check_login("tuner sync", "run `wandb login` or set WANDB_API_KEY; nothing was uploaded")
        yield from _each(parts, dry_run)


def _each(parts: list[_Part], dry_run: bool) -> Iterator[Outcome]:
    incomplete: set[str] = set()
    failures = 0
    for part in parts:
        if part.mark.exists():
            outcome = part.outcome("already there")
        elif part.file.stat().st_size <= _HEADER_BYTES:
            outcome = part.outcome("empty", "its process was killed before it wrote anything")
        elif part.run in incomplete:
            outcome = part.outcome("left out", "what comes before it in the same run is not uploaded")
        elif failures == FAILURES_IN_A_ROW:
            outcome = part.outcome("left out", f"{failures} failed in a row")
        elif dry_run:
            outcome = part.outcome("would be uploaded")
        else:
            outcome = _upload(part)
            failures = failures + 1 if outcome.state == "failed" else 0
            if outcome.state == "failed":
                incomplete.add(part.run)
        yield outcome


def _parts(wandb: Path) -> list[_Part]:
    """The offline folders by their names, which begin with the start time."""
    return [
        _Part(file) for folder in sorted(wandb.glob("offline-run-*")) for file in sorted(folder.glob("run-*.wandb"))
    ]


@contextlib.contextmanager
def _not_written(log: Path) -> Iterator[None]:
    """Holds the lock that a logger process has on its log: no file is uploaded while it grows, nor twice at once."""
    if not log.exists():
        yield
        return
    with log.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{log.parent} is being written, or uploaded by another `tuner sync`; wait until it has ended"
            ) from None
        yield


def _upload(part: _Part) -> Outcome:
    """Runs `wandb sync` on one folder and finds out what became of it."""
    arrived = False
    try:
        with tempfile.TemporaryDirectory(prefix="tuner-sync-") as scratch:
            said = _wandb_sync(part, Path(scratch))
            lost = _lost(Path(scratch))
        errors = [line.removeprefix("ERROR ") for line in said if line.startswith("ERROR ")]
        if errors and all(_TORN in error for error in errors) and not lost:
            # Its process was killed, so the rest will never come.
            if not any(_BEGUN in line for line in said):
                return part.outcome("empty", "its process was killed before it had described its run")
            part.mark.touch()
            arrived = True
            return part.outcome("uploaded", "as far as its file goes; its process was killed")
        if errors or lost or not part.mark.exists():
            return part.outcome("failed", " ".join(lost[:1] or errors or said[-1:]))
        arrived = True
        return part.outcome("uploaded")
    except subprocess.TimeoutExpired:
        return part.outcome("failed", f"took longer than {UPLOAD_LIMIT_S:g} s")
    finally:
        if not arrived:
            part.mark.unlink(missing_ok=True)


def _wandb_sync(part: _Part, scratch: Path) -> list[str]:
    """What `wandb sync` says, line by line. It has its own session: a Ctrl-C is ours to handle."""
    variables = _RETRIES | environment("online") | {"WANDB_DIR": str(scratch)}
    variables.pop("WANDB_SILENT", None)
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-m", "wandb", "sync", str(part.file.parent.resolve())],
        cwd=scratch,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=UPLOAD_LIMIT_S)
    except BaseException:
        process.kill()  # wandb-core ends with its parent, and holds the pipe until then
        process.communicate()
        raise
    return [line.removeprefix("wandb: ").strip() for line in output.splitlines() if line.strip()]


def _lost(scratch: Path) -> list[str]:
    """What wandb's log says of parts that were not taken."""
    found = []
    for log in sorted(scratch.rglob("debug-sync*.log")):
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry["level"].startswith("ERROR") and entry["msg"].startswith(_LOST):
                    found.append(" ".join(entry["msg"].split()))
    return found
