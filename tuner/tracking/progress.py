"""What has been seen of a search, counted and put into words; shared by whatever shows a search to people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.records import is_feasible
from tuner.tracking.base import RunInfo


@dataclass
class Running:
    """A trial that runs now; `best` since this session began."""

    params: dict[str, Any]
    baseline: bool
    epoch: int
    value: Any = None
    best: Any = None


@dataclass
class Progress:
    """The trials of a search so far; arithmetic only."""

    run: RunInfo
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    finished_before: int = 0
    seconds_before: float = 0.0

    def better(self, value: Any, than: Any) -> bool:
        """Whether a value beats another; of two objectives the first decides, None never wins."""
        mine, other = _first(value), _first(than)
        if mine is None or other is None:
            return mine is not None
        return mine > other if self.run.mode == "max" else mine < other

    def best(self) -> tuple[str, Any, dict[str, Any]] | None:
        """Trial, value and parameters of the best completed trial; of the best running one before any has completed.

        A trial that was stopped early, or that violates a constraint, cannot win, so it is not shown as best either.
        """
        seen = [
            (record["trial"], record.get("value"), record.get("params") or {})
            for record in self.finished.values()
            if record["status"] == "completed" and is_feasible(record)
        ] or [(trial, running.best, running.params) for trial, running in self.running.items()]
        best: tuple[str, Any, dict[str, Any]] | None = None
        for trial in seen:
            if self.better(trial[1], than=best[1] if best else None):
                best = trial
        return best

    def charged(self) -> int:
        """Finished trials that count towards those asked for: a replay of an earlier training is free."""
        return sum(not record.get("replayed_from") for record in self.finished.values())

    def seconds_left(self, session_seconds: float) -> float | None:
        """Time left, from the pace of this session's finished trials and the hours; None while nothing is known."""
        estimates = []
        here = self.charged() - self.finished_before
        # Where all trials have been seen, some that are held may still go on, for nobody knows how long.
        if here > 0 and self.run.trials_asked is not None and self.charged() < self.run.trials_asked:
            left = self.run.trials_asked - self.charged()
            estimates.append(session_seconds / here * left)
        if self.run.hours is not None:
            estimates.append(max(0.0, self.run.hours * 3600 - self.seconds_before - session_seconds))
        return min(estimates, default=None)


def records_before(path: Path) -> Iterator[dict[str, Any]]:
    """Trials that finished before this search was resumed. A last line that a crash has cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield json.loads(line)


def _first(value: Any) -> float | None:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return first if isinstance(first, int | float) and first == first else None


def of_asked(progress: Progress) -> str:
    """How many trials have ended, and of how many where that is known."""
    asked = progress.run.trials_asked
    return str(progress.charged()) if asked is None else f"{progress.charged()} of {asked}"


def words(status: str) -> str:
    """A status for reading."""
    return status.replace("_", " ")


def number(value: Any) -> str:
    """Short for reading: four significant digits at most after the point; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " / ".join(number(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parameters(params: dict[str, Any]) -> str:
    """Searched parameters as name=value."""
    return " ".join(f"{name}={number(value)}" for name, value in params.items())


def duration(seconds: float) -> str:
    """The two largest units, as 35 s, 4 min 05 s, 3 h 20 min, 2 d 7 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
