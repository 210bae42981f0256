"""Precision-recall and ROC curves over scores, of images or of pixels. S distinct scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.arrays import Array, Floats


class Curve(NamedTuple):
    """One point for each distinct score, scores falling; how many items score at least that. The last point holds
    all items."""

    thresholds: Floats
    """(S,)"""
    true_positives: Floats
    """(S,)"""
    false_positives: Floats
    """(S,)"""

    @property
    def precision(self) -> Floats:
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> Floats:
        return self.true_positives / self.true_positives[-1]

    @property
    def false_positive_rate(self) -> Floats:
        return self.false_positives / self.false_positives[-1]

    @property
    def has_both_classes(self) -> bool:
        return bool(self.true_positives[-1] and self.false_positives[-1])


def curve(labels_N: Array, scores_N: Array) -> Curve:
    """The points of at least one item."""
    distinct, inverse = np.unique(-np.asarray(scores_N, np.float64), return_inverse=True)
    positive = np.bincount(inverse, np.asarray(labels_N, bool), len(distinct))
    total = np.bincount(inverse, minlength=len(distinct))
    return Curve(-distinct, np.cumsum(positive), np.cumsum(total - positive))


def average_precision(points: Curve) -> float:
    """Area under the precision-recall curve by trapezoids, from precision 1 at recall 0, as the public code (and so
    every published figure of this method) has it. scikit-learn's steps give slightly more or less. NaN unless both
    classes are there."""
    if not points.has_both_classes:
        return float("nan")
    return float(np.trapezoid(np.append(1, points.precision), np.append(0, points.recall)))


def area_under_roc(points: Curve) -> float:
    """Area under the ROC curve, ties counted half; NaN unless both classes are there."""
    if not points.has_both_classes:
        return float("nan")
    return float(np.trapezoid(np.append(0, points.recall), np.append(0, points.false_positive_rate)))


def best_f_measure(points: Curve) -> tuple[float, float]:
    """Threshold and value of the best F measure, as the public code has it (1e-8 below the line); the lowest threshold
    where several are best. Without positives, the highest score and 0."""
    if points.true_positives[-1] == 0:
        return float(points.thresholds[0]), 0.0
    f_measure = 2 * points.precision * points.recall / (points.precision + points.recall + 1e-8)
    f_measure[~np.isfinite(points.thresholds)] = -1  # what is hidden has no score to set a threshold at
    best = len(f_measure) - 1 - int(f_measure[::-1].argmax())
    return float(points.thresholds[best]), float(f_measure[best])
