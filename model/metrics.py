"""Metrics from counts. Every figure follows from how many pixels a threshold selects, so one pass over the maps,
which keeps a count table an image, answers every threshold exactly.

Shapes: N images, H x W px, K thresholds. A score selects a pixel when score >= threshold.
Degenerate cases: an empty prediction on an empty truth scores 1 (the public code adds 1e-15 above and below), except
for the 2-pixel F1, where such an image scores 0. A figure that cannot exist is NaN here and null in reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_EPSILON = 1e-15
_HALF_KEYS = 1 << 16


def to_half(logits: Array) -> NDArray[np.float16]:
    """Logits as every part of this project compares them: rounded to half precision, without -0 and infinities.

    Probabilities would not do: in half precision only 206 values lie above 0.9, so that sure scores become equal.
    """
    limit = np.finfo(np.float16).max
    return np.clip(logits, -limit, limit).astype(np.float16) + np.float16(0)


def _half_key(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Half-precision numbers as integers of the same order."""
    bits = np.ascontiguousarray(values).view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | np.uint16(0x8000))


def _half_of_key(keys: NDArray[np.uint16]) -> NDArray[np.float16]:
    bits = np.where(keys & 0x8000, keys & np.uint16(0x7FFF), ~keys)
    return bits.astype(np.uint16).view(np.float16)


def grow(truth_HW: Array, distance: int) -> Bools:
    """The truth dilated by a cross with arms of `distance` px (the public code's 5x5 cross for 2 px)."""
    cross = np.zeros((2 * distance + 1, 2 * distance + 1), bool)
    cross[distance, :] = cross[:, distance] = True
    return np.asarray(ndimage.binary_dilation(truth_HW.astype(bool), cross))


@dataclass(frozen=True)
class PixelCounts:
    """Count tables of N images: for each distinct score of an image, how many pixels score at least that.

    Image n owns rows offsets[n]:offsets[n + 1], scores falling.
    """

    offsets: Ints
    """(N + 1,)"""
    levels: Array
    """(M,) distinct scores of each image, falling; float32, which holds half precision, or float64"""
    predicted: Array
    """(M,) pixels that score at least the level; int32, or int64 where images are pooled"""
    hits: Array
    """(M,) of these, pixels of the truth"""
    grown_hits: Array
    """(M,) of these, pixels of the truth grown by the tolerance"""
    truth: Ints
    """(N,) pixels of the truth"""

    def __len__(self) -> int:
        return len(self.truth)

    def at(self, thresholds_K: Array | float) -> Selected:
        """What thresholds select in each image: arrays (N, K)."""
        thresholds = np.atleast_1d(np.asarray(thresholds_K, np.float64))
        out = np.zeros((3, len(self), len(thresholds)), np.int64)
        for n in range(len(self)):
            rows = slice(self.offsets[n], self.offsets[n + 1])
            rank = np.searchsorted(-self.levels[rows].astype(np.float64), -thresholds, side="right")
            for table, source in zip(out, (self.predicted, self.hits, self.grown_hits), strict=True):
                table[n] = np.concatenate(([0], source[rows]))[rank]
        return Selected(out[0], out[1], out[2], self.truth[:, None])

    def pooled(self) -> PixelCounts:
        """The table of all images taken as one."""
        starts = self.offsets[:-1][np.diff(self.offsets) > 0]
        levels, inverse = np.unique(-self.levels.astype(np.float64), return_inverse=True)
        columns = []
        for cumulative in (self.predicted, self.hits, self.grown_hits):
            each = np.diff(cumulative.astype(np.int64), prepend=0)
            each[starts] = cumulative[starts]
            columns.append(np.cumsum(np.bincount(inverse, each, len(levels))).astype(np.int64))
        predicted, hits, grown_hits = columns
        return PixelCounts(
            np.array([0, len(levels)]), -levels, predicted, hits, grown_hits, self.truth.sum(keepdims=True)
        )

    def largest(self) -> Floats:
        """(N,) the largest score of each image; none may be blackened."""
        return self.levels[self.offsets[:-1]]

    def blackened(self, kept_N: Bools) -> PixelCounts:
        """The tables with nothing predicted in the other images, at any threshold."""
        lengths = np.where(kept_N, np.diff(self.offsets), 0)
        rows = np.repeat(kept_N, np.diff(self.offsets))
        return PixelCounts(
            np.concatenate(([0], np.cumsum(lengths))),
            self.levels[rows],
            self.predicted[rows],
            self.hits[rows],
            self.grown_hits[rows],
            self.truth,
        )

    def arrays(self) -> dict[str, Array]:
        """What `from_arrays` takes back, for an .npz file."""
        return {f"counts_{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> PixelCounts:
        """The inverse of `arrays`."""
        return cls(**{name: arrays[f"counts_{name}"] for name in cls.__dataclass_fields__})


class Selected(NamedTuple):
    """Pixels that K thresholds select in N images; `truth` is (N, 1)."""

    predicted: Ints
    hits: Ints
    grown_hits: Ints
    truth: Ints

    def dice(self) -> Floats:
        return (2 * self.hits + _EPSILON) / (self.predicted + self.truth + _EPSILON)

    def iou(self) -> Floats:
        return (self.hits + _EPSILON) / (self.predicted + self.truth - self.hits + _EPSILON)

    def precision(self) -> Floats:
        return (self.hits + _EPSILON) / (self.predicted + _EPSILON)

    def recall(self) -> Floats:
        return (self.hits + _EPSILON) / (self.truth + _EPSILON)

    def two_pixel(self) -> tuple[Floats, Floats, Floats]:
        """Precision, "recall" and F1 as the public code has them: hits and false alarms against the grown truth,
        misses against the truth as drawn (so the second is no recall). Empty predictions score 0."""
        misses = self.truth - self.hits
        precision = self.grown_hits / np.maximum(self.predicted, 1)
        recall = self.grown_hits / np.maximum(self.grown_hits + misses, 1)
        return precision, recall, 2 * precision * recall / np.maximum(precision + recall, _EPSILON)

    def pooled(self) -> Selected:
        """All images as one: arrays (1, K)."""
        return Selected(*(table.sum(axis=0, keepdims=True) for table in self))


@dataclass
class CountsBuilder:
    """Collects the tables of one image after another; holds no image."""

    tolerance: int = 2
    """px by which the truth is grown"""
    _columns: list[tuple[Array, ...]] = field(default_factory=list)
    _truth: list[int] = field(default_factory=list)

    def add(self, truth_HW: Array, scores_HW: Array) -> None:
        """Half-precision scores take a counting pass; all others a sort, slower and as exact."""
        truth = np.ascontiguousarray(truth_HW).astype(bool).ravel()
        grown = grow(truth_HW, self.tolerance).ravel()
        scores = np.ascontiguousarray(scores_HW).ravel()
        if scores.dtype == np.float16:
            keys = _half_key(scores + np.float16(0)).astype(np.intp)
            # Bit 0 the truth, bit 1 the grown truth: one histogram holds all four kinds of pixel.
            kinds = np.bincount(keys * 4 + truth + 2 * grown, minlength=4 * _HALF_KEYS).reshape(-1, 4)
            present = np.flatnonzero(kinds.any(axis=1))[::-1]
            levels: Array = _half_of_key(present.astype(np.uint16)).astype(np.float32)
            kinds = kinds[present]
        else:
            distinct, inverse = np.unique(-scores.astype(np.float64), return_inverse=True)
            levels = -distinct
            kinds = np.bincount(inverse * 4 + truth + 2 * grown, minlength=4 * len(levels)).reshape(-1, 4)
        cumulative = np.cumsum(kinds, axis=0).astype(np.int32)
        hits = cumulative[:, 1] + cumulative[:, 3]
        grown_hits = cumulative[:, 2] + cumulative[:, 3]
        self._columns.append((levels, cumulative.sum(axis=1), hits, grown_hits))
        self._truth.append(int(truth.sum()))

    def build(self) -> PixelCounts:
        """The tables of all images added so far, at least one."""
        lengths = [len(levels) for levels, *_ in self._columns]
        levels, predicted, hits, grown_hits = (np.concatenate(c) for c in zip(*self._columns, strict=True))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return PixelCounts(offsets, levels, predicted, hits, grown_hits, np.array(self._truth))


def count(truth_NHW: Array, scores_NHW: Array, tolerance: int = 2) -> PixelCounts:
    """Count tables of a whole array at once."""
    builder = CountsBuilder(tolerance)
    for truth_HW, scores_HW in zip(truth_NHW, scores_NHW, strict=True):
        builder.add(truth_HW, scores_HW)
    return builder.build()


class TwoPixel(NamedTuple):
    """Means over images at K thresholds."""

    precision: Floats
    recall: Floats
    f1: Floats


def two_pixel(truth_NHW: Array, probability_NHW: Array, thresholds_K: Array, distance: int = 2) -> TwoPixel:
    """The crack papers' F1 with a tolerance of `distance` px, mean over images, for masks `probability > threshold`.

    Follows the public code (see `Selected.two_pixel` for what its "recall" is).
    """
    counts = count(truth_NHW, probability_NHW, distance)
    tables = counts.at(just_above(thresholds_K)).two_pixel()
    return TwoPixel(*(table.mean(axis=0) for table in tables))


def just_above(thresholds: Array | float) -> Floats:
    """The thresholds for which >= selects what > selects for the given ones."""
    return np.nextafter(np.asarray(thresholds, np.float64), np.inf)


class Curve(NamedTuple):
    """One point for each distinct score, scores falling; cumulative counts of images or pixels at >= score."""

    thresholds: Floats
    true_positives: Floats
    false_positives: Floats

    @property
    def precision(self) -> Floats:
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> Floats:
        return self.true_positives / self.true_positives[-1]

    @property
    def false_positive_rate(self) -> Floats:
        return self.false_positives / self.false_positives[-1]


def curve(labels_N: Array, scores_N: Array) -> Curve:
    """ROC and precision-recall points of image scores. Needs at least one image."""
    distinct, inverse = np.unique(-np.asarray(scores_N, np.float64), return_inverse=True)
    positive = np.bincount(inverse, np.asarray(labels_N, bool), len(distinct))
    total = np.bincount(inverse, minlength=len(distinct))
    return Curve(-distinct, np.cumsum(positive), np.cumsum(total - positive))


def average_precision(points: Curve) -> float:
    """Area under the precision-recall curve by trapezoids, from precision 1 at recall 0, as the public code (and so
    every published figure of this method) has it. scikit-learn's steps give slightly more or less. NaN unless both
    classes are there."""
    if points.true_positives[-1] == 0 or points.false_positives[-1] == 0:
        return float("nan")
    return float(np.trapezoid(np.append(1, points.precision), np.append(0, points.recall)))


def area_under_roc(points: Curve) -> float:
    """Area under the ROC curve, ties counted half; NaN unless both classes are there."""
    if points.true_positives[-1] == 0 or points.false_positives[-1] == 0:
        return float("nan")
    return float(np.trapezoid(np.append(0, points.recall), np.append(0, points.false_positive_rate)))


def figures(selected: Selected, labels_N: Array, decision_logits_N: Array) -> dict[str, float]:
    """All figures of a split at one threshold, under the names of records and reports. NaN for what cannot exist.

    Dice and IoU are means over images (`dice_positive_mean` over those with a defect, by their label), with
    population standard deviations; precision, recall and F1 are those of all pixels pooled; `two_pixel_f1` is the
    mean over images of `Selected.two_pixel`; AP and AUC are those of the image's decision.
    """
    labels = np.asarray(labels_N, bool)
    dice, iou = selected.dice()[:, 0], selected.iou()[:, 0]
    predicted, hits, _, truth = (int(table.sum()) for table in selected)
    points = curve(labels, decision_logits_N)
    values = {
        "dice_mean": dice.mean(),
        "dice_std": dice.std(),
        "dice_positive_mean": dice[labels].mean() if labels.any() else math.nan,
        "iou_mean": iou.mean(),
        "iou_std": iou.std(),
        "precision": hits / predicted if predicted else math.nan,
        "recall": hits / truth if truth else math.nan,
        "f1": 2 * hits / (predicted + truth) if predicted + truth else math.nan,
        "two_pixel_f1": selected.two_pixel()[2].mean(),
        "decision_ap": average_precision(points),
        "decision_auc": area_under_roc(points),
    }
    return {name: float(value) for name, value in values.items()}


def bootstrap(statistic: Callable[[Ints], Array | float], groups_N: Array, draws: int = 1000, seed: int = 0) -> Floats:
    """95 % percentile interval of `statistic`, stacked as (2, ...): whole groups are drawn with replacement, since
    images of one photo move together.

    `statistic` takes the row numbers of the images drawn. Draws for which it is NaN are left out.
    """
    members = [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))]))
        for _ in range(draws)
    ]
    return np.asarray(np.nanpercentile(np.array(drawn, np.float64), [2.5, 97.5], axis=0))
