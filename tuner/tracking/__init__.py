"""What watches a search: W&B, TensorBoard and the terminal. Off is a no-op; a tracker that fails never stops a
search."""

from __future__ import annotations

from typing import Literal

from rich.console import Console

from tuner.tracking.base import RunInfo, Tracker, Trackers
from tuner.tracking.tensorboard import TensorBoardTracker
from tuner.tracking.terminal import TerminalTracker
from tuner.tracking.wandb_runs import WandbTracker, check_online

__all__ = [
    "RunInfo", "TensorBoardTracker", "TerminalTracker", "Tracker", "Trackers", "WandbTracker", "build", "check_online",
]  # fmt: skip


def build(
    wandb: Literal["off", "offline", "online"], tensorboard: bool, terminal: bool, console: Console | None = None
) -> Trackers:
    """The trackers of a search. Give `console` to have log messages and display share one (see TerminalTracker)."""
    trackers: list[Tracker] = []
    if wandb != "off":
        trackers.append(WandbTracker(wandb))
    if tensorboard:
        trackers.append(TensorBoardTracker())
    if terminal:
        trackers.append(TerminalTracker(console))
    return Trackers(trackers)
