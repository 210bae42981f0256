"""One trial for people: a plain line an epoch, for a terminal as for the log of an agent."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from tuner.tracking.base import RunInfo, Tracker
from tuner.tracking.progress import number, parameters


class LinesTracker(Tracker):
    """Says what a trial is and how it comes along; what it has come to is for whoever runs it to say."""

    name = "the terminal display"

    def __init__(self, console: Console) -> None:
        self._console = console
        self._metric = ""
        self._epochs: Any = None

    def search_started(self, run: RunInfo) -> None:
        self._metric = run.metric

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        self._epochs = config["epochs"]
        self._print(f"trial {trial}: {parameters(params) or 'nothing searched'}")

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        seen = [("loss", figures.get("loss_total")), (self._metric, figures.get("value"))]
        shown = ", ".join(f"{name} {number(value)}" for name, value in seen)
        at = f"epoch {figures['epoch']} of {self._epochs}"
        if "fold_value" in figures:
            at = f"fold {figures['epoch']}, mean so far"
        self._print(f"{at}: {shown}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
