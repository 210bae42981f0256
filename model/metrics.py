"""The figures of a split, with their names and definitions side by side: papers mix them up.

N images, K thresholds. Degenerate cases: an empty prediction on an empty truth scores 1 (the public code adds 1e-15
above and below), except for the 2-pixel F1, where such an image scores 0. A figure that cannot exist is NaN here and
null in reports.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from model.arrays import Array, Bools, Floats
from model.counts import Selected, select
from model.curves import Curve, area_under_roc, average_precision, curve


class Metric(NamedTuple):
    """A figure's name for people, and what it is."""

    title: str
    definition: str


METRICS: dict[str, Metric] = {
    "dice_mean": Metric(
        "Dice, all images", "mean over images of 2 hits / (predicted + truth), pixels; empty against empty is 1"
    ),
    "dice_std": Metric("standard deviation of Dice", "of the same over images (population)"),
    "dice_positive_mean": Metric("Dice, positive images", "the same mean over images labelled as having a defect"),
    "iou_mean": Metric("IoU, all images", "mean over images of hits / (predicted or truth); empty against empty is 1"),
    "iou_std": Metric("standard deviation of IoU", "of the same over images (population)"),
    "iou_positive_mean": Metric("IoU, positive images", "the same mean over images labelled as having a defect"),
    "precision_mean": Metric(
        "precision, mean of images", "mean over images of hits / predicted; nothing predicted is 1"
    ),
    "recall_mean": Metric("recall, mean of images", "mean over images of hits / truth; an empty truth is 1"),
    "precision": Metric("pixel precision", "hits / predicted, pixels of all images pooled"),
    "recall": Metric("pixel recall", "hits / truth, pixels of all images pooled"),
    "f1": Metric("pixel F1", "harmonic mean of these two; it is the Dice of all pixels pooled"),
    "f1_positive": Metric("pixel F1, positive images", "the same over images labelled as having a defect"),
    "iou_pooled": Metric("IoU, pooled", "hits / (predicted or truth), pixels of all images pooled"),
    "iou_pooled_positive": Metric("IoU, pooled, positive images", "the same over images labelled as having a defect"),
    "iou_two_class": Metric(
        "mIoU of two classes",
        "mean of the pooled IoU of defect and of background, the 'mIoU' of CrackSeg9k papers; background alone is "
        "about 0.98, so it lies far above the other IoUs",
    ),
    "two_pixel_f1": Metric(
        "2-pixel F1",
        "as the public code has it, mean over images: hits and false alarms against the truth grown by a 5x5 cross, "
        "misses against the truth as drawn, so that its recall is none; an empty prediction scores 0",
    ),
    "tolerance_f1": Metric(
        "F1 within 2 px",
        "mean over images of the harmonic mean of predicted pixels near the truth and pixels of the truth near the "
        "prediction (both grown by the same cross); empty against empty is 1",
    ),
    "cl_dice": Metric(
        "clDice",
        "mean over images of the harmonic mean of the mask's centre line inside the truth and the truth's inside the "
        "mask (Shit et al. 2021)",
    ),
    "cl_iou": Metric(
        "centre-line IoU, 4 px",
        "mean over images of the IoU of the two centre lines, matched within 4 px (OmniCrack30k)",
    ),
    "pixel_ap": Metric("pixel AP", "area under the precision-recall curve of all pixels, by trapezoids"),
    "ods": Metric(
        "ODS", "pixel F1 at the best of the thresholds 0.01 to 0.99 for this very split: an upper bound, no estimate"
    ),
    "ois": Metric(
        "OIS",
        "mean over images with a defect of the F1 at the best of the same thresholds for each image: an upper bound",
    ),
    "aiu": Metric("AIU", "mean over the same thresholds of the mean IoU over images with a defect"),
    "decision_ap": Metric(
        "decision AP",
        "area under the precision-recall curve of the decision, by trapezoids, images with a defect being positive",
    ),
    "decision_auc": Metric("decision AUC", "area under the ROC curve of the decision, ties counted half"),
    "decision_accuracy": Metric("decision accuracy", "images decided as they are labelled / all images"),
    "decision_precision": Metric("decision precision", "TP / (TP + FP), images"),
    "decision_recall": Metric("decision recall", "TP / (TP + FN), images; also sensitivity"),
    "decision_specificity": Metric("decision specificity", "TN / (TN + FP), images"),
    "decision_f1": Metric("decision F1", "2 TP / (2 TP + FP + FN), images"),
}
"""Every figure under the name that records, metrics.json and objectives use."""

SWEPT = np.log(np.arange(1, 100)) - np.log(np.arange(99, 0, -1))
"""(99,) logits of the probabilities 0.01 to 0.99 that ODS, OIS and AIU go through"""


def figures(selected: Selected, labels_N: Array, decision_logits_N: Array) -> dict[str, float]:
    """The figures of a split at one threshold; `selected` is (N, 1)."""
    labels = np.asarray(labels_N, bool)
    dice, iou = selected.dice()[:, 0], selected.iou()[:, 0]
    points = curve(labels, decision_logits_N)
    values = {
        "dice_mean": dice.mean(),
        "dice_std": dice.std(),
        "dice_positive_mean": _mean(dice[labels]),
        "iou_mean": iou.mean(),
        "iou_std": iou.std(),
        "iou_positive_mean": _mean(iou[labels]),
        "precision_mean": selected.precision().mean(),
        "recall_mean": selected.recall().mean(),
        **_pooled(selected),
        **{f"{name}_positive": _pooled(selected.rows(labels))[name] for name in ("f1", "iou_pooled")},
        "two_pixel_f1": selected.two_pixel()[2].mean(),
        "tolerance_f1": selected.tolerant()[2].mean(),
        "decision_ap": average_precision(points),
        "decision_auc": area_under_roc(points),
    }
    return {name: float(value) for name, value in values.items()}


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _pooled(selected: Selected) -> dict[str, float]:
    """Of all pixels of these images."""
    predicted, hits, _, _, truth, pixels = (int(table.sum()) for table in selected)
    either = predicted + truth - hits
    iou = _ratio(hits, either)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, truth),
        "f1": _ratio(2 * hits, predicted + truth),
        "iou_pooled": iou,
        "iou_two_class": (iou + _ratio(pixels - either, pixels - hits)) / 2,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def without_threshold(swept: Selected, points: Curve) -> dict[str, float]:
    """Pixel AP, ODS, OIS and AIU of what the thresholds SWEPT select, and of the curve of all pixels.

    ODS and OIS choose thresholds on the split that they judge, as the papers do.
    """
    pooled, positive = swept.pooled(), swept.truth[:, 0] > 0
    if not positive.any():
        return dict.fromkeys(("pixel_ap", "ods", "ois", "aiu"), math.nan)
    return {
        "pixel_ap": average_precision(points),
        "ods": best_f1(pooled),
        "ois": float(swept.rows(positive).dice().max(axis=1).mean()),
        "aiu": float(swept.rows(positive).iou().mean()),
    }


def best_f1(pooled: Selected) -> float:
    """ODS of pooled images: the highest F1 that one of the thresholds gives."""
    return float((2 * pooled.hits / np.maximum(pooled.predicted + pooled.truth, 1)).max())


def confusion(labels_N: Array, decisions_N: Bools) -> dict[str, int]:
    """Images by label and decision."""
    labels = np.asarray(labels_N, bool)
    return {
        "tp": int(np.sum(labels & decisions_N)),
        "fp": int(np.sum(~labels & decisions_N)),
        "fn": int(np.sum(labels & ~decisions_N)),
        "tn": int(np.sum(~labels & ~decisions_N)),
    }


def decision_figures(counted: dict[str, int]) -> dict[str, float]:
    """Rates of a confusion."""
    tp, fp, fn, tn = (counted[name] for name in ("tp", "fp", "fn", "tn"))
    return {
        "decision_accuracy": _ratio(tp + tn, tp + fp + fn + tn),
        "decision_precision": _ratio(tp, tp + fp),
        "decision_recall": _ratio(tp, tp + fn),
        "decision_specificity": _ratio(tn, tn + fp),
        "decision_f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


class TwoPixel(NamedTuple):
    """Means over images at K thresholds."""

    precision: Floats
    recall: Floats
    f1: Floats


def two_pixel(truth_NHW: Array, probability_NHW: Array, thresholds_K: Array, distance: int = 2) -> TwoPixel:
    """The crack papers' F1 with a tolerance of `distance` px, mean over images, for masks `probability > threshold`.

    Follows the public code (see `Selected.two_pixel` for what its "recall" is).
    """
    tables = select(truth_NHW, probability_NHW, just_above(thresholds_K), distance).two_pixel()
    return TwoPixel(*(table.mean(axis=0) for table in tables))


def just_above(thresholds: Array | float) -> Floats:
    """The thresholds for which >= selects what > selects for the given ones."""
    return np.nextafter(np.asarray(thresholds, np.float64), np.inf)
