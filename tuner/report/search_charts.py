"""Figures of how the search went."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tuner import records
from tuner.report import style, words
from tuner.report.inputs import Json, Run
from tuner.report.style import FULL, THIRD
from tuner.report.tables import STATUSES, ended, objective

_DAY, _HOUR, _MINUTE = 86_400, 3600, 60


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit in which a time of this size has one to three digits."""
    for size, name in ((2 * _DAY, "days"), (2 * _HOUR, "hours"), (2 * _MINUTE, "minutes")):
        if seconds >= size:
            return size / 2, name
    return 1, "seconds"


PROGRESS = {
    "number": "number of the trial",
    "time": "time since the search began",
    "devices": "time on devices, all trials together",
}


def progress(run: Run) -> Any:
    """Value of each trial, and the best of the completed ones so far, by number, against time and device time."""
    figure = Figure(figsize=(FULL, 3.7), layout="constrained")
    panels = figure.subplots(1, len(PROGRESS), sharey=True)
    for axes, against in zip(panels, PROGRESS, strict=True):
        found = places(run, against)
        unit, unit_name = time_unit(max(found.values(), default=0)) if against != "number" else (1, "")
        placed = sorted(
            ((found[r["trial"]] / unit, r) for r in run.records if r["trial"] in found), key=lambda pair: pair[0]
        )
        for status in reversed(STATUSES):
            _status_points(axes, placed, status)
        _best_so_far(axes, placed, run.objectives[0].get("mode", "max"))
        _baseline_line(axes, run)
        axes.set_xlabel(PROGRESS[against] + (f" ({unit_name})" if unit_name else ""))
        if against == "number":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if x >= 0 else ""))
        else:
            axes.set_xlim(0, None)
    panels[0].set_ylabel(words.metric(run.objectives[0]["metric"]) + ", validation")
    figure.legend(handles=_legend_handles(run), loc="outside upper left", ncols=6)
    return figure


def places(run: Run, against: str) -> dict[str, float]:
    """Where trials stand, by name: their number, or when they ended, in seconds of the search or of its devices.

    A result that was read off another's network is known when that one has ended. A baseline outside the space, which
    has no number, runs before number 0.
    """
    if against == "number":
        return {r["trial"]: -1.0 if r["number"] is None else float(r["number"]) for r in run.records}
    ends = {record["trial"]: end for record in run.records if (end := ended(record)) is not None}
    if against == "devices":
        spent = {record["trial"]: record["device_seconds"] or 0.0 for record in run.records}
        order = sorted(ends, key=lambda trial: ends[trial])
        ends = dict(zip(order, np.cumsum([spent[trial] for trial in order]).tolist(), strict=True))
    replays = [r for r in run.records if r["replayed_from"] in ends and ended(r) is None]
    return ends | {record["trial"]: ends[record["replayed_from"]] for record in replays}


def winner_record(run: Run) -> Json | None:
    """The winner's record; of a repeat, which has none, the record that it repeats."""
    return run.history_record()[0]


def _status_points(axes: Any, placed: Sequence[tuple[float, Json]], status: str) -> None:
    """Trials without a value stand on the lower edge."""
    look = _marker(status, len(placed))
    mine = [(x, objective(record)) for x, record in placed if record["status"] == status]
    valued = [(x, y) for x, y in mine if y is not None]
    if valued:
        axes.plot(*zip(*valued, strict=True), zorder=3, **look)
    without = [x for x, y in mine if y is None]
    if without:
        on_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
        axes.plot(without, [0.0] * len(without), **on_edge, **look)[0].set_in_layout(False)


def _marker(status: str, trials: int = 0) -> dict[str, Any]:
    """Smaller where there are many trials."""
    colour = style.STATUS[status]
    size = 1.0 if trials <= 60 else 0.75 if trials <= 300 else 0.5
    if status in ("diverged", "failed"):
        return {
            "linestyle": "",
            "marker": "x" if status == "diverged" else "+",
            "color": colour,
            "markeredgewidth": 1.6 * size,
            "markersize": 6 * size,
        }
    return {
        "linestyle": "",
        "marker": "o",
        "color": colour,
        "markerfacecolor": colour if status == "completed" else "white",
        "markeredgewidth": 1.2 * size,
        "markersize": 4.5 * size,
    }


def _best_so_far(axes: Any, placed: Sequence[tuple[float, Json]], mode: str) -> None:
    done = [
        (x, y)
        for x, record in placed
        if record["status"] == "completed" and records.is_feasible(record) and (y := objective(record)) is not None
    ]
    if not done:
        return
    values = np.array([value for _, value in done])
    best = np.maximum.accumulate(values) if mode == "max" else np.minimum.accumulate(values)
    end = max(place for place, _ in placed)
    axes.step(
        [*(place for place, _ in done), end], [*best, best[-1]], where="post", color=style.INK, linewidth=1.2, zorder=2
    )


def _baseline_line(axes: Any, run: Run) -> None:
    for record in run.records:
        value = objective(record)
        if record["baseline"] and value is not None:
            axes.axhline(value, color=style.BASELINE, linewidth=1.2, linestyle="--", zorder=1)


def _legend_handles(run: Run) -> list[Any]:
    present = {record["status"] for record in run.records}
    handles = [Line2D([], [], color=style.INK, linewidth=1.2, label="best so far")]
    if any(record["baseline"] and objective(record) is not None for record in run.records):
        handles.append(Line2D([], [], color=style.BASELINE, linewidth=1.2, linestyle="--", label="baseline"))
    return handles + [
        Line2D([], [], label=words.STATUS_NAMES[status], **_marker(status)) for status in STATUSES if status in present
    ]


def front(run: Run, points: Sequence[Json]) -> Any:
    """Figure against cost of the completed trials; the Pareto front is a line whose points carry the trial's number."""
    figure, axes = style.panel(FULL, 3.8)
    for feasible, label in ((True, "completed"), (False, "does not meet the constraints")):
        mine = [r["values"] for r in run.records if r["status"] == "completed" and r.get("values")
                and records.is_feasible(r) is feasible]  # fmt: skip
        if mine:
            colour = style.BLUE if feasible else style.ORANGE
            axes.plot([c for _, c in mine], [v for v, _ in mine], "o" if feasible else "x", color=colour, label=label)
    if points:
        values, costs = zip(*(point["values"] for point in points), strict=True)
        axes.step(costs, values, where="post", color=style.INK, linewidth=1.2, zorder=2, label="Pareto front")
        axes.plot(costs, values, "o", markersize=8, markerfacecolor="none", color=style.INK)
    for point in points:
        name = point["trial"].rpartition("-")[2]
        axes.annotate(name, point["values"][::-1], (4, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(words.metric(run.objectives[1]["metric"]))
    axes.set_ylabel(words.metric(run.objectives[0]["metric"]) + ", validation")
    axes.margins(x=0.08, y=0.12)
    style.legend(axes)
    return figure


def parameter_slice(run: Run, name: str) -> Any | None:
    """Value of each trial against one searched parameter; None where no trial with a value has it."""
    parameter = run.searched[name]
    trials = [r for r in run.records if objective(r) is not None and r["params"].get(name) is not None]
    if not trials:
        return None
    figure, axes = style.panel(THIRD, 2.9)
    categories = _categories(parameter, trials, name)
    for status in ("stopped_early", "completed"):
        mine = [r for r in trials if r["status"] == status]
        x = [_position(r["params"][name], categories, r["number"] or 0) for r in mine]
        axes.plot(x, [objective(r) for r in mine], zorder=3, alpha=0.85, **_marker(status, len(trials)))
    best = winner_record(run)
    if best in trials:
        place = _position(best["params"][name], categories, best["number"] or 0)
        axes.plot([place], [objective(best)], "o", markersize=9, markerfacecolor="none", color=style.INK, zorder=4)
    if categories:
        axes.set_xticks(range(len(categories)), [_broken(words.setting(c)) for c in categories])
        axes.set_xlim(-0.5, len(categories) - 0.5)
        axes.grid(False, axis="x")
    elif parameter.get("log"):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if parameter["high"] / parameter["low"] < 100:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif parameter.get("type") == "int":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(name)
    axes.set_ylabel(words.metric(run.objectives[0]["metric"]))
    return figure


def _categories(parameter: Json, trials: Sequence[Json], name: str) -> list[Any]:
    if "choices" not in parameter:
        return []
    choices = list(parameter["choices"])
    return choices + [v for v in dict.fromkeys(r["params"][name] for r in trials) if v not in choices]


def _position(value: Any, categories: list[Any], number: int) -> float:
    """Where a value stands; categories are spread a little, by the golden ratio, so that points stay apart."""
    if not categories:
        return float(value)
    return categories.index(value) + 0.36 * ((number * 0.618) % 1 - 0.5)


def _broken(label: str) -> str:
    return "\n".join(textwrap.wrap(label.replace("_", "_ "), 12)).replace("_ ", "_") if len(label) > 9 else label


def timeline(run: Run) -> Any | None:
    """From each trial's first start to its end; None where no trial says."""
    timed = sorted((r for r in run.records if ended(r) is not None), key=lambda r: (r["started"], r["trial"]))
    if not timed:
        return None
    unit, unit_name = time_unit(max(ended(r) or 0 for r in timed))
    height = min(1.1 + 0.12 * len(timed), 6)
    figure, axes = style.panel(FULL, height)
    axes.barh(
        range(len(timed)),
        [((ended(r) or 0.0) - r["started"]) / unit for r in timed],
        left=[r["started"] / unit for r in timed],
        color=[style.STATUS[r["status"]] for r in timed],
        height=0.75,
    )
    axes.set(
        ylim=(len(timed) - 0.4, -0.6), ylabel="trials, by start", xlabel=f"time since the search began ({unit_name})"
    )
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.set_xlim(0, None)
    present = {record["status"] for record in timed}
    patches = [Patch(color=style.STATUS[s], label=words.STATUS_NAMES[s]) for s in STATUSES if s in present]
    style.legend(axes, columns=4, handles=patches)
    return figure
