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
WIDTHS = {"trunk": 1.25, "decoder": 1.35, "segmentation": 0.85, "decision": 1.2}
TITLES = {
    "trunk": "trunk, runs down",
    "decoder": "decoder, runs up",
    "segmentation": "segmentation",
    "decision": "decision, runs down",
}

_BAR, _STEP, _GAP = 0.23, 0.28, 0.22
"""inches: height of a bar, from one bar to the next, between rows"""
_LEFT, _TOP, _SPACE = 0.9, 0.45, 0.3
"""inches: margin for the sizes, for the titles, between columns"""

_CUT = 4
"""px by which an up-convolution's output may be larger than what is kept of it"""

Size = tuple[int, int]
Cell = tuple[Size, str]


def draw(stages: list[Json]) -> Any:
    """A figure as wide as the page and as high as the network needs."""
    columns = [branch for branch in COLUMNS if any(stage["branch"] == branch for stage in stages)]
    sizes = row_sizes(stages)
    cells: dict[Cell, list[int]] = defaultdict(list)
    for k, stage in enumerate(stages):
        cells[sizes[k], stage["branch"]].append(k)
    rows = sorted(set(sizes), key=lambda size: size[0] * size[1], reverse=True)
    counts = {size: max(len(cells[size, branch]) for branch in columns) for size in rows}
    height = _TOP + sum(count * _STEP + _GAP for count in counts.values()) + 0.1
    figure = Figure(figsize=(style.FULL, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, style.FULL), ylim=(height, 0))
    axes.set_axis_off()
    left, width = _columns(columns)
    tops = _tops(cells, counts)
    _draw_frame(axes, counts, left)
    _draw_flow(axes, stages, sizes, tops, left, width)
    most = max(stage["channels"] for stage in stages)
    for k, stage in enumerate(stages):
        branch = stage["branch"]
        _draw_stage(axes, stage, left[branch], tops[k], width[branch], most)
    return figure


def row_sizes(stages: list[Json]) -> list[Size]:
    """The row in which each stage stands: the size of its map, but

    an up-convolution, which puts out some px more than are kept, goes to the size that they are cut to, and a gate,
    whose output is one number a channel, stays with the stage before it.
    """
    trunk = [(stage["height"], stage["width"]) for stage in stages if stage["branch"] == "trunk"]
    rows: list[Size] = []
    for k, stage in enumerate(stages):
        size = stage["height"], stage["width"]
        if stage["branch"] == "decoder":
            if size == (1, 1) and k:
                size = rows[-1]
            near = [row for row in trunk if max(abs(row[0] - size[0]), abs(row[1] - size[1])) <= _CUT]
            size = near[0] if near else size
        rows.append(size)
    return rows


def _columns(columns: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Left edge and width of each branch."""
    room = style.FULL - _LEFT - _SPACE * len(columns)
    share = sum(WIDTHS[branch] for branch in columns)
    width = {branch: room * WIDTHS[branch] / share for branch in columns}
    left, x = {}, _LEFT
    for branch in columns:
        left[branch] = x
        x += width[branch] + _SPACE
    return left, width


def _tops(cells: dict[Cell, list[int]], counts: dict[Size, int]) -> dict[int, float]:
    """Upper edge of each stage's bar. In the decoder the first stage of a row stands lowest."""
    tops: dict[int, float] = {}
    top = _TOP
    for size, count in counts.items():
        for (cell, branch), members in cells.items():
            if cell == size:
                upwards = branch == "decoder"
                tops |= {k: top + place * _STEP for place, k in enumerate(members[::-1] if upwards else members)}
        top += count * _STEP + _GAP
    return tops


def _draw_frame(axes: Any, counts: dict[Size, int], left: dict[str, float]) -> None:
    """Titles of the columns; a rule and the size for each row."""
    for branch, x in left.items():
        axes.text(x, 0.2, TITLES[branch], fontsize=9.5, fontweight="bold", color=style.INK, va="center")
    top = _TOP
    for (height, width), count in counts.items():
        axes.plot([0.1, style.FULL - 0.1], [top - _GAP / 2] * 2, color=style.RULE, linewidth=0.8, zorder=0.4)
        axes.text(0.12, top + _BAR / 2, f"{height} x {width}", fontsize=8, color=style.MUTED, va="center")
        top += count * _STEP + _GAP


def _draw_stage(axes: Any, stage: Json, x: float, y: float, width: float, most: int) -> None:
    colour = COLOURS[stage["branch"]]
    shape = "round,pad=0,rounding_size=0.04"
    axes.add_patch(FancyBboxPatch((x, y), width, _BAR, boxstyle=shape, facecolor="#f4f6f8", edgecolor="none"))
    share = np.log2(stage["channels"] + 1) / np.log2(most + 1)
    axes.add_patch(
        FancyBboxPatch((x, y), width * share, _BAR, boxstyle=shape, facecolor=colour, alpha=0.28, edgecolor="none")
    )
    axes.add_patch(Rectangle((x, y), 0.035, _BAR, facecolor=colour, edgecolor="none"))
    weights = f", {words.parameters(stage['parameters'])}" if stage["parameters"] else ""
    sums = f"{stage['channels']} ch{weights}"
    middle = y + _BAR / 2 + 0.005
    # A letter of DejaVu Sans at 7 pt is about 0.055 inches wide.
    room = int((width - 0.2) / 0.0555) - len(sums) - 1
    title = style.drawable(stage["operation"])
    title = title if len(title) <= max(room, 8) else title[: max(room, 8) - 1].rstrip(" ,") + "…"
    axes.text(x + 0.08, middle, title, fontsize=7, va="center")
    axes.text(x + width - 0.05, middle, sums, fontsize=7, va="center", ha="right", color=style.MUTED)


def _draw_flow(
    axes: Any,
    stages: list[Json],
    sizes: list[Size],
    tops: dict[int, float],
    left: dict[str, float],
    width: dict[str, float],
) -> None:
    """Dotted arrows for the skips from trunk to decoder; lines from the end of a branch to where the next begins."""
    members: dict[str, list[int]] = defaultdict(list)
    for k, stage in enumerate(stages):
        members[stage["branch"]].append(k)

    def connect(start: int, end: int, line: str) -> None:
        a, b = stages[start]["branch"], stages[end]["branch"]
        # An arrow to the decision leaves at the lower corner, to pass below what stands between.
        leave = _BAR if b == "decision" else _BAR / 2
        _arrow(axes, (left[a] + width[a], tops[start] + leave), (left[b], tops[end] + _BAR / 2), line)

    trunk, decoder = members["trunk"], members["decoder"]
    for source in {sizes[k]: k for k in trunk[:-1]}.values():
        # The skip enters at the first stage that has just its size: its own 1x1, or the convolution after the join.
        size = stages[source]["height"], stages[source]["width"]
        targets = [k for k in decoder if (stages[k]["height"], stages[k]["width"]) == size]
        if targets:
            connect(source, targets[0], ":")
    end = trunk[-1] if trunk else 0
    if decoder:
        connect(end, next((k for k in decoder if stages[k]["operation"].startswith("up")), decoder[0]), "-")
    if members["segmentation"]:
        connect(decoder[-1] if decoder else end, members["segmentation"][0], "-")
    if members["decision"]:
        connect(end, members["decision"][0], "-")


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], line: str) -> None:
    look: dict[str, Any] = {
        "color": style.MUTED,
        "linewidth": 0.9,
        "linestyle": line,
        "shrinkA": 1,
        "shrinkB": 1,
        "zorder": 0.5,
    }
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=7, **look))
