"""Figures of several searches in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.arrays import Array
from tuner import records
from tuner.report import style, words
from tuner.report.inputs import Run
from tuner.report.search_charts import time_unit
from tuner.report.tables import ended, objective

_COLOURS = (style.BLUE, style.RED, style.GREEN, style.PURPLE, style.ORANGE, style.SKY, style.INK)
_LINES = ("-", "--", ":")


def _look(n: int) -> dict[str, Any]:
    """A colour and a line that no other of 21 searches has."""
    return {"color": _COLOURS[n % len(_COLOURS)], "linestyle": _LINES[n // len(_COLOURS) % len(_LINES)]}


def best_by_device_time(named: Sequence[tuple[str, Run]]) -> Any:
    """Best completed trial so far against the device time spent, a line a search."""
    figure, axes = style.panel()
    spent = [sum(record["device_seconds"] or 0 for record in run.records) for _, run in named]
    unit, unit_name = time_unit(max(spent, default=0))
    for n, (name, run) in enumerate(named):
        sign = 1 if run.objectives[0].get("mode", "max") == "max" else -1
        time, best = 0.0, -np.inf
        points = []
        for record in sorted(run.records, key=lambda r: ended(r) or 0):
            time += record["device_seconds"] or 0
            value = objective(record)
            if record["status"] == "completed" and value is not None and records.is_feasible(record):
                best = max(best, sign * value)
                points.append((time / unit, sign * best))
        if points:
            points.append((spent[n] / unit, points[-1][1]))
            axes.step(
                *zip(*points, strict=True), where="post", label=words.shorten(style.drawable(name), 28), **_look(n)
            )
            axes.plot(*points[0], ".", color=_look(n)["color"])
    axes.set_xlim(0, None)
    axes.set_xlabel(f"time on devices ({unit_name})")
    metrics = dict.fromkeys(words.metric(run.objectives[0]["metric"]) for _, run in named)
    axes.set_ylabel(" / ".join(metrics) + ", validation")
    style.legend(axes, columns=2)
    return figure


def dice_shares(named: Sequence[tuple[str, Array]]) -> Any:
    """Distribution function of the Dice of images, a line a search."""
    figure, axes = style.panel()
    for n, (name, dice_N) in enumerate(named):
        axes.ecdf(dice_N, label=words.shorten(style.drawable(name), 28), **_look(n))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Dice of an image", ylabel="share of positive test images")
    style.legend(axes, columns=2)
    return figure
