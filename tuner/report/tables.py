"""The figures of the report: everything that metrics.json and predictions.csv say. Draws nothing.

N images of a split are judged at stored thresholds: a pixel or an image is a defect when its logit is at least the
threshold. A figure that cannot exist is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model.metrics import Bools, Floats, Ints, PixelCounts, Selected, bootstrap
from model.metrics import figures as metric_figures
from model.thresholds import Thresholds, sigmoid
from tuner.report.inputs import Candidate, Json, Run, Split

Figure = float | int | None

STATUSES = ("completed", "stopped_early", "diverged", "failed")
VALIDATION_KEYS = ("dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std")
TEST_KEYS = (
    *("tp", "fp", "fn", "tn"),
    *VALIDATION_KEYS,
    *("threshold", "decision_ap", "decision_auc", "precision", "recall", "f1", "two_pixel_f1"),
)
INTERVAL_KEYS = (
    *("dice_mean", "dice_positive_mean", "iou_mean", "decision_ap", "decision_auc"),
    *("precision", "recall", "f1", "two_pixel_f1"),
)
PREDICTION_COLUMNS = (*("name", "split", "group", "label", "score", "decision", "dice", "iou", "precision", "recall"),)


@dataclass(frozen=True)
class Judged:
    """A split at stored thresholds."""

    split: Split
    thresholds: Json
    has_negatives: bool

    @cached_property
    def selected(self) -> Selected:
        """Arrays (N, 1)."""
        return self._applied.select(self.split.counts, self.split.decision_logits)

    @cached_property
    def seen(self) -> PixelCounts:
        """The count tables as thresholds see them."""
        return self._applied.visible(self.split.counts, self.split.decision_logits)

    @cached_property
    def _applied(self) -> Thresholds:
        return Thresholds.from_dict(self.thresholds)

    @cached_property
    def dice(self) -> Floats:
        return self.selected.dice()[:, 0]

    @cached_property
    def iou(self) -> Floats:
        return self.selected.iou()[:, 0]

    @cached_property
    def decisions(self) -> Bools | None:
        """(N,) whether an image is called a defect; None where the decision was not trained."""
        threshold = self.thresholds["decision_logit"]
        if not self.has_negatives or threshold is None:
            return None
        return np.asarray(self.split.decision_logits >= threshold)

    def confusion(self) -> dict[str, Figure]:
        """Images by label and decision."""
        if self.decisions is None:
            return dict.fromkeys(("tp", "fp", "fn", "tn"))
        labels, decisions = self.split.labels, self.decisions
        return {
            "tp": int(np.sum(labels & decisions)),
            "fp": int(np.sum(~labels & decisions)),
            "fn": int(np.sum(labels & ~decisions)),
            "tn": int(np.sum(~labels & ~decisions)),
        }

    def of_rows(self, rows: Ints) -> dict[str, float]:
        """The figures of some of the images; NaN where one cannot exist."""
        picked = Selected(*(table[rows] for table in self.selected))
        return metric_figures(picked, self.split.labels[rows], self.split.decision_logits[rows])

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """All figures of TEST_KEYS."""
        values: dict[str, Any] = self.of_rows(np.arange(len(self.split))) | self.confusion()
        values["threshold"] = self.thresholds["segmentation_probability"]
        return {key: number(values[key]) for key in TEST_KEYS}

    @cached_property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals over groups, of those figures that have one."""
        groups = group_codes(self.split)
        keys = [key for key in INTERVAL_KEYS if self.figures[key] is not None]
        if groups.max() == 0:
            return {}

        def statistic(rows: Ints) -> Floats:
            values = self.of_rows(rows)
            return np.array([values[key] for key in keys])

        low, high = bootstrap(statistic, groups)
        return {key: [float(low[k]), float(high[k])] for k, key in enumerate(keys)}


@dataclass(frozen=True)
class Results:
    """Winner and baseline on both splits."""

    validation: Judged
    test: Judged
    baseline_validation: Judged | None
    baseline_test: Judged | None


@dataclass(frozen=True)
class Difference:
    """Winner minus baseline on the same test images."""

    mean: float
    interval: list[float] | None
    images: int
    won: int
    """images on which the winner's Dice is higher"""
    lost: int


def number(value: Any) -> Figure:
    """A plain number for JSON, None for NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def group_codes(split: Split) -> Ints:
    return np.unique(np.array(split.groups), return_inverse=True)[1]


def results(run: Run) -> Results:
    def judge(candidate: Candidate | None, name: str) -> Judged | None:
        if candidate is None:
            return None
        return Judged(getattr(candidate, name), candidate.thresholds, run.has_negatives)

    validation, test = judge(run.winner, "validation"), judge(run.winner, "test")
    assert validation is not None
    assert test is not None
    if run.is_baseline:
        return Results(validation, test, validation, test)
    return Results(validation, test, judge(run.baseline, "validation"), judge(run.baseline, "test"))


def difference(results: Results, rows: Bools) -> Difference | None:
    """Of some of the test images. None without a baseline of its own or without images. ValueError if the images of
    the two differ."""
    winner, baseline = results.test, results.baseline_test
    if baseline is None or baseline is winner or not rows.any():
        return None
    if winner.split.names != baseline.split.names:
        raise ValueError("winner and baseline were judged on different test images; run `tuner finals` again")
    gain = (winner.dice - baseline.dice)[rows]
    groups = group_codes(winner.split)[rows]
    interval = None
    if len(np.unique(groups)) > 1:
        interval = [float(x) for x in bootstrap(lambda rows: gain[rows].mean(), groups)]
    return Difference(float(gain.mean()), interval, len(gain), int((gain > 0).sum()), int((gain < 0).sum()))


def metrics(run: Run, results: Results) -> Json:
    """The content of metrics.json."""
    thresholds = run.winner.thresholds
    validation = {key: results.validation.figures[key] for key in VALIDATION_KEYS} | {
        "threshold": thresholds["segmentation_probability"],
        "threshold_rule": thresholds["rule"],
        "decision_threshold": thresholds["decision_probability"] if run.has_negatives else None,
        "decision_ap": results.validation.figures["decision_ap"],
    }
    splits = ("train", "validation", "test")
    return {
        "schema": 1,
        "run": run.facts["name"],
        "best": {"trial": run.winner.trial, "config": run.winner.config},
        "validation": validation,
        "test": _test_figures(results.test),
        "baseline": _test_figures(results.baseline_test),
        "search": search_figures(run),
        "data": {
            split: {kind: run.data[split][kind] for kind in ("positive", "negative", "segmented")} for split in splits
        }
        | {side: run.data[side] for side in ("height", "width", "channels")},
    }


def _test_figures(judged: Judged | None) -> Json:
    if judged is None:
        return {**dict.fromkeys(TEST_KEYS), "ci95": {}}
    return {**judged.figures, "ci95": judged.intervals}


def search_figures(run: Run) -> Json:
    """Trials by status and the time they took."""
    ends = [end for record in run.records if (end := ended(record)) is not None]
    return {
        "trials": len(run.records),
        **{status: sum(record["status"] == status for record in run.records) for status in STATUSES},
        "wall_seconds": max(ends) if ends else None,
        "device_seconds": sum(record["device_seconds"] or 0 for record in run.records),
    }


def ended(record: Json) -> float | None:
    """Seconds since the search began."""
    if record.get("ended") is not None:
        return float(record["ended"])
    if record["started"] is None or record["seconds"] is None:
        return None
    return float(record["started"] + record["seconds"])


def objective(record: Json) -> float | None:
    """The (first) objective of a trial."""
    value = record["value"]
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None or not math.isfinite(value) else float(value)


def best_first(run: Run) -> list[Json]:
    """Trials that have a value: completed ones before those cut short, each by value."""
    sign = -1 if run.objectives[0].get("mode", "max") == "max" else 1
    valued = [(value, record) for record in run.records if (value := objective(record)) is not None]
    return [
        record for _, record in sorted(valued, key=lambda pair: (STATUSES.index(pair[1]["status"]), sign * pair[0]))
    ]


def predictions(run: Run, results: Results) -> Iterator[tuple[Any, ...]]:
    """The lines of predictions.csv, header first."""
    yield PREDICTION_COLUMNS
    for name, judged in (("validation", results.validation), ("test", results.test)):
        split, decisions = judged.split, judged.decisions
        precision, recall = judged.selected.precision()[:, 0], judged.selected.recall()[:, 0]
        scores = sigmoid(split.decision_logits)
        for n in range(len(split)):
            yield (
                *(split.names[n], name, split.groups[n], int(split.labels[n])),
                f"{scores[n]:.6g}" if run.has_negatives else "",
                int(decisions[n]) if decisions is not None else "",
                *(f"{column[n]:.6g}" for column in (judged.dice, judged.iou, precision, recall)),
            )
