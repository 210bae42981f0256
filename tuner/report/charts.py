"""Figures of how well the winner does: its curves by epoch, its thresholds, its test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from model.arrays import Bools, Floats, Ints
from model.counts import scores_of
from model.curves import Curve, area_under_roc, average_precision, curve
from model.thresholds import GRID, logit, sigmoid
from tuner.report import style, words
from tuner.report.inputs import Json
from tuner.report.style import HALF, THIRD
from tuner.report.tables import Judged

PROBABILITY_TICKS = np.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
_SHARE = (-0.02, 1.02)


def confusion(figures: dict[str, Any]) -> Any:
    """Test images by label and decision."""
    figure, axes = style.panel(THIRD, 3.2)
    table = np.array([[figures["tp"], figures["fn"]], [figures["fp"], figures["tn"]]])
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    right = np.array([[1, 0], [0, 1]], bool)
    for row in range(2):
        for column in range(2):
            colour = style.BLUE if right[row, column] else style.RED
            strength = 0.08 + 0.5 * share[row, column]
            corner = (column - 0.48, row - 0.48)
            axes.add_patch(Rectangle(corner, 0.96, 0.96, color=colour, alpha=strength, linewidth=0))
            axes.text(column, row - 0.06, f"{table[row, column]:,}", ha="center", va="center", fontsize=15)
            axes.text(column, row + 0.22, f"{share[row, column]:.1%}", ha="center", va="center", color=style.MUTED)
    axes.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5), xlabel="decision", ylabel="label")
    axes.set_xticks([0, 1], ["defect", "no defect"])
    axes.set_yticks([0, 1], ["defect", "no defect"], rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _named(judged: Judged, baseline: Judged | None) -> list[tuple[str, Judged, str, float]]:
    """Baseline below winner, so that the winner is drawn over it."""
    pairs = [("winner", judged, style.WINNER, 1.8)]
    if baseline is not None and baseline is not judged:
        pairs.insert(0, ("baseline", baseline, style.BASELINE, 1.3))
    return pairs


def roc(judged: Judged, baseline: Judged | None) -> Any:
    """Image-level ROC of the decision."""
    figure, axes = style.panel(THIRD, 3.2)
    axes.plot([0, 1], [0, 1], color=style.RULE, linewidth=1)
    for name, one, colour, width in _named(judged, baseline):
        points = curve(one.split.labels, one.split.decision_logits)
        label = f"{name}, AUC {area_under_roc(points):.3f}"
        x, y = np.append(0, points.false_positive_rate), np.append(0, points.recall)
        axes.plot(x, y, color=colour, linewidth=width, label=label)
    _mark(axes, *_operating_point(judged, points, "false_positive_rate"), "decision threshold")
    axes.set(xlim=_SHARE, ylim=_SHARE, xlabel="false positive rate", ylabel="recall (true positive rate)")
    style.legend(axes, columns=1)
    return figure


def image_precision_recall(judged: Judged, baseline: Judged | None) -> Any:
    """Image-level precision and recall of the decision."""
    figure, axes = style.panel(THIRD, 3.2)
    for name, one, colour, width in _named(judged, baseline):
        points = curve(one.split.labels, one.split.decision_logits)
        label = f"{name}, AP {average_precision(points):.3f}"
        axes.plot(
            np.append(0, points.recall), np.append(1, points.precision), color=colour, linewidth=width, label=label
        )
    x, _ = _operating_point(judged, points, "recall")
    _mark(axes, x, _operating_point(judged, points, "precision")[0], "decision threshold")
    axes.set(xlim=_SHARE, xlabel="recall", ylabel="precision")
    _shares_up_to_one(axes)
    style.legend(axes, columns=1)
    return figure


def _operating_point(judged: Judged, points: Curve, what: str) -> tuple[float, float]:
    """(`what`, recall) at the decision threshold; NaN, which is not drawn, where it selects no image."""
    threshold = judged.thresholds["decision_logit"]
    at = np.flatnonzero(points.thresholds >= threshold) if threshold is not None else np.array([])
    if not len(at):
        return float("nan"), float("nan")
    return float(getattr(points, what)[at[-1]]), float(points.recall[at[-1]])


def _mark(axes: Any, x: float, y: float, label: str) -> None:
    axes.plot(
        [x],
        [y],
        "o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=style.INK,
        label=label,
        clip_on=False,
        zorder=5,
    )


def _shares_up_to_one(axes: Any) -> None:
    """Ends the axis of a share a little beyond 0 or 1, without a tick there."""
    low, high = axes.get_ylim()
    if high > 1:
        high = 1 + 0.04 * (1 - low)
    axes.set_ylim(max(0, low), high)
    axes.set_yticks([tick for tick in axes.get_yticks() if max(0, low) <= tick <= 1.0 + 1e-9])


def logit_grid(splits: Sequence[Judged]) -> Floats:
    """Logits that cover what the maps hold and where probabilities differ, finer where pixels are."""
    codes = [one.split.counts.rows["code"] for one in splits]
    levels = scores_of(np.concatenate([each[:: max(1, len(each) // 20_000)] for each in codes]))
    chosen = splits[0].thresholds["segmentation_logit"]
    even = np.linspace(min(-7.0, chosen - 1), max(7.0, chosen + 1), 201)
    return np.unique(np.concatenate([even, np.quantile(levels, np.linspace(0, 1, 201)), [chosen]]))


def pixel_precision_recall(validation: Judged, test: Judged) -> Any:
    """All pixels of a split as one."""
    figure, axes = style.panel()
    grid = logit_grid([validation, test])
    for name, one, colour, line in (
        ("validation", validation, style.VALIDATION, "--"),
        ("test", test, style.WINNER, "-"),
    ):
        pooled = one.at(grid).pooled()
        if not pooled.truth.any():
            continue
        drawn = pooled.predicted[0] > 0
        axes.plot(pooled.recall()[0][drawn], pooled.precision()[0][drawn], line, color=colour, label=name)
    if test.selected.predicted.sum():
        chosen = test.selected.pooled()
        label = f"chosen threshold {words.probability(test.thresholds['segmentation_probability'])}"
        _mark(axes, chosen.recall()[0, 0], chosen.precision()[0, 0], label)
    axes.set(xlim=_SHARE, ylim=_SHARE, xlabel="recall of pixels", ylabel="precision of pixels")
    style.legend(axes)
    return figure


def dice_by_threshold(validation: Judged, test: Judged) -> Any:
    """Mean Dice of all images at every threshold."""
    figure, axes = style.panel()
    chosen = float(test.thresholds["segmentation_logit"])
    grid = np.union1d(np.linspace(min(-7.0, chosen - 1), max(7.0, chosen + 1), 281), [chosen])
    for name, one, colour, line in (
        ("validation", validation, style.VALIDATION, "--"),
        ("test", test, style.WINNER, "-"),
    ):
        axes.plot(grid, one.at(grid).dice().mean(axis=0), line, color=colour, label=name)
    label = f"chosen threshold {words.probability(test.thresholds['segmentation_probability'])}"
    axes.axvline(chosen, color=style.INK, linewidth=0.9, linestyle=":", label=label)
    _probability_axis(axes, grid)
    axes.set(ylim=(0, None), xlabel="threshold (probability, on a logit scale)", ylabel="mean Dice, all images")
    style.legend(axes)
    return figure


def _probability_axis(axes: Any, grid: Floats) -> None:
    ticks = logit(PROBABILITY_TICKS)
    inside = (ticks >= grid[0]) & (ticks <= grid[-1])
    axes.set_xticks(ticks[inside], [f"{p:g}" for p in PROBABILITY_TICKS[inside]])
    axes.set_xlim(grid[0], grid[-1])


def dice_histogram(test: Judged, baseline: Judged | None) -> Any:
    """How the Dice of positive test images spreads."""
    figure, axes = style.panel()
    bins = np.linspace(0, 1, 21)
    positive = test.split.labels
    for name, one, colour, width in _named(test, baseline):
        dice = one.dice[positive]
        label = f"{name}, median {np.median(dice):.3f}" if len(dice) else name
        axes.hist(dice, bins, histtype="step", color=colour, linewidth=width, label=label)
        if name == "winner":
            axes.hist(dice, bins, color=colour, alpha=0.15)
    axes.set(xlim=(0, 1), xlabel="Dice of an image", ylabel="positive test images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(axes)
    return figure


def pairs(test: Judged, baseline: Judged) -> Any:
    """Each positive test image: Dice of the winner against Dice of the baseline."""
    figure, axes = style.panel()
    positive = test.split.labels
    axes.plot([0, 1], [0, 1], color=style.BASELINE, linewidth=1)
    axes.plot(
        baseline.dice[positive],
        test.dice[positive],
        "o",
        color=style.WINNER,
        alpha=0.5 if positive.sum() < 300 else 0.25,
        markersize=4,
        markeredgewidth=0,
    )
    axes.text(0.03, 0.97, "winner better", transform=axes.transAxes, va="top", color=style.MUTED)
    axes.text(0.97, 0.03, "baseline better", transform=axes.transAxes, ha="right", color=style.MUTED)
    axes.set(xlim=_SHARE, ylim=_SHARE, xlabel="Dice of the baseline", ylabel="Dice of the winner")
    return figure


def by_epoch(
    history: list[Json],
    series: Sequence[tuple[str, str, str]],
    ylabel: str,
    best_epoch: int | None = None,
    width: float = HALF,
    bounded: bool = True,
) -> Any | None:
    """Lines by epoch; `series` holds (key, label, colour). None where the history has none of them."""
    figure, axes = style.panel(width, 3.3 if width == HALF else 2.7)
    drawn = []
    for key, label, colour in series:
        points = [(e["epoch"], e[key]) for e in history if e.get(key) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-" if len(x) < 30 else "-", color=colour, markersize=3)
            drawn.append(Line2D([], [], color=colour, label=label))
    if not drawn:
        return None
    if best_epoch is not None:
        axes.axvline(best_epoch, color=style.INK, linewidth=0.9, linestyle=":")
        drawn.append(Line2D([], [], color=style.INK, linewidth=0.9, linestyle=":", label=f"best epoch, {best_epoch}"))
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if bounded:
        _shares_up_to_one(axes)
    else:
        axes.set_ylim(0, None)
    if len(drawn) > 1:
        style.legend(axes, columns=2 if width < HALF else 5, handles=drawn)
    return figure


def best_threshold(validation: Judged) -> tuple[float, float]:
    """The probability at which validation's mean Dice is highest, and that Dice."""
    grid = np.union1d(logit_grid([validation]), logit(GRID))
    dice = validation.at(grid).dice().mean(axis=0)
    best = int(dice.argmax())
    return float(sigmoid(grid[best])), float(dice[best])


def dice_by_size(
    test: Judged, baseline: Judged | None, rows: Ints, values: Floats, parts: Sequence[Bools], xlabel: str
) -> Any:
    """Dice of some test images against how large their defects are (`values`), and the mean of each part of them."""
    figure, axes = style.panel()
    alpha = 0.5 if len(rows) < 300 else 0.25
    for name, one, colour, _ in _named(test, baseline):
        dice = one.dice[rows]
        axes.plot(values, dice, "o", color=colour, alpha=alpha, markersize=4, markeredgewidth=0, label=name)
        for part in parts:
            ends = [values[part].min(), values[part].max()]
            axes.plot(ends, [dice[part].mean()] * 2, color=colour, linewidth=2.2, zorder=1.5)
    _log_axis(axes, values)
    axes.set(ylim=_SHARE, xlabel=xlabel, ylabel="Dice of an image")
    style.legend(axes)
    return figure


def _log_axis(axes: Any, values: Floats) -> None:
    """With plain numbers at a few round places, also where the values span less than a power of ten."""
    low, high = float(values.min()) / 1.1, float(values.max()) * 1.1
    axes.set_xscale("log")
    round_ones = np.array([digit * 10.0**power for power in range(-5, 6) for digit in (1, 1.5, 2, 3, 5, 7)])
    inside = round_ones[(round_ones >= low) & (round_ones <= high)]
    if len(inside) > 8:
        inside = inside[np.isin(np.round(inside / 10.0 ** np.floor(np.log10(inside) + 1e-9), 6), (1, 3))]
    axes.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)


def reliability(bins: Sequence[Json]) -> Any:
    """Share of images with a defect against the mean score, by parts of the test images. The scores are on a logit
    scale, since most of them may lie near 1."""
    figure, axes = style.panel()
    x = logit(np.clip([part["score"] for part in bins], sigmoid(-20), sigmoid(20)))
    grid = np.linspace(min(-5.0, x.min() - 0.5), max(5.0, x.max() + 0.5), 201)
    axes.plot(grid, sigmoid(grid), color=style.BASELINE, linewidth=1.2, label="a score that is a probability")
    y = np.array([part["share"] for part in bins])
    low, high = np.array([part["ci95"] for part in bins]).T
    axes.errorbar(
        x, y, [y - low, high - y], fmt="o", color=style.WINNER, elinewidth=1.2, capsize=2.5, label="test images"
    )
    _probability_axis(axes, grid)
    axes.set(ylim=_SHARE, xlabel="score, mean of a part (on a logit scale)", ylabel="share with a defect")
    style.legend(axes)
    return figure


def score_histogram(test: Judged) -> Any:
    """Scores of test images by label, on a logit scale."""
    figure, axes = style.panel()
    logits, labels = test.split.decision_logits, test.split.labels
    low, high = min(-5.0, float(logits.min())), max(5.0, float(logits.max()))
    bins = np.linspace(low, high, 31)
    for name, rows, colour in (("no defect", ~labels, style.ORANGE), ("defect", labels, style.BLUE)):
        axes.hist(logits[rows], bins, color=colour, alpha=0.3)
        label = f"{name}, {words.plural(int(rows.sum()), 'image')}"
        axes.hist(logits[rows], bins, histtype="step", color=colour, linewidth=1.6, label=label)
    threshold = test.thresholds["decision_logit"]
    if threshold is not None:
        axes.axvline(threshold, color=style.INK, linewidth=0.9, linestyle=":", label="decision threshold")
    _probability_axis(axes, bins)
    axes.set(xlabel="score (on a logit scale)", ylabel="test images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(axes)
    return figure
