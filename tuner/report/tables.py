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

from model.arrays import Array, Bools, Floats, Ints
from model.counts import Selected
from model.curves import area_under_roc, average_precision, curve
from model.intervals import (
    MIN_GROUPS,
    Interval,
    Ratio,
    ap_interval,
    auc_interval,
    contributing,
    decision_f1_interval,
    jackknife_difference_interval,
    jackknife_interval,
    mean_difference_interval,
    mean_interval,
    rate_interval,
)
from model.metrics import METRICS, SWEPT, best_f1, confusion, decision_figures, without_threshold
from model.metrics import figures as metric_figures
from model.thresholds import Thresholds, sigmoid
from tuner import nested, records
from tuner.names import cell
from tuner.report.inputs import EvaluatedCandidate, EvaluatedRun, Json, Run, Split

Figure = float | int | None

STATUSES = ("completed", "stopped_early", "diverged", "failed")
CONFUSION_KEYS = ("tp", "fp", "fn", "tn")
VALIDATION_KEYS = ("dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std")
TEST_KEYS = (
    *CONFUSION_KEYS,
    *VALIDATION_KEYS,
    *("threshold", "decision_ap", "decision_auc", "precision", "recall", "f1", "two_pixel_f1"),
)
"""What metrics.json always had; the rest of METRICS stands behind."""
ALL_KEYS = (*TEST_KEYS, *(key for key in METRICS if key not in TEST_KEYS))
AREAS = ("pixel_ap", "ods", "decision_ap", "decision_auc")
"""Figures that are areas or optima, no ratios of sums over images."""
PREDICTION_COLUMNS = (*("name", "split", "group", "label", "score", "decision", "dice", "iou", "precision", "recall"),)


@dataclass(frozen=True)
class Judged:
    """A split at stored thresholds."""

    split: Split
    thresholds: Json
    has_negatives: bool

    @property
    def chosen_on(self) -> str:
        """The split that the thresholds were chosen on."""
        return str(self.thresholds.get("chosen_on", "validation"))

    @property
    def is_stamped(self) -> bool:
        """Whether the figures are no estimates, for their thresholds were chosen on test."""
        return self.chosen_on == "test"

    @cached_property
    def selected(self) -> Selected:
        """Arrays (N, 1)."""
        return self._applied.select(self.split.counts, self.split.decision_logits)

    def at(self, logits_K: Floats) -> Selected:
        """What other segmentation thresholds select, arrays (N, K); lowered and blackened where that is asked for."""
        return self._applied.select_at(logits_K, self.split.counts, self.split.decision_logits)

    @cached_property
    def _applied(self) -> Thresholds:
        return Thresholds.from_dict(self.thresholds)

    @cached_property
    def _kept(self) -> Bools:
        return self._applied.kept(self.split.decision_logits)

    @cached_property
    def _swept(self) -> Selected:
        """Not lowered, as in the search: the figures over all thresholds are of plain ones."""
        return self.split.counts.at(SWEPT).blackened(self._kept)

    @cached_property
    def dice(self) -> Floats:
        return self.selected.dice()[:, 0]

    @cached_property
    def iou(self) -> Floats:
        return self.selected.iou()[:, 0]

    @cached_property
    def decisions(self) -> Bools | None:
        """(N,) whether an image is called a defect; None where the decision was not trained."""
        if not self.has_negatives or self._applied.decision_logit is None:
            return None
        return self._applied.decide(self.split.decision_logits)

    @cached_property
    def groups(self) -> Ints:
        """(N,) codes of the images' groups"""
        return np.unique(np.array(self.split.groups), return_inverse=True)[1]

    def of_rows(self, rows: Ints) -> dict[str, float]:
        """The figures at the thresholds of some of the images; NaN where one cannot exist."""
        return metric_figures(self.selected.rows(rows), self.split.labels[rows], self.split.decision_logits[rows])

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """All figures of ALL_KEYS."""
        values: dict[str, Any] = dict.fromkeys(ALL_KEYS)
        values |= self.of_rows(np.arange(len(self.split)))
        values |= without_threshold(self._swept, self.split.counts.pixel_curve(self._kept))
        values |= {"cl_dice": self.split.centre_lines.dice().mean(), "cl_iou": self.split.centre_lines.iou().mean()}
        if self.decisions is not None:
            counted = confusion(self.split.labels, self.decisions)
            values |= counted | decision_figures(counted)
        values["threshold"] = self.thresholds["segmentation_probability"]
        return {key: number(values[key]) for key in ALL_KEYS}

    @cached_property
    def ratios(self) -> dict[str, tuple[Ratio, ...]]:
        """The figures that are a ratio of sums over images, or the mean of some."""
        selected, lines = self.selected, self.split.centre_lines
        predicted, hits, _, _, truth, pixels = (table[:, 0].astype(np.float64) for table in selected)
        positive = self.split.labels.astype(np.float64)
        with_truth = (truth > 0).astype(np.float64)
        either = predicted + truth - hits

        def mean(values_N: Array, over_N: Array) -> tuple[Ratio, ...]:
            return (Ratio(values_N * over_N, over_N),)

        every = np.ones_like(positive)
        return {
            "dice_mean": mean(self.dice, every),
            "dice_positive_mean": mean(self.dice, positive),
            "iou_mean": mean(self.iou, every),
            "iou_positive_mean": mean(self.iou, positive),
            "precision_mean": mean(selected.precision()[:, 0], every),
            "recall_mean": mean(selected.recall()[:, 0], every),
            "precision": (Ratio(hits, predicted),),
            "recall": (Ratio(hits, truth),),
            "f1": (Ratio(2 * hits, predicted + truth),),
            "f1_positive": (Ratio(2 * hits * positive, (predicted + truth) * positive),),
            "iou_pooled": (Ratio(hits, either),),
            "iou_pooled_positive": (Ratio(hits * positive, either * positive),),
            "iou_two_class": (Ratio(hits, either), Ratio(pixels - either, pixels - hits)),
            "two_pixel_f1": mean(selected.two_pixel()[2][:, 0], every),
            "tolerance_f1": mean(selected.tolerant()[2][:, 0], every),
            "cl_dice": mean(lines.dice(), every),
            "cl_iou": mean(lines.iou(), every),
            "ois": mean(self._swept.dice().max(axis=1), with_truth),
            "aiu": mean(self._swept.iou().mean(axis=1), with_truth),
        }

    @cached_property
    def decision_ratios(self) -> dict[str, tuple[Ratio, ...]]:
        """Those of the decision that are; their own intervals are those of rates. Nothing without a decision."""
        if self.decisions is None:
            return {}
        yes, labels = self.decisions.astype(np.float64), self.split.labels.astype(np.float64)
        return {
            "decision_accuracy": (Ratio((labels == yes).astype(np.float64), np.ones_like(yes)),),
            "decision_precision": (Ratio(labels * yes, yes),),
            "decision_recall": (Ratio(labels * yes, labels),),
            "decision_specificity": (Ratio((1 - labels) * (1 - yes), 1 - labels),),
            "decision_f1": (Ratio(2 * labels * yes, labels + yes),),
        }

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals over groups, of those figures that have one."""
        labels, groups = self.split.labels, self.groups
        found = {key: mean_interval(ratios, groups) for key, ratios in self.ratios.items()}
        if self.decisions is not None:
            yes, every = self.decisions, np.ones_like(labels)
            found |= {
                "decision_accuracy": rate_interval(labels == yes, every, groups),
                "decision_precision": rate_interval(labels & yes, yes, groups),
                "decision_recall": rate_interval(labels & yes, labels, groups),
                "decision_specificity": rate_interval(~labels & ~yes, ~labels, groups),
                "decision_f1": decision_f1_interval(labels, yes, groups),
            }
        if self.figures["decision_auc"] is not None:
            found["decision_auc"] = auc_interval(labels, self.split.decision_logits, groups)
            found["decision_ap"] = ap_interval(labels, self.split.decision_logits, groups)
        for key in ("pixel_ap", "ods"):
            if self.has_groups_for(key):
                found[key] = jackknife_interval(self.figures[key] or 0.0, self.without_groups[key])
        return {key: interval for key in ALL_KEYS if (interval := found.get(key)) and self.figures[key] is not None}

    def has_groups_for(self, key: str) -> bool:
        """Whether enough groups contribute to one of the figures of AREAS."""
        labels = self.split.labels
        kinds = (labels, ~labels) if key.startswith("decision") else (self.selected.truth[:, 0] > 0,)
        return all(contributing(kind, self.groups) >= MIN_GROUPS for kind in kinds)

    @cached_property
    def without_groups(self) -> dict[str, Floats]:
        """(G,) each of the figures of AREAS without one group after another"""
        groups = range(self.groups.max() + 1)
        pooled = self._swept.pooled()
        each = (self._swept.rows(self.groups == group).pooled() for group in groups)
        others = [self.groups != group for group in groups]
        decisions = [curve(self.split.labels[rows], self.split.decision_logits[rows]) for rows in others if rows.any()]
        pixels = self.split.counts.curves_without(self._kept, self.groups)
        return {
            "pixel_ap": np.array([average_precision(points) for points in pixels]),
            "ods": np.array([best_f1(Selected(*(a - b for a, b in zip(pooled, one, strict=True)))) for one in each]),
            "decision_ap": np.array([average_precision(points) for points in decisions]),
            "decision_auc": np.array([area_under_roc(points) for points in decisions]),
        }


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

    value: float
    interval: Interval | None


def number(value: Any) -> Figure:
    """A plain number for JSON, None for NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def results(run: EvaluatedRun) -> Results:
    def judge(candidate: EvaluatedCandidate | None, name: str) -> Judged | None:
        if candidate is None:
            return None
        return Judged(getattr(candidate, name), candidate.thresholds, run.has_negatives)

    validation, test = judge(run.winner, "validation"), judge(run.winner, "test")
    assert validation is not None
    assert test is not None
    if run.is_baseline:
        return Results(validation, test, validation, test)
    return Results(validation, test, judge(run.baseline, "validation"), judge(run.baseline, "test"))


def differences(results: Results) -> dict[str, Difference]:
    """By figure, of those that are a ratio of sums over images, or a mean of some, and those of AREAS. Nothing without
    a baseline of its own. ValueError if the images of the two differ."""
    winner, baseline = results.test, results.baseline_test
    if baseline is None or baseline is winner:
        return {}
    if winner.split.names != baseline.split.names:
        raise ValueError("winner and baseline were judged on different test images; run `tuner finals` again")
    found = {}
    ratios = (winner.ratios | winner.decision_ratios, baseline.ratios | baseline.decision_ratios)
    for key in ratios[0]:
        ours, theirs = winner.figures[key], baseline.figures[key]
        if ours is not None and theirs is not None:
            interval = mean_difference_interval(ratios[0][key], ratios[1][key], winner.groups)
            found[key] = Difference(ours - theirs, interval)
    for key in AREAS:
        ours, theirs = winner.figures[key], baseline.figures[key]
        if ours is not None and theirs is not None:
            interval = None
            if winner.has_groups_for(key):
                without = winner.without_groups[key] - baseline.without_groups[key]
                interval = jackknife_difference_interval(ours - theirs, without)
            found[key] = Difference(ours - theirs, interval)
    return found


def metrics(run: Run, results: Results | None) -> Json:
    """The content of metrics.json. `results` are there where `run` is evaluated."""
    splits = ("train", "validation", "test")
    chosen = run.chosen
    test, baseline = (results.test, results.baseline_test) if results else (None, None)
    gains = differences(results) if results else {}
    return {
        "schema": 1,
        "run": run.facts["name"],
        "state": run.facts["state"],
        "evaluated": results is not None,
        "best": None if chosen is None else {"trial": chosen.trial, "config": chosen.config},
        "validation": _validation_figures(run, results),
        "test": _test_figures(test),
        "baseline": _test_figures(baseline),
        "difference": {key: {"value": gain.value, "ci95": gain.interval} for key, gain in gains.items()},
        "thresholds_chosen_on": test.chosen_on if test else None,
        "test_openings": len(run.openings),
        "search": search_figures(run),
        "front": front(run),
        "nested": nested.score(run.records),
        "data": {
            split: {kind: run.data[split][kind] for kind in ("positive", "negative", "segmented")} for split in splits
        }
        | {side: run.data[side] for side in ("height", "width", "channels")},
    }


def _validation_figures(run: Run, results: Results | None) -> Json:
    """Of the evaluation, or of the best record's best epoch."""
    keys = (*VALIDATION_KEYS, "decision_ap")
    record = run.best_record
    if results is not None:
        found: Json = dict(results.validation.figures)
    else:
        found = {run.objectives[0]["metric"]: record["value"]} | records.figures(record) if record else {}
    thresholds = run.chosen.thresholds if run.chosen else {}
    return {key: found.get(key) for key in keys} | {
        "threshold": thresholds.get("segmentation_probability"),
        "threshold_rule": thresholds.get("rule"),
        "decision_threshold": thresholds.get("decision_probability") if run.has_negatives else None,
    }


def _test_figures(judged: Judged | None) -> Json:
    if judged is None:
        return {**dict.fromkeys(ALL_KEYS), "ci95": {}}
    return {**judged.figures, "ci95": {key: list(interval) for key, interval in judged.intervals.items()}}


def search_figures(run: Run) -> Json:
    """Trials by status and the time they took."""
    ends = [end for record in run.records if (end := ended(record)) is not None]
    return {
        "trials": len(run.records),
        **{status: sum(record["status"] == status for record in run.records) for status in STATUSES},
        "wall_seconds": max(ends) if ends else None,
        "device_seconds": sum(record["device_seconds"] or 0 for record in run.records),
    }


def front(run: Run) -> list[Json] | None:
    """The Pareto front, by cost; None with one objective."""
    return records.front(run.records, [one.get("mode", "max") for one in run.objectives])


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
    return None if value is None or not math.isfinite(value) else float(value)


def best_first(run: Run) -> list[Json]:
    """Trials that have a value: completed ones before those cut short, those that meet the constraints before the
    others, each by value."""
    sign = -1 if run.objectives[0].get("mode", "max") == "max" else 1
    valued = [(value, record) for record in run.records if (value := objective(record)) is not None]

    def place(pair: tuple[float, Json]) -> tuple[int, bool, float]:
        value, record = pair
        return STATUSES.index(record["status"]), not records.is_feasible(record), sign * value

    return [record for _, record in sorted(valued, key=place)]


def predictions(run: EvaluatedRun, results: Results) -> Iterator[tuple[Any, ...]]:
    """The lines of predictions.csv, header first. Where thresholds were chosen on test, a column more says so."""
    stamp = (results.test.chosen_on,) if results.test.is_stamped else ()
    yield (*PREDICTION_COLUMNS, *("thresholds_chosen_on" for _ in stamp))
    for name, judged in (("validation", results.validation), ("test", results.test)):
        split, decisions = judged.split, judged.decisions
        precision, recall = judged.selected.precision()[:, 0], judged.selected.recall()[:, 0]
        scores = sigmoid(split.decision_logits)
        for n in range(len(split)):
            shares = (column[n] for column in (judged.dice, judged.iou, precision, recall))
            yield (
                *(cell(split.names[n]), name, cell(split.groups[n]), int(split.labels[n])),
                f"{scores[n]:.6g}" if run.has_negatives else "",
                int(decisions[n]) if decisions is not None else "",
                *(f"{round(share, 9):.6g}" for share in shares),  # 0, not the 1e-18 that 1e-15 above and below leaves
                *stamp,
            )
