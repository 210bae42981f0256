"""Figures that show every trial at once: learning curves with rungs, parallel coordinates, importance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from model.arrays import Floats
from tuner.report import style, words
from tuner.report.inputs import EvaluatedRun, Json, Run
from tuner.report.style import FULL
from tuner.report.tables import STATUSES, objective
from tuner.space import SEGMENTATION_METRICS

MAX_AXES = 12
"""parameters side by side"""

_NOT_SET = -0.13
"""where a parameter that does not apply stands, below its axis"""

_BELOW = -0.06
"""where values stand that a logarithmic axis cannot hold: a baseline outside the space may have 0"""

_COLOURS = "viridis"

_MOST_CHANCE = 1.5
"""how far the axis of importance goes on beyond 1, for the marks of luck"""


def curve(record: Json) -> dict[int, float]:
    """The figure that schedulers compare, by epoch; of older records the objective."""
    found = {row["epoch"]: row.get("compared", row.get("value", row.get("dice_mean"))) for row in record["history"]}
    return {epoch: float(value) for epoch, value in found.items() if value is not None}


def learning_curves(run: Run, rungs: Sequence[Json], winner: Json | None) -> Any | None:
    """Of all trials that were trained; None where no record has a history. `rungs` as of
    `tuner.report.search_tables.rungs`."""
    trained = [(record, curve(record)) for record in run.records if not record["replayed_from"]]
    trained = [(record, found) for record, found in trained if found]
    if not trained:
        return None
    figure, axes = style.panel(FULL, 4.4)
    thin = len(trained) > 100
    for status in ("stopped_early", "failed", "diverged", "completed"):
        mine = [found for record, found in trained if record["status"] == status and not record["baseline"]]
        if not mine:
            continue
        colour = style.STATUS[status]
        width = (0.7 if thin else 1.2) if status == "completed" else 0.6 if thin else 0.9
        lines = LineCollection(
            [list(found.items()) for found in mine], colors=colour, linewidths=width, alpha=0.55 if thin else 0.85
        )
        lines.set_zorder(3 if status == "completed" else 2)
        axes.add_collection(lines)
        ends = np.array([[max(found), found[max(found)]] for found in mine])
        marker = {"completed": "o", "stopped_early": "o", "diverged": "x", "failed": "+"}[status]
        size = (2 if thin else 3) if marker == "o" else 5
        axes.plot(*ends.T, marker, color=colour, markersize=size, zorder=4)
    handles = [
        Line2D([], [], color=style.STATUS[s], label=words.STATUS_NAMES[s])
        for s in STATUSES
        if any(record["status"] == s and not record["baseline"] for record, _ in trained)
    ]
    for record, found in trained:
        is_winner = winner is not None and record["trial"] == winner["trial"]
        if record["baseline"] or is_winner:
            look = {"linestyle": "--" if record["baseline"] else "-", "color": style.INK if is_winner else style.MUTED}
            best = "winner" if isinstance(run, EvaluatedRun) else "best trial"
            label = f"{best}, the baseline" if is_winner and record["baseline"] else best if is_winner else "baseline"
            handles += axes.plot([*found], [*found.values()], linewidth=1.8, zorder=5, label=label, **look)
    for rung in rungs:
        axes.axvline(rung["epoch"], color=style.MUTED, linewidth=0.9, linestyle=":", zorder=1)
        text = f"{run.unit} {rung['epoch']}\n{rung['went_on']:,} of {rung['reached']:,} go on"
        axes.annotate(text, (rung["epoch"], 0), (3, 3), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                      fontsize=7.5, color=style.MUTED, va="bottom")  # fmt: skip
    axes.autoscale_view()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(f"{run.unit}s done" if run.folds else run.unit)
    axes.set_ylabel(compared_name(run))
    style.legend(axes, columns=6, handles=handles)
    return figure


def compared_name(run: Run) -> str:
    """What schedulers compare, in words."""
    metric = words.metric(run.objectives[0]["metric"])
    scheduler = run.space.get("scheduler")
    is_of_masks = isinstance(scheduler, dict) and scheduler.get("compare") == "segmentation"
    if is_of_masks and run.objectives[0]["metric"] not in SEGMENTATION_METRICS:
        metric = words.metric("dice_mean")
    return f"{metric}, validation"


def setting_of(record: Json, name: str) -> Any:
    """What a trial had for a searched parameter; None where it did not apply. A baseline outside the space has no
    parameters, and is described by its fields."""
    return record["config"].get(name) if record["number"] is None else record["params"].get(name)


def importance(found: Json) -> Any:
    """Bars with standard errors, and what luck alone reaches."""
    rows = found["parameters"][::-1]
    figure, axes = style.panel(FULL, 1.0 + 0.32 * len(rows))
    share = np.array([row["importance"] for row in rows])
    low, high = np.array([row["ci90"] for row in rows]).T
    colours = [style.BLUE if is_clear(row) else style.BASELINE for row in rows]
    places = np.arange(len(rows))
    axes.barh(places, share, color=colours, height=0.62)
    axes.errorbar(
        share, places, xerr=[share - low, high - share], fmt="none", ecolor=style.INK, elinewidth=1, capsize=2.5
    )
    chance = np.array([row["chance"] for row in rows])
    end = max(1.0, min(1.03 * float(chance.max()), _MOST_CHANCE))
    beyond = chance > end
    mark = {"color": style.RED, "linestyle": "", "zorder": 4}
    axes.plot(chance[~beyond], places[~beyond], "|", markersize=13, markeredgewidth=2, **mark)
    axes.plot(np.full(beyond.sum(), end), places[beyond], ">", markersize=7, clip_on=False, **mark)
    for value, place in zip(chance[beyond], places[beyond], strict=True):
        axes.annotate(f"{value:.2g}", (end, place), (-8, 0), textcoords="offset points", ha="right", va="center",
                      fontsize=7.5, color=style.RED)  # fmt: skip
    axes.set_yticks(places, [style.drawable(row["name"]) for row in rows])
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.grid(False, axis="y")
    axes.set_xlim(0, end)
    axes.set_xlabel("share of the importance")
    handles = [
        Line2D([], [], color=style.BLUE, linewidth=6, label="clear of luck"),
        Line2D([], [], color=style.BASELINE, linewidth=6, label="not to be told from luck"),
        Line2D([], [], color=style.INK, linewidth=1, label="90 % interval"),
        Line2D([], [], color=style.RED, marker="|", markersize=10, markeredgewidth=2, linestyle="",
               label="what luck alone reaches"),
    ]  # fmt: skip
    style.legend(axes, columns=4, handles=handles)
    return figure


def is_clear(row: Json) -> bool:
    """Whether an importance is beyond what luck alone reaches."""
    return bool(row["importance"] > row["chance"])


def parallel(run: Run, winner: Json | None) -> Any | None:
    """A line a trial through its parameters to its value; None where no trial has one, or nothing was searched."""
    names = list(run.searched)[:MAX_AXES]
    trials = [r for r in run.records if objective(r) is not None]
    if not trials or not names:
        return None
    values = np.array([objective(r) for r in trials], float)
    low, high = values.min(), values.max()
    pad = (high - low) * 0.04 or 0.01
    axis_of = {name: _Axis(run.searched[name], [setting_of(r, name) for r in trials]) for name in names}
    height_of = [(v - low + pad) / (high - low + 2 * pad) for v in (low, high)]
    figure, axes = style.panel(FULL, 4.6)
    places = np.arange(len(names) + 1)
    lines = {}
    for record, value in zip(trials, values, strict=True):
        heights = [axis_of[name].height(setting_of(record, name), record["number"] or 0) for name in names]
        lines[record["trial"]] = np.column_stack([places, [*heights, (value - low + pad) / (high - low + 2 * pad)]])
    done = [(r, v) for r, v in zip(trials, values, strict=True) if r["status"] == "completed"]
    stopped = [r for r in trials if r["status"] != "completed"]
    many = len(trials) > 100
    axes.add_collection(
        LineCollection([lines[r["trial"]] for r in stopped], colors="#b4bcc4", linewidths=0.5 if many else 0.8,
                       alpha=0.5 if many else 0.8, zorder=1)
    )  # fmt: skip
    if done:
        ordered = sorted(done, key=lambda pair: pair[1] if _is_max(run) else -pair[1])
        scale = Normalize(min(v for _, v in done), max(v for _, v in done))
        collection = LineCollection([lines[r["trial"]] for r, _ in ordered], cmap=_COLOURS, norm=scale,
                                    linewidths=1.1 if len(done) > 100 else 1.9, alpha=0.85, zorder=3)  # fmt: skip
        collection.set_array(np.array([v for _, v in ordered]))
        axes.add_collection(collection)
    if len({value for _, value in done}) > 1:
        bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=axes, pad=0.015, aspect=32, fraction=0.03)
        bar.outline.set_visible(False)
        bar.set_label(f"{words.metric(run.objectives[0]['metric'])}, completed trials", color=style.INK)
    if winner is not None and winner["trial"] in lines:
        line = lines[winner["trial"]]
        axes.plot(*line.T, color="white", linewidth=5, zorder=4)
        axes.plot(*line.T, color=style.INK, linewidth=2.6, zorder=5)
    _dress(axes, axis_of, [low, high] if high > low else [low], height_of)
    metric = _broken(words.metric(run.objectives[0]["metric"]))
    axes.set_xticks(places, [*(_broken(name) for name in names), metric])
    axes.tick_params(axis="x", length=0, labelcolor=style.INK, pad=6)
    axes.xaxis.tick_top()
    return figure


def _is_max(run: Run) -> bool:
    return bool(run.objectives[0].get("mode", "max") == "max")


def _dress(axes: Any, axis_of: dict[str, _Axis], ends: list[float], heights: list[float]) -> None:
    """Axes and their ticks instead of matplotlib's."""
    every = axis_of.values()
    low = -0.2 if any(a.has_gaps for a in every) else -0.12 if any(a.below for a in every) else -0.05
    axes.set(xlim=(-0.35, len(axis_of) + 0.3), ylim=(low, 1.05))
    axes.set_yticks([])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    for place, axis in enumerate(axis_of.values()):
        ticks = [*axis.ticks, *([("not set", _NOT_SET)] if axis.has_gaps else [])]
        _axis(axes, place, ticks)
    _axis(axes, len(axis_of), [(f"{value:.3f}", at) for value, at in zip(ends, heights, strict=False)])


def _axis(axes: Any, place: int, ticks: Sequence[tuple[str, float]]) -> None:
    axes.plot([place, place], [0, 1], color=style.MUTED, linewidth=0.9, zorder=2)
    box = {"facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for label, height in ticks:
        axes.plot([place - 0.015, place + 0.015], [height, height], color=style.MUTED, linewidth=0.9, zorder=6)
        axes.annotate(label, (place, height), (-4, 0), textcoords="offset points", ha="right",
                      va="center", fontsize=7.5, color=style.INK, bbox=box, zorder=7)  # fmt: skip


class _Axis:
    """Where values of a parameter stand between 0 and 1, and what is written there."""

    def __init__(self, parameter: Json, values: Sequence[Any]) -> None:
        there = [value for value in values if value is not None]
        self.has_gaps = len(there) < len(values)
        self._log = bool(parameter.get("log"))
        self.below: list[float] = []
        """values that have no logarithm"""
        self.categories = list(parameter.get("choices", ()))
        if self.categories:
            self.categories += [v for v in dict.fromkeys(there) if v not in self.categories]
            count = len(self.categories)
            labels = [style.drawable(words.shorten(words.setting(choice), 20)) for choice in self.categories]
            self.ticks = [(_broken(label), (k + 0.5) / count) for k, label in enumerate(labels)]
            return
        if self._log:
            self.below = sorted({value for value in there if value <= 0})
        ends = [parameter["low"], parameter["high"], *(value for value in there if value not in self.below)]
        self._low, self._high = self._scaled(min(ends)), self._scaled(max(ends))
        shown = self._shown(int(parameter.get("step", 1)) if parameter.get("type") == "int" else None)
        self.ticks = [(f"{value:.3g}", self.height(value, 0)) for value in shown]
        if self.below:
            self.ticks.append((", ".join(f"{value:.3g}" for value in self.below), _BELOW))

    def _scaled(self, value: float) -> float:
        return float(np.log(value)) if self._log else float(value)

    def _shown(self, step: int | None) -> Floats:
        """Both ends, and round numbers between them where they leave room."""
        low, high = self._low, self._high
        if self._log:
            round_ones = 10.0 ** np.arange(np.ceil(low / np.log(10)), np.floor(high / np.log(10)) + 1)
            ends = np.exp([low, high])
        else:
            round_ones = np.array(MaxNLocator(4, integer=step is not None).tick_values(low, high))
            if step is not None and (high - low) / step <= 10:
                round_ones = np.arange(low, high, step)
            ends = np.array([low, high])
        room = 0.07
        between = [t for t in round_ones if low < self._scaled(t) < high]
        between = [t for t in between if room < self.height(t, 0) < 1 - room]
        return np.array([ends[0], *between, *([ends[1]] if high > low else [])])

    def height(self, value: Any, number: int) -> float:
        """Categories are spread a little, by the golden ratio, so that lines stay apart."""
        if value is None:
            return _NOT_SET
        if value in self.below:
            return _BELOW
        if self.categories:
            count = len(self.categories)
            return (self.categories.index(value) + 0.5 + 0.4 * ((number * 0.618) % 1 - 0.5)) / count
        return 0.5 if self._high == self._low else (self._scaled(value) - self._low) / (self._high - self._low)


def _broken(label: str) -> str:
    return "\n".join(textwrap.wrap(label.replace("_", "_ "), 12)).replace("_ ", "_") if len(label) > 9 else label
