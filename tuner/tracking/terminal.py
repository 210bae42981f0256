"""The terminal: a live display of a search, or one plain line a finished trial where there is no terminal.

Give `logging` a `rich.logging.RichHandler(console=tracker.console)`, and print with that console: such output scrolls
by above the display. `print` and `sys.stderr` are redirected there too, but a plain `logging.StreamHandler` made
before the search holds on to the old stream and writes into the display.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuner import records
from tuner.tracking.base import RunInfo, Tracker
from tuner.tracking.progress import Progress, Running, duration, number, of_asked, parameters, records_before, words

REFRESH_PER_SECOND = 2
FINISHED_SHOWN = 5
OTHER_ROWS = 14 + FINISHED_SHOWN
"""Lines of the display besides the running trials; a display higher than the terminal could not be redrawn."""
MOST_RUNNING_SHOWN = 32

_FIXED_WIDTH = 44
_PARAMETER_WIDTH = 9
"""Columns that trial and figures take, and a searched parameter at least."""

STATUSES = ("completed", "stopped_early", "diverged", "failed")
_STYLES = {"completed": "green", "stopped_early": "cyan", "diverged": "yellow", "failed": "red"}


class TerminalTracker(Tracker):
    """Shows a search. Without `console` it goes to standard error: standard output is for results."""

    name = "the terminal display"

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._progress: Progress | None = None
        self._start = 0.0
        self._live: Live | None = None
        self._lock = threading.Lock()  # the display is drawn by a thread of rich

    def search_started(self, run: RunInfo) -> None:
        self._start = self._clock()
        self._progress = Progress(run)
        for record in records_before(run.directory / run.records_file):
            self._progress.finished[record["trial"]] = record
            self._progress.seconds_before = max(self._progress.seconds_before, record.get("ended") or 0.0)
        self._progress.finished_before = self._progress.charged()
        if self.console.is_interactive:
            self._live = Live(console=self.console, refresh_per_second=REFRESH_PER_SECOND, get_renderable=self._draw)
            self._live.start()

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        progress = self._seen()
        with self._lock:
            progress.finished.pop(trial, None)  # it was held
            progress.running[trial] = Running(params, progress.run.is_baseline(config), len(history))

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        progress = self._seen()
        with self._lock:
            running = progress.running.get(trial)
            if running is None:
                return
            running.epoch = int(figures.get("epoch") or running.epoch)
            running.value = figures.get("value")
            # With folds it is the mean so far, of which the last one counts.
            if "fold_value" in figures or progress.better(running.value, than=running.best):
                running.best = running.value

    def trial_ended(self, record: dict[str, Any]) -> None:
        progress = self._seen()
        with self._lock:
            progress.running.pop(record["trial"], None)
            # A trial of before that is told again comes last.
            is_known = progress.finished.pop(record["trial"], None) == record
            progress.finished[record["trial"]] = record
        if self._live is None and not is_known:
            self._print(_finished_line(record, progress, words(record["status"])))

    def trial_held(self, record: dict[str, Any]) -> None:
        progress = self._seen()
        with self._lock:
            progress.running.pop(record["trial"], None)
            progress.finished[record["trial"]] = record
        if self._live is None:
            self._print(_finished_line(record, progress, "held"))

    def search_ended(self, state: str) -> None:
        if self._progress is None:
            return
        self.close()
        seconds = self._clock() - self._start
        self._print(_closing_line(state, self._progress, seconds))

    def close(self) -> None:
        """Leaves the last state of the display on the terminal and gives the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _seen(self) -> Progress:
        if self._progress is None:
            raise RuntimeError("the search has not started")
        return self._progress

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def _draw(self) -> RenderableType:
        progress = self._seen()
        with self._lock:
            rows = min(MOST_RUNNING_SHOWN, max(1, self.console.size.height - OTHER_ROWS))
            return Group(
                _header(progress, self._clock() - self._start),
                _counts(progress),
                _best(progress),
                *_running_table(progress, rows, self.console.width),
                *_finished_table(progress, self.console.width),
            )


def _header(progress: Progress, seconds: float) -> Text:
    run = progress.run
    left = progress.seconds_left(seconds)
    times = f"{duration(progress.seconds_before + seconds)} elapsed"
    if left is not None:
        times += f", about {duration(left)} left"
    text = Text(run.name, style="bold", no_wrap=True, overflow="ellipsis")
    return text.append(f"  {run.metric} ({run.mode})  {times}", style="not bold")


def _counts(progress: Progress) -> Text:
    counts = Counter(record["status"] for record in progress.finished.values())
    text = Text(f"{of_asked(progress)} trials: {len(progress.running)} running")
    for status in STATUSES:
        text.append(", ")
        text.append(f"{counts[status]} {words(status)}", style=_STYLES[status] if counts[status] else "dim")
    if replayed := len(progress.finished) - progress.charged():
        text.append(f" ({replayed} replayed)", style="dim")
    return text


def _best(progress: Progress) -> Text:
    best = progress.best()
    if best is None:
        return Text("best: none yet", style="dim")
    trial, value, params = best
    mark = " (running)" if trial in progress.running else ""
    if _is_baseline(trial, progress):
        mark += " (baseline)"
    text = Text("best: ").append(number(value), style="bold")
    return text.append(f"  {trial}{mark}  {parameters(params)}")


def _running_table(progress: Progress, rows: int, room: int) -> list[RenderableType]:
    if not progress.running:
        return []
    shown = list(progress.running.items())[:rows]
    table = _Trials("running", "epoch", "value", "best", params=[r.params for _, r in shown], room=room)
    for trial, running in shown:
        figures = (str(running.epoch), number(running.value), number(running.best))
        table.add(_marked(trial, running.baseline), figures, running.params)
    hidden = len(progress.running) - len(shown)
    return [table.table, Text(f"and {hidden} more", style="dim")] if hidden else [table.table]


def _finished_table(progress: Progress, room: int) -> list[RenderableType]:
    if not progress.finished:
        return []
    shown = list(progress.finished.values())[-FINISHED_SHOWN:]
    params = [record.get("params") or {} for record in shown]
    table = _Trials("finished", "epochs", "value", "status", params=params, room=room)
    for record, searched in zip(shown, params, strict=True):
        status = Text(words(record["status"]), style=_STYLES.get(record["status"], ""))
        figures = (str(record.get("epochs") or "-"), number(record.get("value")), status)
        table.add(_marked(record["trial"], bool(record.get("baseline"))), figures, searched)
    return [table.table]


class _Trials:
    """A table with a line a trial: id, figures, and as many searched parameters as there is room for."""

    def __init__(self, first: str, *figures: str, params: list[dict[str, Any]], room: int) -> None:
        names = list(dict.fromkeys(name for each in params for name in each))
        self._names = names[: max(1, (room - _FIXED_WIDTH) // _PARAMETER_WIDTH)]
        self.table = Table(box=None, pad_edge=False, header_style="dim")
        self.table.add_column(first, no_wrap=True)
        for name in figures:
            self.table.add_column(name, no_wrap=True, justify="left" if name == "status" else "right")
        for name in self._names:  # spaces, so that a long name takes two or three short lines
            self.table.add_column(Text(name.replace("_", " ")), max_width=2 * _PARAMETER_WIDTH, overflow="fold")
        if len(names) > len(self._names):
            self.table.add_column(f"+{len(names) - len(self._names)}", no_wrap=True)

    def add(self, trial: Text, figures: tuple[str | Text, ...], params: dict[str, Any]) -> None:
        cells = [number(params[name]) if name in params else "-" for name in self._names]
        self.table.add_row(trial, *figures, *(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))


def _marked(trial: str, baseline: bool) -> Text:
    return Text(trial).append(" baseline", style="magenta") if baseline else Text(trial)


def _is_baseline(trial: str, progress: Progress) -> bool:
    if trial in progress.running:
        return progress.running[trial].baseline
    return bool(progress.finished[trial].get("baseline"))


def _finished_line(record: dict[str, Any], progress: Progress, end: str) -> str:
    parts = [f"{record['trial']}{' (baseline)' if record.get('baseline') else ''} {end}"]
    if record.get("value") is not None:
        value = number(record.get("values") or record["value"])
        at = "over its folds" if "folds" in record else f"at epoch {record.get('best_epoch')}"
        parts.append(f"{progress.run.metric} {value} {at}")
    if not records.is_feasible(record):
        parts.append(records.beyond(record["violations"]))
    unit = "fold" if "folds" in record else "epoch"
    parts.append(f"{record.get('epochs') or 0} {unit}s in {duration(record.get('seconds') or 0.0)}")
    if record.get("params"):
        parts.append(parameters(record["params"]))
    if record.get("replayed_from"):
        parts.append(f"read off {record['replayed_from']}")
    if record.get("reason"):
        parts.append(" ".join(str(record["reason"]).split()))
    return f"[{of_asked(progress)}] " + "; ".join(parts)


def _closing_line(state: str, progress: Progress, seconds: float) -> str:
    best = progress.best()
    nearest = records.nearest(progress.finished.values())
    ending = records.none_feasible(nearest) if nearest else "no trial has a value"
    if best and not nearest:
        ending = f"best {progress.run.metric} {number(best[1])} by {best[0]}"
    counts = Counter(record["status"] for record in progress.finished.values())
    trials = ", ".join(f"{counts[status]} {words(status)}" for status in STATUSES)
    if progress.running:
        trials += f", {len(progress.running)} unfinished"
    took = duration(progress.seconds_before + seconds)
    return f"{progress.run.stage} {progress.run.name} {state} after {took}: {trials}; {ending}"
