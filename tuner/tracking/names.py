"""What the figures of a trial are called in W&B and in TensorBoard."""

from __future__ import annotations

import math
from typing import Any


def numbers(name: str, value: Any) -> dict[str, float]:
    """The finite numbers in a figure. None and NaN are left out: W&B would store a NaN as a string, and a chart
    cannot show either. The figures of two objectives get _1 and _2."""
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value, 1) for k, v in numbers(f"{name}_{i}", item).items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return {}
    return {name: value}


def chart_name(figure: str) -> str:
    """Where a figure of the history is shown; the part before the slash is the chart's section."""
    if figure == "epoch":
        return figure
    if figure.startswith("loss_"):
        return "loss/" + figure.removeprefix("loss_")
    return "val/" + ("objective" if figure == "value" else figure)


def history_row(figures: dict[str, Any]) -> dict[str, Any]:
    """A row of the history as charts get it."""
    return {k: v for name, value in figures.items() for k, v in numbers(chart_name(name), value).items()}
