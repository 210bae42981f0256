"""Draws a network: a column a branch, a row a size of map, a bar a stage, its colour as long as it has channels.

The trunk runs down its column; the decoder beside it runs up, so that maps of one size, which a skip joins, stand in
one row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from tuner.report import style, words
from tuner.report.inputs import Json

COLUMNS = ("trunk", "decoder", "segmentation", "decision")
COLOURS = {"trunk": style.BLUE, "decoder": style.GREEN, "segmentation": style.SKY, "decision": style.ORANGE}
TITLES = {
    "trunk": "trunk, runs down",
    "decoder": "decoder, runs up",
    "segmentation": "segmentation",
    "decision": "decision, runs down",
}

_BAR, _STEP, _GAP = 0.23, 0.28, 0.22
"""inches: height of a bar, from one bar to the next, between rows"""
_LEFT, _TOP, _SPACE = 0.95, 0.45, 0.42
"""inches: margin for the sizes, for the titles, between columns"""

Cell = tuple[tuple[int, int], str]


def draw(stages: list[Json]) -> Any:
    """A figure as wide as the page and as high as the network needs."""
    columns = [branch for branch in COLUMNS if any(stage["branch"] == branch for stage in stages)]
    cells: dict[Cell, list[Json]] = defaultdict(list)
    for stage in stages:
        cells[(stage["height"], stage["width"]), stage["branch"]].append(stage)
    sizes = sorted({size for size, _ in cells}, key=lambda size: size[0] * size[1], reverse=True)
    rows = {size: max(len(cells[size, branch]) for branch in columns) for size in sizes}
    height = _TOP + sum(count * _STEP + _GAP for count in rows.values()) + 0.1
    figure = Figure(figsize=(style.FULL, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, style.FULL), ylim=(height, 0))
    axes.set_axis_off()
    width = (style.FULL - _LEFT - _SPACE * len(columns)) / len(columns)
    left = {branch: _LEFT + k * (width + _SPACE) for k, branch in enumerate(columns)}
    places = _places(cells, sizes, rows, columns)
    _draw_frame(axes, sizes, rows, left)
    _draw_flow(axes, stages, places, left, width)
    most = max(stage["channels"] for stage in stages)
    for stage in stages:
        _draw_stage(axes, stage, left[stage["branch"]], places[id(stage)], width, most)
    return figure


def _places(
    cells: dict[Cell, list[Json]], sizes: list[tuple[int, int]], rows: dict[tuple[int, int], int], columns: list[str]
) -> dict[int, float]:
    """Upper edge of each stage's bar. In the decoder the first stage of a row stands lowest."""
    places = {}
    top = _TOP
    for size in sizes:
        for branch in columns:
            members = cells[size, branch]
            if branch == "decoder":
                members = [*reversed(members)]
            for k, stage in enumerate(members):
                places[id(stage)] = top + k * _STEP
        top += rows[size] * _STEP + _GAP
    return places


def _draw_frame(
    axes: Any, sizes: list[tuple[int, int]], rows: dict[tuple[int, int], int], left: dict[str, float]
) -> None:
    """Titles of the columns; a rule and the size for each row."""
    for branch, x in left.items():
        axes.text(x, 0.2, TITLES[branch], fontsize=9.5, fontweight="bold", color=style.INK, va="center")
    top = _TOP
    for size in sizes:
        axes.plot([0.1, style.FULL - 0.1], [top - _GAP / 2] * 2, color=style.RULE, linewidth=0.8)
        axes.text(0.12, top + _BAR / 2, f"{size[0]} x {size[1]}", fontsize=8, color=style.MUTED, va="center")
        top += rows[size] * _STEP + _GAP


def _draw_stage(axes: Any, stage: Json, x: float, y: float, width: float, most: int) -> None:
    colour = COLOURS[stage["branch"]]
    shape = f"round,pad=0,rounding_size={0.04}"
    axes.add_patch(FancyBboxPatch((x, y), width, _BAR, boxstyle=shape, facecolor="#f4f6f8", edgecolor="none"))
    share = np.log2(stage["channels"] + 1) / np.log2(most + 1)
    axes.add_patch(
        FancyBboxPatch((x, y), width * share, _BAR, boxstyle=shape, facecolor=colour, alpha=0.28, edgecolor="none")
    )
    axes.add_patch(Rectangle((x, y), 0.035, _BAR, facecolor=colour, edgecolor="none"))
    weights = f", {words.parameters(stage['parameters'])}" if stage["parameters"] else ""
    sums = f"{stage['channels']} ch{weights}"
    middle = y + _BAR / 2 + 0.005
    # A letter of DejaVu Sans at 7 pt is about 0.056 inches wide.
    room = int((width - 0.2) / 0.057) - len(sums) - 1
    title = words.shorten(style.drawable(stage["operation"]), max(room, 8))
    axes.text(x + 0.08, middle, title, fontsize=7, va="center")
    axes.text(x + width - 0.05, middle, sums, fontsize=7, va="center", ha="right", color=style.MUTED)


def _draw_flow(axes: Any, stages: list[Json], places: dict[int, float], left: dict[str, float], width: float) -> None:
    """Dotted lines join maps of one size in trunk and decoder; arrows lead from a branch to the next."""
    ends: dict[str, list[Json]] = defaultdict(list)
    for stage in stages:
        ends[stage["branch"]].append(stage)
    if "decoder" in left and "trunk" in left:
        for stage in _last_of_each_size(ends["trunk"])[:-1]:
            partners = [s for s in ends["decoder"] if _size(s) == _size(stage)]
            if partners:
                start = (left["trunk"] + width, places[id(stage)] + _BAR / 2)
                end = (left["decoder"], places[id(partners[0])] + _BAR / 2)
                _arrow(axes, start, end, ":")
    source = ends["trunk"][-1] if ends["trunk"] else stages[0]
    for branch in ("decoder", "segmentation"):
        if branch in left:
            start = (left[source["branch"]] + width, places[id(source)] + _BAR / 2)
            target = ends[branch][0]
            _arrow(axes, start, (left[branch], places[id(target)] + _BAR / 2), "-")
            source = ends[branch][-1]


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], line: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=7,
            color=style.MUTED,
            linewidth=0.9,
            linestyle=line,
            shrinkA=1,
            shrinkB=1,
        )
    )


def _size(stage: Json) -> tuple[int, int]:
    return stage["height"], stage["width"]


def _last_of_each_size(stages: list[Json]) -> list[Json]:
    return list({_size(stage): stage for stage in stages}.values())
