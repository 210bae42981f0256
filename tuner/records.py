"""What a search leaves for others: one record a finished trial, in records.jsonl. The keys are in
docs/run-directory.md. The study holds the same records; this file is written from them.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.files import write_atomically

FILE = "records.jsonl"

OPEN_TEST = "open-test"
"""Below evaluation/ and report/: what thresholds chosen on test give."""


class Status(enum.StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    FAILED = "failed"


class SearchFailed(RuntimeError):
    """A search that cannot go on, or that has nothing to show; the message says why."""


class RecordsFile:
    """records.jsonl, written whole each time, from lines that are made once."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / FILE
        self._lines: dict[str, str] = {}
        self._is_written = False

    def write(self, records: list[dict[str, Any]]) -> None:
        """Replaces the file at once, if it does not hold these records yet. A record never changes."""
        fresh = [record for record in records if record["trial"] not in self._lines]
        if self._is_written and not fresh:
            return
        self._lines |= {record["trial"]: json.dumps(record, allow_nan=False) + "\n" for record in fresh}
        write_atomically(self._path, "".join(self._lines[record["trial"]] for record in records).encode())
        self._is_written = True


def read(run_directory: Path) -> list[dict[str, Any]]:
    """All records, in the order of the study; none if nothing has finished yet."""
    path = run_directory / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The completed trial with the largest value; the earlier one of equals. Stopped ones have not seen the end of
    the loss schedule, so their values are no match."""
    completed = [r for r in records if r["status"] == Status.COMPLETED and r["value"] is not None]
    return max(completed, key=lambda record: record["value"], default=None)


def baseline(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The baseline's record, if it has finished."""
    return next((record for record in records if record["baseline"]), None)


def charged(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that count against a budget: those whose network was trained for them."""
    return [record for record in records if record["replayed_from"] is None]


def count(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many ended in each way."""
    found = Counter(record["status"] for record in records)
    return {status.value: found[status.value] for status in Status}


def reasons(records: Iterable[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(status, reason, how many) of the trials that did not complete, the most frequent first."""
    found = Counter((record["status"], record["reason"]) for record in records if record["reason"])
    return [(status, reason, count) for (status, reason), count in found.most_common()]
