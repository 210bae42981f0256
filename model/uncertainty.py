"""How much of a network's answer to a photo is likely to be wrong, which is what a mask of that photo would correct.

Shapes: H x W px. A network of this project is not calibrated, but its thresholds were found on validation: so a
probability is taken relative to its threshold, and the photo is asked four times, as it is and mirrored. For each px

- p_v: what view v says, moved so that the threshold lies at 1/2; p: the mean over views; the mask M is where p >= 1/2;
- q: that the photo has a defect at all: its label where that is known, else the decision, moved in the same way. At its
  threshold a decision says nothing, so a defect is `possible` by min(1, 2 q) and `certain` by max(0, 2 q - 1);
- a px is a defect with `possible` p, and so expected to be wrong with 1 less that inside of M, and with that outside.

The sum over px, in parts: `doubt`, what each view is unsure of by itself, the mean of min(p_v, 1 - p_v) (the error of
the better answer, Lewis and Gale 1994); `disagreement`, what the mean of views is unsure of beyond that, min(p, 1 - p)
less the mean of min(p_v, 1 - p_v) (the difference of Houlsby et al. 2011 and of Gal, Islam and Ghahramani 2017 with the
error for the entropy, and views as in Wang et al. 2019 for draws of a network); `contradiction`, what speaks against
the mask as a whole. Divided by the px of defect and mask together it is one less the Dice that is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from model import tiles
from model.arrays import Array, Bools
from model.thresholds import Thresholds

VIEWS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1))
"""axes along which the photo is mirrored"""

_LARGEST_LOGIT = 80.0
"""e to this power is a number in single precision"""


@dataclass(frozen=True)
class Uncertainty:
    """What is uncertain about one photo."""

    pixels: int
    """of the photo"""
    mask: int
    """px of the mask"""
    doubt: float
    """px"""
    disagreement: float
    """px"""
    held: float
    """px of defect that pixels alone expect"""
    held_in_mask: float
    """px, of these"""
    possible: float
    """0 to 1; 1 where there is neither label nor decision"""
    certain: float
    """0 to 1; 0 where there is neither"""
    decision: float | None
    """that the photo has a defect, 1/2 at the threshold; None where the network has learnt no decision"""

    @property
    def defect(self) -> float:
        """px of defect that are expected"""
        return self.possible * self.held

    def contradiction(self, usual: float) -> float:
        """px of the mask as far as there is no defect; where the mask is empty, the px of a usual defect that no pixel
        expects, as far as there is one. `usual` is the share of a photo that a defect takes."""
        if self.mask:
            return (1 - self.possible) * self.held_in_mask
        return self.certain * max(0.0, usual * self.pixels - self.held)

    def score(self, usual: float) -> float:
        """One less the Dice that is expected, from 0 to 1. Photos with less of a defect than usual are measured against
        a usual one: of an empty mask on an empty photo any wrong px would be all."""
        wrong = self.doubt + self.disagreement + self.contradiction(usual)
        whole = max(self.held + self.mask, usual * self.pixels)
        return float(min(1.0, wrong / whole)) if whole else 0.0


class Maps(NamedTuple):
    """The same, px by px."""

    error_HW: Array
    """float32, 0 to 1/2: that a px of the mask is wrong, whatever the photo as a whole has"""
    mask_HW: Bools


def usual_share(found: Iterable[Uncertainty]) -> float:
    """The share of a photo that a defect takes: the median over the photos whose mask has any px; where none has, over
    what pixels alone expect in all of them."""
    found = list(found)
    shares = [one.mask / one.pixels for one in found if one.mask] or [one.held / one.pixels for one in found]
    return float(np.median(shares)) if shares else 0.0


def look(
    photo_HWC: Array,
    answer: tiles.Answerer,
    sizes: tiles.Sizes,
    thresholds: Thresholds,
    label: bool | None = None,
    told: Callable[[int, int], Any] | None = None,
) -> tuple[Uncertainty, Maps]:
    """Asks a network about a photo and its mirror images; `label` is what is known of the photo. `told` hears of every
    tile. FloatingPointError if the network returns a number that is not finite."""
    mean_HW = np.zeros(photo_HWC.shape[:2], np.float32)
    own_HW = np.zeros_like(mean_HW)
    decisions = []
    for done, axes in enumerate(VIEWS):

        def told_of_all(tile: int, count: int, before: int = done) -> None:
            if told:
                told(before * count + tile, len(VIEWS) * count)

        view_HWC = np.ascontiguousarray(np.flip(photo_HWC, axes))
        found_HW, score = tiles.probability(view_HWC, answer, sizes, told_of_all)
        moved_HW = np.flip(relative(found_HW, thresholds.segmentation_logit), axes)
        mean_HW += moved_HW / len(VIEWS)
        own_HW += np.minimum(moved_HW, 1 - moved_HW) / len(VIEWS)
        if thresholds.decision_logit is not None:
            decisions.append(float(relative(np.float64(score), thresholds.decision_logit)))
    decision = float(np.mean(decisions)) if decisions else None
    known = decision if label is None else float(label)
    possible, certain = (1.0, 0.0) if known is None else (min(1.0, 2 * known), max(0.0, 2 * known - 1))
    mask_HW = mean_HW >= 0.5
    error_HW = np.minimum(mean_HW, 1 - mean_HW)

    def expected(px_HW: Array) -> float:
        inside = float(px_HW.sum(where=mask_HW, dtype=np.float64))
        return inside + possible * float(px_HW.sum(where=~mask_HW, dtype=np.float64))

    figures = Uncertainty(
        pixels=int(mask_HW.size),
        mask=int(np.count_nonzero(mask_HW)),
        doubt=expected(own_HW),
        disagreement=max(0.0, expected(error_HW) - expected(own_HW)),
        held=float(mean_HW.sum(dtype=np.float64)),
        held_in_mask=float(mean_HW.sum(where=mask_HW, dtype=np.float64)),
        possible=possible,
        certain=certain,
        decision=decision,
    )
    return figures, Maps(error_HW, mask_HW)


def relative(probability: Any, threshold_logit: float) -> Any:
    """Probabilities moved so that the threshold lies at 1/2: their logits less the threshold's."""
    odds = np.exp(np.clip(threshold_logit, -_LARGEST_LOGIT, _LARGEST_LOGIT)).astype(np.float32)
    return probability / (probability + (1 - probability) * odds)
