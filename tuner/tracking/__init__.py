"""What watches a search: W&B, TensorBoard and the terminal. Off is a no-op; a tracker that fails never stops a
search."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rich.console import Console

from tuner.tracking.base import RunInfo, Tracker, Trackers
from tuner.tracking.tensorboard import TensorBoardTracker
from tuner.tracking.terminal import TerminalTracker
from tuner.tracking.wandb_runs import WAIT_S, WandbTracker, check_online, report_is_logged

__all__ = [
    "RunInfo", "TensorBoardTracker", "TerminalTracker", "Tracker", "Trackers", "WandbTracker", "build", "check_online",
    "log_report",
]  # fmt: skip


def build(
    wandb: Literal["off", "offline", "online"],
    tensorboard: bool,
    terminal: bool,
    console: Console | None = None,
    wait_s: float = WAIT_S,
) -> Trackers:
    """The trackers of a search. Give `console` to have log messages and display share one (see TerminalTracker).
    `wait_s`: how long its end waits for what W&B has to write or to upload."""
    trackers: list[Tracker] = []
    if wandb != "off":
        trackers.append(WandbTracker(wandb, wait_s))
    if tensorboard:
        trackers.append(TensorBoardTracker())
    if terminal:
        trackers.append(TerminalTracker(console))
    return Trackers(trackers)


def log_report(run: RunInfo, wandb: Literal["off", "offline", "online"], wait_s: float = WAIT_S) -> None:
    """Logs the report of a search to W&B, once."""
    if wandb == "off" or report_is_logged(run):
        return
    trackers = Trackers([WandbTracker(wandb, wait_s)])
    trackers.search_started(replace(run, space={}))  # its sweep is made
    trackers.report_written()
    trackers.search_ended("finished")
