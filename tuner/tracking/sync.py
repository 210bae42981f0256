"""Uploads what a search logged to W&B and what is not there yet: each folder by wandb's own `wandb sync`, in a process
of its own; then has the runs attached to a sweep.

One process a folder, because `wandb sync` ends with code 0 whatever happens, gives up all folders for one that it
cannot read, and marks a run as uploaded whose rows or files a server has refused. So its messages and its log are read
here, and the mark is taken back unless everything arrived.

What W&B's files lack, because a disk was full or the logger process died, is first logged again from the records; only
previews and the use of devices are not in them. The report's run is logged anew as long as a server has not all of it:
its files name what they hold by absolute paths, which a directory that was moved has no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner.run import SEARCH, Run
from tuner.tracking.base import RunInfo
from tuner.tracking.wandb_files import (
    LOG,
    OFFLINE,
    files_of,
    logged,
    lost_parts,
    mark,
    note_uploaded,
    report_run,
    started,
    uploaded,
    written,
)
from tuner.tracking.wandb_log import INTERRUPTED
from tuner.tracking.wandb_report import is_evaluated
from tuner.tracking.wandb_runs import WandbTracker, check_login, environment
from tuner.tracking.wandb_sweep import make_pages

State = Literal[
    "uploaded",
    "already there",
    "would be uploaded",
    "empty",
    "left out",
    "failed",
    "completed from the records",
    "would be completed from the records",
    "made",
    "would be made",
]

FAILURES_IN_A_ROW = 3
"""After so many nobody is there, and the rest is left for the next time."""
UPLOAD_LIMIT_S = 900.0
"""A folder holds a few megabytes; that of the report also the model."""
COMPLETION_LIMIT_S = 600.0

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
_TORN = "the file ends with an incomplete record"
_BEGUN = "View run "


@dataclass(frozen=True)
class Outcome:
    """What became of a folder, or of another step."""

    what: str
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.state}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class _Part:
    """A .wandb file. A run has several where its trial was held or resumed; a server appends one to the other."""

    file: Path

    @property
    def run(self) -> str:
        return self.file.stem.removeprefix("run-").removesuffix(OFFLINE)

    @property
    def mark(self) -> Path:
        return mark(self.file)

    def outcome(self, state: State, reason: str = "") -> Outcome:
        return Outcome(self.file.parent.name, state, reason)


def upload(run: Run, info: RunInfo, dry_run: bool = False) -> Iterator[Outcome]:
    """Uploads the folders in a run's directory, in order of their start; an outcome each, as it comes.

    ValueError before anything is done where there are none, where they are still written, or without an account.
    A dry run writes nothing and asks nobody. Whatever ends this, repeating it goes on with the rest.
    """
    directory, log = run.directory, run.directory / LOG
    with _not_written(log):
        parts = _parts(directory)
        if not parts and run.options.wandb == "off":
            raise ValueError(
                f"{directory} must hold what was logged to W&B, found a search with `--wandb off`; "
                "search with `--wandb offline`, which is the default"
            )
        # A trial of an agent has a run of the agent's name, in the agent's sweep.
        is_search = run.kind == SEARCH
        lacking = _lacking(directory, run.records) if is_search else []
        report = report_run(info.id)
        there = uploaded(directory).get(report)
        report_is_lacking = is_evaluated(directory) and not (there and there.exit_code == 0)
        if not dry_run and (lacking or report_is_lacking or any(not part.mark.exists() for part in parts)):
            check_login("tuner sync", "run `wandb login` or set WANDB_API_KEY; nothing was uploaded")
        for record in lacking:
            yield Outcome(
                record["trial"], "would be completed from the records" if dry_run else "completed from the records"
            )
        if report_is_lacking and not files_of(directory, report):
            yield Outcome(report, "would be completed from the records" if dry_run else "completed from the records")
        if (lacking or report_is_lacking) and not dry_run:
            _complete(info, lacking, report_is_lacking)
        went_well = True
        for outcome in _each(_parts(directory), directory, dry_run):
            went_well = went_well and outcome.state not in ("failed", "left out")
            yield outcome
    if went_well and is_search:
        yield from _attached(run, info, dry_run)


def _lacking(directory: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of trials that W&B's files do not hold to their end."""

    def lacks(record: dict[str, Any]) -> bool:
        found = logged(directory, record["trial"])
        return (
            not found
            or found[-1].exit_code in (None, INTERRUPTED)
            or max(one.epoch for one in found) < len(record["history"])
        )

    with ThreadPoolExecutor(4) as pool:
        return [record for record, is_lacking in zip(records, pool.map(lacks, records), strict=True) if is_lacking]


def _complete(info: RunInfo, records: list[dict[str, Any]], report: bool) -> None:
    tracker = WandbTracker("offline", wait_s=COMPLETION_LIMIT_S)
    if report:
        for file in files_of(info.directory, report_run(info.id)):
            shutil.rmtree(file.parent)
    tracker.search_started(info)
    for record in records:
        tracker.trial_ended(record)
    if report:
        tracker.report_written()
    tracker.search_ended("completed")


def _attached(run: Run, info: RunInfo, dry_run: bool) -> Iterator[Outcome]:
    """Sweep, workspace and report, where all runs are there."""
    if dry_run:
        yield Outcome("sweep, workspace and report", "would be made", "where they are not there yet")
        return
    runs = [*uploaded(run.directory), *(part.run for part in _parts(run.directory))]
    trials = dict.fromkeys(name for name in runs if name != report_run(info.id))
    answer = make_pages(run.directory, info.space, info.data, info.name, trials)
    for what, url in (
        ("sweep", (answer["sweep"] or {}).get("url")),
        ("workspace", answer["workspace"]),
        ("report", answer["report"]),
    ):
        if url:
            yield Outcome(what, "made", url)
    for problem in answer["problems"]:
        yield Outcome("sweep, workspace and report", "failed", problem)


def _each(parts: list[_Part], directory: Path, dry_run: bool) -> Iterator[Outcome]:
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
            if outcome.state == "uploaded":
                note_uploaded(directory, part.run, written(part.file))
        yield outcome


def _parts(directory: Path) -> list[_Part]:
    """The folders in order of their start."""
    files = (directory / "wandb").glob("*run-*/run-*.wandb")
    return [_Part(file) for file in sorted(files, key=started)]


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
                f"{log.parent} is being written, or uploaded by another `tuner sync`; wait until it has ended, which "
                "is at most ten minutes after the search"
            ) from None
        yield


def _upload(part: _Part) -> Outcome:
    """Runs `wandb sync` on one folder and finds out what became of it."""
    arrived = False
    try:
        with tempfile.TemporaryDirectory(prefix="tuner-sync-") as scratch:
            said = _wandb_sync(part, Path(scratch))
            lost = [line for log in sorted(Path(scratch).rglob("debug-sync*.log")) for line in lost_parts(log)]
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
        [
            sys.executable,
            "-P",
            "-m",
            "wandb",
            "sync",
            "--include-online",
            "--id",
            part.run,
            str(part.file.parent.resolve()),
        ],
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
