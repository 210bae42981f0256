"""How a segmentation threshold and a decision threshold are chosen, always on validation.

Inside the project thresholds are chosen on count tables of logits (`choose`) and applied as score >= threshold.
The three public functions take whole arrays and follow the public code, whose masks are `probability > threshold`.
Rules, with the numbers that the public code gives them:

1. min_of_max: the least, over images with a defect, of the image's largest score.
2. pr_curve: the best F measure on the precision-recall curve of every n-th pixel of the split.
3. grid: the best mean Dice on the probabilities 0.01, 0.015, ... 0.995.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from model.metrics import (
    Array,
    Bools,
    CountsBuilder,
    Curve,
    Floats,
    PixelCounts,
    Selected,
    count,
    curve,
    just_above,
    to_half,
)

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


@dataclass
class ThresholdSearch:
    """What one validation pass leaves: count tables, and the pixel curve of every n-th pixel for each factor asked.

    Feed it images in the order of the split; it holds none of them.
    """

    factors: tuple[int, ...] = (1,)
    _builder: CountsBuilder = field(default_factory=CountsBuilder)
    _strided: dict[int, CountsBuilder] = field(default_factory=dict)
    _pixels: int = 0

    def add(self, truth_HW: Array, logits_HW: Array) -> None:
        """One image: its undilated truth and its logits at full resolution."""
        scores = to_half(logits_HW)
        self._builder.add(truth_HW, scores)
        for factor in self.factors:
            if factor > 1:
                # Every n-th pixel of the flattened split: the first one here depends on the images before.
                first = -self._pixels % factor
                builder = self._strided.setdefault(factor, CountsBuilder(tolerance=0))
                pixels = truth_HW.reshape(1, -1)[:, first::factor], scores.reshape(1, -1)[:, first::factor]
                if pixels[0].size:
                    builder.add(*pixels)
        self._pixels += truth_HW.size

    def counts(self) -> PixelCounts:
        """Count tables of all images added."""
        return self._builder.build()

    def choose(self, rule: str, factor: int = 1, kept_N: Bools | None = None) -> float:
        """The threshold, a logit, that `rule` picks. Needs an image with a defect; ValueError otherwise.

        With `kept_N`, the other images are blackened before the search; where that hides every defect, no threshold
        helps, and the search goes on as if nothing were hidden.
        """
        counts = self.counts()
        positive = counts.truth > 0
        if not positive.any():
            raise ValueError(
                "a segmentation threshold needs images with a defect to be chosen on, found none in validation; "
                "give the split some"
            )
        if kept_N is None or not (positive & kept_N).any():
            kept_N = np.ones(len(counts), bool)
        if rule == "min_of_max":
            return float(counts.largest()[positive & kept_N].min())
        if rule == "pr_curve":
            strided = counts if factor == 1 else self._strided[factor].build()
            return _best_f_measure(_pixel_curve(strided.blackened(kept_N).pooled()))[0]
        assert rule == "grid", rule
        swept = counts.blackened(kept_N).at(logit(GRID))
        return float(logit(GRID)[swept.dice().mean(axis=0).argmax()])


def _pixel_curve(pooled: PixelCounts) -> Curve:
    return Curve(pooled.levels, pooled.hits.astype(float), (pooled.predicted - pooled.hits).astype(float))


def _best_f_measure(points: Curve) -> tuple[float, float]:
    """Threshold and value of the best F measure; the lowest threshold where several are best."""
    if points.true_positives[-1] == 0:
        return float(points.thresholds[0]), 0.0
    f_measure = 2 * points.precision * points.recall / (points.precision + points.recall + 1e-8)
    best = len(f_measure) - 1 - int(f_measure[::-1].argmax())
    return float(points.thresholds[best]), float(f_measure[best])


@dataclass(frozen=True)
class Thresholds:
    """What decides pixels and images, found together with the weights that it belongs to, and how it is applied.

    A pixel is a defect when its logit in half precision is at least `segmentation_logit`, an image when its decision
    logit is at least `decision_logit`; without negatives there is no decision, and that is None. With `blacken`, an
    image decided negative has an empty mask; `lower_threshold` multiplies the threshold (as a probability) once where
    an image is decided positive and its mask is empty ([2]; 1 is off).
    """

    rule: str
    factor: int
    segmentation_logit: float
    decision_logit: float | None
    blacken: bool = False
    lower_threshold: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """With the probabilities, which are for reading."""
        decision = None if self.decision_logit is None else float(sigmoid(self.decision_logit))
        return asdict(self) | {
            "segmentation_probability": float(sigmoid(self.segmentation_logit)),
            "decision_probability": decision,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Thresholds:
        """The inverse of `to_dict`; what an older file does not say is off. KeyError for anything else missing."""
        needed = ("rule", "factor", "segmentation_logit", "decision_logit")
        return cls(
            **{name: values[name] for name in needed},
            blacken=values.get("blacken", False),
            lower_threshold=values.get("lower_threshold", 1.0),
        )

    def decide(self, decision_logits_N: Array) -> Bools:
        """(N,) which images have a defect; all, where there is no decision."""
        if self.decision_logit is None:
            return np.ones(len(decision_logits_N), bool)
        return np.asarray(decision_logits_N >= self.decision_logit)

    def visible(self, counts: PixelCounts, decision_logits_N: Array) -> PixelCounts:
        """The tables as thresholds see them: blackened where that is asked for."""
        return counts.blackened(self.decide(decision_logits_N)) if self.blacken else counts

    def select(self, counts: PixelCounts, decision_logits_N: Array) -> Selected:
        """What is predicted in each image: arrays (N, 1)."""
        seen = self.visible(counts, decision_logits_N)
        selected = seen.at(self.segmentation_logit)
        if self.lower_threshold == 1.0:
            return selected
        again = self.decide(decision_logits_N)[:, None] & (selected.predicted == 0)
        lowered = seen.at(self._lowered())
        tables = [np.where(again, b, a) for a, b in zip(selected[:3], lowered[:3], strict=True)]
        return Selected(tables[0], tables[1], tables[2], selected.truth)

    def mask(self, logits_HW: Array, decision_logit: float) -> Bools:
        """(H, W) the pixels of one image that are predicted to be a defect."""
        positive = bool(self.decide(np.array([decision_logit]))[0])
        scores = to_half(logits_HW).astype(np.float64)
        found = scores >= self.segmentation_logit
        if self.blacken and not positive:
            return np.zeros_like(found)
        return scores >= self._lowered() if positive and not found.any() and self.lower_threshold < 1 else found

    def _lowered(self) -> float:
        return float(logit(self.lower_threshold * sigmoid(self.segmentation_logit)))


def decision_threshold(labels_N: Array, scores_N: Array) -> tuple[float, float]:
    """Threshold and value of the best F measure of image scores; a score at the threshold counts as a defect."""
    return _best_f_measure(curve(labels_N, scores_N))


def min_of_max(truth_NHW: Array, probability_NHW: Array) -> float:
    """Rule 1 on whole arrays. ValueError if no image has a defect."""
    positive = truth_NHW.reshape(len(truth_NHW), -1).any(axis=1)
    if not positive.any():
        raise ValueError("min_of_max needs an image with a defect, found none; choose the threshold on others")
    return float(probability_NHW[positive].reshape(positive.sum(), -1).max(axis=1).min())


def pr_curve(truth_NHW: Array, probability_NHW: Array, factor: int = 1) -> tuple[float, float]:
    """Rule 2 on whole arrays: (threshold, F measure) over every `factor`-th pixel, a pixel counting at >=."""
    truth, scores = truth_NHW.reshape(1, -1)[:, ::factor], probability_NHW.reshape(1, -1)[:, ::factor]
    builder = CountsBuilder(tolerance=0)
    builder.add(truth, scores)
    return _best_f_measure(_pixel_curve(builder.build()))


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
    selected = count(truth_NHW, probability_NHW, tolerance=0).at(just_above(thresholds_K))
    dice, iou = selected.dice(), selected.iou()
    return Sweep(
        dice.mean(axis=0),
        dice.std(axis=0),
        iou.mean(axis=0),
        iou.std(axis=0),
        selected.precision().mean(axis=0),
        selected.recall().mean(axis=0),
    )
