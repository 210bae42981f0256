"""The part of the page on masks: what each number of them allows, and what the next ones would bring."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import MaxNLocator

from tuner import masks
from tuner.report import style, words
from tuner.report.gallery import Gallery, Pictures, Section, Table, Text
from tuner.report.inputs import Json, Run
from tuner.report.style import FULL
from tuner.space import MASK_COSTS, Labelling

_MOST_ROWS = 20


def figures(run: Run) -> Json | None:
    """What metrics.json says of masks; None where their number is neither a cost nor searched."""
    is_asked = run.objectives[-1]["metric"] in MASK_COSTS or "num_segmented" in run.searched
    if run.folds or not is_asked:  # each fold trains with other masks
        return None
    prices = run.space.get("labelling")
    labelling = Labelling(**prices) if prices else None
    return masks.annotation(run.records, run.data["train"], labelling, f"validation {_figure(run)}")


def section(run: Run, found: Json | None, gallery: Gallery) -> list[Section]:
    """One, or none where masks were no question or nothing has completed; `found` is what `figures` gave."""
    if found is None or not found["budgets"]:
        return []
    caption = (
        "A point is a completed training, a large one the best of its number of masks; triangles on the lower edge, if "
        "any, are those far below."
    )
    if found["points"]:
        caption += " A ring is the mean of the best third, which tells the curve."
    if found["curve"]:
        caption += (
            " The line is the fitted curve and the band its 95 % interval, for other trainings and other masks on the "
            "same validation images; right of the dotted line nothing was measured."
        )
    picture = gallery.figure(_chart(run, found), "annotation-curve", caption, "full")
    return [Section("masks", "Masks", [Text(found["sentence"]), Pictures([picture]), _table(run, found)])]


def _figure(run: Run) -> str:
    title = words.metric(run.objectives[0]["metric"])
    return title.replace(", all", " of all").replace(", positive", " of positive")


def _chart(run: Run, found: Json) -> Any:
    figure, axes = style.panel(FULL, 3.8)
    told = masks.trainings(run.records, run.data["train"]["segmented"])
    best = [row["best"] for row in found["budgets"]]
    shown = [one["value"] for one in (*best, *found["points"])] + [n for one in found["curve"] for n in one["ci95"]]
    floor = min(shown) - max(0.5 * (max(shown) - min(shown)), 0.02)
    for marker, low in (("o", False), ("v", True)):
        mine = [(one.masks, max(one.value, floor)) for one in told if (one.value < floor) == low]
        if mine:
            axes.plot(*zip(*mine, strict=True), marker, color=style.SKY, markersize=4, zorder=2,
                      clip_on=not low, label="_far below" if low else "training")  # fmt: skip
    axes.plot([one["masks"] for one in best], [one["value"] for one in best], "o", color=style.BLUE, markersize=6,
              zorder=3, label="best of its number of masks")  # fmt: skip
    if found["curve"]:
        places = [one["masks"] for one in found["curve"]]
        axes.fill_between(places, *zip(*(one["ci95"] for one in found["curve"]), strict=True), color=style.INK,
                          alpha=0.12, linewidth=0, zorder=1, label="95 % interval")  # fmt: skip
        axes.plot(places, [one["value"] for one in found["curve"]], color=style.INK, zorder=2, label="annotation curve")
        axes.axvline(found["next"]["from"], color=style.INK, linewidth=0.9, linestyle=":")
    if points := found["points"]:
        axes.plot([one["masks"] for one in points], [one["value"] for one in points], "o", color=style.INK,
                  markersize=8, markerfacecolor="none", zorder=4, label="mean of the best third")  # fmt: skip
    axes.set(xlabel=words.metric("num_segmented"), ylabel=words.metric(run.objectives[0]["metric"]) + ", validation")
    axes.margins(x=0.04)
    if any(one.value < floor for one in told):
        axes.set_ylim(bottom=floor)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style.legend(axes, columns=5)
    return figure


def _table(run: Run, found: Json) -> Table:
    """The best configuration a budget."""
    rows = found["budgets"]
    before = [None, *(row["within"]["trial"] for row in rows)]
    if len(rows) > _MOST_ROWS:
        rows = [row for row, last in zip(rows, before, strict=False) if row["within"]["trial"] != last]
    names = [name for name in run.searched if name != "num_segmented"]
    by_trial = {record["trial"]: record for record in run.records}
    minutes = rows[0]["minutes"] is not None
    header = [
        "masks",
        *(["minutes"] if minutes else []),
        "trainings",
        "best of them",
        "best within",
        "its masks",
        "value",
    ]
    lines = []
    for row in rows:
        within = row["within"]
        lines.append(
            [f"{row['masks']:,}", *([f"{row['minutes']:,.0f}"] if minutes else []), f"{row['trainings']:,}"]
            + [words.figure(row["best"]["value"], 4), within["trial"], f"{within['masks']:,}"]
            + [words.figure(within["value"], 4)]
            + [words.setting(by_trial[within["trial"]]["config"].get(name)) for name in names]
        )
    caption = "The best configuration for at most so many masks, on validation; of single trainings, so luck is in it"
    place = len(header) - 3
    numeric = frozenset(range(len(header))) - {place}
    return Table([*header, *names], lines, caption, numeric)
