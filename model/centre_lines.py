"""How well thin defects are followed, whatever their width: by the centre lines of truth and mask.

clDice: Shit et al., CVPR 2021, equation 1 to 3. Centre-line IoU within a tolerance: the figure of OmniCrack30k (Benz
and Rodehorst, CVPR workshops 2024). Both per image; empty against empty scores 1, empty against something 0.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from model.arrays import Array, Floats, Ints

TOLERANCE = 4
"""px within which two centre lines are one"""


class CentreLines(NamedTuple):
    """Pixels of centre lines of N images, each (N,)."""

    predicted: Ints
    predicted_in_truth: Ints
    """of the mask's centre line inside the truth"""
    predicted_near: Ints
    """of the mask's centre line within the tolerance of the truth's"""
    truth: Ints
    truth_in_predicted: Ints
    """of the truth's centre line inside the mask"""
    truth_near: Ints
    """of the truth's centre line within the tolerance of the mask's"""

    def dice(self) -> Floats:
        """(N,) clDice: the harmonic mean of the shares of each centre line inside the other's area."""
        precision = self.predicted_in_truth / np.maximum(self.predicted, 1)
        recall = self.truth_in_predicted / np.maximum(self.truth, 1)
        both = 2 * precision * recall / np.maximum(precision + recall, 1e-15)
        return np.where((self.predicted == 0) & (self.truth == 0), 1.0, both)

    def iou(self) -> Floats:
        """(N,) matched pixels of the mask's centre line, over these, its others and the truth's unmatched ones."""
        union = self.predicted + self.truth - self.truth_near
        return np.where(union == 0, 1.0, self.predicted_near / np.maximum(union, 1))


def trace(truth_HW: Array, mask_HW: Array) -> CentreLines:
    """One image's counts."""
    predicted, truth = _centre_line(mask_HW), _centre_line(truth_HW)
    return CentreLines(
        predicted.sum(),
        (predicted & (truth_HW > 0)).sum(),
        (predicted & _near(truth)).sum(),
        truth.sum(),
        (truth & (mask_HW > 0)).sum(),
        (truth & _near(predicted)).sum(),
    )


def _centre_line(mask_HW: Array) -> Array:
    # Imported on use: a machine that only trains needs no scikit-image.
    from skimage.morphology import skeletonize

    return np.asarray(skeletonize(np.asarray(mask_HW) > 0))


def _near(line_HW: Array) -> Array:
    if not line_HW.any():
        return np.zeros_like(line_HW)
    far = cv2.distanceTransform((~line_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(far <= TOLERANCE + 1e-3)
