"""How a segmentation threshold and a decision threshold are chosen, always on validation, and how they are applied.

Inside the project thresholds are chosen on count tables of logits and applied as score >= threshold.
The three public functions take whole arrays and follow the public code, whose masks are `probability > threshold`.
Rules, with the numbers that the public code gives them:

1. min_of_max: the least, over images with a defect, of the image's largest score.
2. pr_curve: the best F measure on the precision-recall curve of every n-th pixel of the split.
3. grid: the best mean Dice on the probabilities 0.01, 0.015, ... 0.995.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from model.arrays import Array, Bools, Floats
from model.counts import PixelCounts, Selected, refuse_nan, select, to_half
from model.curves import best_f_measure, curve
from model.metrics import just_above

GRID = np.arange(0.01, 1, 0.005)
"""probabilities that rule grid tries"""


def logit(probability: Array | float) -> Floats:
    """The inverse of the logistic function."""
    p = np.asarray(probability, np.float64)
    return np.log(p) - np.log1p(-p)


def sigmoid(logits: Array | float) -> Floats:
    """The logistic function, without overflow."""
    x = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class ThresholdSearch:
    """Chooses thresholds on the count tables of a split. What was found once is kept."""

    counts: PixelCounts
    strided: Mapping[int, PixelCounts]
    """of every n-th pixel of the flattened split, for the factors above 1 that may be asked for"""
    kept_N: Bools
    """(N,) the images that are not blackened before the search"""
    like: ThresholdSearch | None = None
    """a search on the same tables, whose sums over them serve this one too"""

    def choose(self, rule: str, factor: int = 1) -> float:
        """The threshold, a logit, that `rule` picks. ValueError if no image has a defect.

        Where blackening hides every defect, no threshold helps, and the search goes on as if nothing were hidden.
        """
        if rule == "min_of_max":
            return float(self.counts.largest()[self._positive & self._kept].min())
        if rule == "pr_curve":
            if factor not in self._on_curve:
                counts = self.counts if factor == 1 else self.strided[factor]
                self._on_curve[factor] = best_f_measure(counts.pixel_curve(self._kept))[0]
            return self._on_curve[factor]
        assert rule == "grid", rule
        return self._on_grid

    @cached_property
    def _positive(self) -> Bools:
        if self.like:
            return self.like._positive
        positive = self.counts.truth() > 0
        if not positive.any():
            raise ValueError(
                "a segmentation threshold needs images with a defect to be chosen on, found none in validation; "
                "give the split some"
            )
        return np.asarray(positive)

    @cached_property
    def _kept(self) -> Bools:
        return self.kept_N if (self._positive & self.kept_N).any() else np.ones(len(self.counts), bool)

    @cached_property
    def _on_curve(self) -> dict[int, float]:
        """by factor"""
        return {}

    @cached_property
    def _on_grid(self) -> float:
        return float(logit(GRID)[self._swept.blackened(self._kept).dice().mean(axis=0).argmax()])

    @cached_property
    def _swept(self) -> Selected:
        return self.like._swept if self.like else self.counts.at(logit(GRID))


@dataclass(frozen=True)
class Thresholds:
    """What decides pixels and images, found together with the weights that it belongs to, and how it is applied.

    A pixel is a defect when its logit in half precision is at least `segmentation_logit`, an image when its decision
    logit in half precision is at least `decision_logit`. (That threshold is the score of an image: unrounded, another
    order of sums would decide that image anew.) Without negatives there is no decision, and that is None. With
    `blacken`, an image decided negative has an empty mask; `lower_threshold` multiplies the threshold (as a
    probability) once where an image is decided positive and its mask is empty ([2]; 1 is off).
    """

    rule: str
    factor: int
    segmentation_logit: float
    decision_logit: float | None
    blacken: bool = False
    lower_threshold: float = 1.0
    chosen_on: str = "validation"
    """the split that they were chosen on; test only where somebody asked for it"""

    def to_dict(self) -> dict[str, Any]:
        """With the probabilities, which are for reading."""
        decision = None if self.decision_logit is None else float(sigmoid(self.decision_logit))
        return asdict(self) | {
            "segmentation_probability": float(sigmoid(self.segmentation_logit)),
            "decision_probability": decision,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Thresholds:
        """The inverse of `to_dict`; what an older file does not say is off. KeyError for anything else missing,
        ValueError for a value that cannot be."""
        needed = ("rule", "factor", "segmentation_logit", "decision_logit")
        found = cls(
            **{name: values[name] for name in needed},
            blacken=values.get("blacken", False),
            lower_threshold=values.get("lower_threshold", 1.0),
            chosen_on=values.get("chosen_on", "validation"),
        )
        rules: tuple[tuple[str, bool, str], ...] = (
            ("segmentation_logit", _is_finite(found.segmentation_logit), "a finite number"),
            (
                "decision_logit",
                found.decision_logit is None or _is_finite(found.decision_logit),
                "a finite number or null",
            ),
            ("blacken", isinstance(found.blacken, bool), "true or false"),
            (
                "lower_threshold",
                _is_finite(found.lower_threshold) and 0 < found.lower_threshold <= 1,
                "a number above 0 and up to 1",
            ),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise ValueError(f"thresholds: {name} must be {wanted}, found {getattr(found, name)!r}")
        return found

    def decide(self, decision_logits_N: Array) -> Bools:
        """(N,) which images have a defect; all, where there is no decision."""
        if self.decision_logit is None:
            return np.ones(len(decision_logits_N), bool)
        return np.asarray(to_half(np.asarray(decision_logits_N)) >= to_half(np.float64(self.decision_logit)))

    def kept(self, decision_logits_N: Array) -> Bools:
        """(N,) the images that are not blackened."""
        return self.decide(decision_logits_N) if self.blacken else np.ones(len(decision_logits_N), bool)

    def select_at(self, logits_K: Floats, counts: PixelCounts, decision_logits_N: Array) -> Selected:
        """What would be predicted with other segmentation thresholds, arrays (N, K); lowered and blackened alike."""
        lowered_K = np.array([replace(self, segmentation_logit=one).lowered() for one in logits_K])
        selected = counts.at(logits_K)
        return self.of_tables(
            selected, counts.at(lowered_K) if self.lower_threshold < 1 else selected, decision_logits_N
        )

    def of_tables(self, selected: Selected, lowered: Selected, decision_logits_N: Array) -> Selected:
        """What is predicted, given what plain thresholds and lowered ones select."""
        if self.lower_threshold < 1:
            empty = self.decide(decision_logits_N)[:, None] & (selected.predicted == 0)
            selected = selected.over(
                np.where(empty, b, a) for a, b in zip(selected.tables, lowered.tables, strict=True)
            )
        return selected.blackened(self.kept(decision_logits_N))

    def select(self, counts: PixelCounts, decision_logits_N: Array) -> Selected:
        """What is predicted in each image: arrays (N, 1)."""
        return select_all([self], counts, decision_logits_N)[0]

    def mask(self, logits_HW: Array, decision_logit: float) -> Bools:
        """(H, W) the pixels of one image that are predicted to be a defect."""
        positive = bool(self.decide(np.array([decision_logit]))[0])
        scores = to_half(logits_HW).astype(np.float64)
        found = scores >= self.segmentation_logit
        if self.blacken and not positive:
            return np.zeros_like(found)
        return scores >= self.lowered() if positive and not found.any() and self.lower_threshold < 1 else found

    def lowered(self) -> float:
        """The logit of the lowered threshold."""
        if self.lower_threshold == 1:
            return self.segmentation_logit
        # In logarithms, so that a sure threshold neither overflows nor becomes 1.
        log_probability = np.log(self.lower_threshold) - np.logaddexp(0, -self.segmentation_logit)
        return float(log_probability - np.log1p(-np.exp(log_probability)))


def select_all(found: Sequence[Thresholds], counts: PixelCounts, decision_logits_N: Array) -> list[Selected]:
    """What each of some thresholds selects, arrays (N, 1), in one pass over the tables."""
    logits = [one.segmentation_logit for one in found] + [one.lowered() for one in found]
    tables = counts.at(np.array(logits))
    return [
        one.of_tables(tables.columns([k]), tables.columns([len(found) + k]), decision_logits_N)
        for k, one in enumerate(found)
    ]


def decision_threshold(labels_N: Array, scores_N: Array) -> tuple[float, float]:
    """Threshold and value of the best F measure of image scores; a score at the threshold counts as a defect."""
    return best_f_measure(curve(labels_N, scores_N))


def min_of_max(truth_NHW: Array, probability_NHW: Array) -> float:
    """Rule 1 on whole arrays. ValueError if no image has a defect, or for NaN."""
    refuse_nan(bool(np.isnan(probability_NHW).any()))
    positive = truth_NHW.reshape(len(truth_NHW), -1).any(axis=1)
    if not positive.any():
        raise ValueError("min_of_max needs an image with a defect, found none; choose the threshold on others")
    return float(probability_NHW[positive].reshape(positive.sum(), -1).max(axis=1).min())


def pr_curve(truth_NHW: Array, probability_NHW: Array, factor: int = 1) -> tuple[float, float]:
    """Rule 2 on whole arrays: (threshold, F measure) over every `factor`-th pixel, a pixel counting at >=.

    Where none of these is of the truth, the highest score and 0. ValueError for NaN.
    """
    refuse_nan(bool(np.isnan(probability_NHW).any()))
    return best_f_measure(curve(truth_NHW.ravel()[::factor], probability_NHW.ravel()[::factor]))


class Sweep(NamedTuple):
    """Means and population standard deviations over images, one value a threshold."""

    dice_mean: Floats
    dice_std: Floats
    iou_mean: Floats
    iou_std: Floats
    precision_mean: Floats
    recall_mean: Floats


def sweep(truth_NHW: Array, probability_NHW: Array, thresholds_K: Array) -> Sweep:
    """Rule 3's figures on whole arrays, for masks `probability > threshold`."""
    selected = select(truth_NHW, probability_NHW, just_above(thresholds_K), tolerance=0)
    dice, iou = selected.dice(), selected.iou()
    return Sweep(
        dice.mean(axis=0),
        dice.std(axis=0),
        iou.mean(axis=0),
        iou.std(axis=0),
        selected.precision().mean(axis=0),
        selected.recall().mean(axis=0),
    )
