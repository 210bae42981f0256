"""What watches a search: the events, and the fan-out that keeps a failing watcher from stopping the search.

Trackers decide nothing. The driver process calls them, from one thread, with plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """A search as its trackers see it."""

    name: str
    id: str
    """Six characters; every trial id begins with them."""
    directory: Path
    space: dict[str, Any]
    baseline: dict[str, Any] | None
    """The baseline's configuration, whole or only the fields that tell it apart; None without a baseline."""
    trials_asked: int | None
    """None where only time or money ends the search."""
    hours: float | None
    metric: str
    mode: Literal["max", "min"]
    data: str = "synthetic"
    """path of the data set"""
    sweep: str | None = None
    """id of the W&B sweep that every run carries"""
    shared: bool = False
    """whether others write to W&B from the same directory at the same time, each a trial of its own"""
    stage: str = "search"
    """what is watched, as messages say it before the name"""
    records_file: str = "records.jsonl"
    """where the records of what has ended lie in the directory"""
    wandb_run: str | None = None
    """the id of the one run, where an agent has chosen it"""

    def is_baseline(self, config: dict[str, Any]) -> bool:
        """Whether a trial with this configuration is the baseline (only a hint: its record says so for certain)."""
        return bool(self.baseline) and all(
            name in config and config[name] == value for name, value in (self.baseline or {}).items()
        )


class Tracker:
    """Watches a search and does nothing; the others override what they need."""

    name = ""
    """what messages call it; empty for the class's name"""

    @property
    def way_back(self) -> str:
        """How what it missed is got back, for the message that it failed; empty where nothing gets it back."""
        return ""

    def search_started(self, run: RunInfo) -> None:
        """First event, also of a resumed search."""

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        """A trial begins, or goes on after the epochs of `history`, which may include some that were never told.
        `config` is the whole RunConfig."""

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        """`figures`: a row of a record's history. `use`: of worker and device in this epoch, see `tuner.use`.
        `previews`: name -> PNG, often empty."""

    def trial_ended(self, record: dict[str, Any]) -> None:
        """`record`: a line of records.jsonl. A trial that was read off another one was never started."""

    def trial_held(self, record: dict[str, Any]) -> None:
        """A scheduler has taken a trial off its worker; it may start again. `record` is what it has come to."""

    def report_written(self) -> None:
        """The report lies in the run's directory; comes after the search, between a start and an end of its own."""

    def search_ended(self, state: str) -> None:
        """Last event; `state` is finished, stopped or failed. Trials may still be running when it is not finished."""

    def close(self) -> None:
        """Lets go of terminal and processes without waiting. Called instead of further events after an error."""


class Trackers(Tracker):
    """Hands each event to every tracker. One that raises is reported once, closed and told nothing further."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._live = list(trackers)

    def search_started(self, run: RunInfo) -> None:
        self._tell("search_started", run)

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        self._tell("trial_started", trial, params, config, history)

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        self._tell("epoch_ended", trial, figures, use, previews)

    def trial_ended(self, record: dict[str, Any]) -> None:
        self._tell("trial_ended", record)

    def trial_held(self, record: dict[str, Any]) -> None:
        self._tell("trial_held", record)

    def report_written(self) -> None:
        self._tell("report_written")

    def search_ended(self, state: str) -> None:
        self._tell("search_ended", state)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, event: str, *values: Any) -> None:
        for tracker in tuple(self._live):
            try:
                getattr(tracker, event)(*values)
            except Exception as error:
                self._live.remove(tracker)
                self._switch_off(tracker, event, error)

    def _switch_off(self, tracker: Tracker, event: str, error: Exception) -> None:
        name = tracker.name or type(tracker).__name__
        way_back = f"; {tracker.way_back}" if tracker.way_back else ""
        try:
            tracker.close()
        except Exception:
            logger.debug("closing %s failed as well", name, exc_info=True)
        # After close, so that the message does not land in the middle of a live display.
        logger.warning(
            "%s is switched off, for it failed (%s: %s); the search goes on%s",
            name, type(error).__name__, error, way_back,
        )  # fmt: skip
        logger.debug("%s failed in %s", name, event, exc_info=error)
