"""Losses and their weights. B images, H x W px; logits everywhere, computed in float32 or wider.

L = lambda * L_segmentation + (1 - lambda) * delta * L_decision [1] (papers: model/config.py).
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from model.arrays import Array, Floats


def segmentation_losses(
    logits_B1HW: Tensor,
    target_B1HW: Tensor,
    segmented_B: Tensor,
    weight_B1HW: Tensor | None = None,
    positive_weight: float = 1.0,
) -> Tensor:
    """(B,) each image's mean binary cross-entropy; 0 for an image without a mask.

    `positive_weight` multiplies the part of defect pixels, `weight_B1HW` all of a pixel.
    """
    logits = _wide(logits_B1HW)
    loss_B1HW = F.binary_cross_entropy_with_logits(
        logits, target_B1HW.to(logits.dtype), weight_B1HW, reduction="none", pos_weight=_factor(positive_weight, logits)
    )
    return loss_B1HW.mean(dim=(1, 2, 3)) * segmented_B


def segmentation_loss(
    logits_B1HW: Tensor, target_B1HW: Tensor, segmented_B: Tensor, weight_B1HW: Tensor | None = None
) -> Tensor:
    """Mean over the batch of `segmentation_losses`."""
    return segmentation_losses(logits_B1HW, target_B1HW, segmented_B, weight_B1HW).mean()


def decision_loss(logits_B1: Tensor, labels_B1: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy of the image label; `positive_weight` multiplies the part of positives."""
    logits = _wide(logits_B1)
    weight = _factor(positive_weight, logits)
    return F.binary_cross_entropy_with_logits(logits, labels_B1.to(logits.dtype), pos_weight=weight)


def _factor(value: float, like: Tensor) -> Tensor | None:
    return None if value == 1.0 else like.new_full((), value)  # no copy from the host, which cannot be recorded


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.itemsize >= 4 else logits.float()


def balance(epoch: int, epochs: int, delta: float, dynamic: bool) -> tuple[float, float]:
    """Weights of the segmentation and the decision loss in an epoch counted from 0 [1].

    With `dynamic`, lambda = 1 - epoch / epochs, so the first epoch trains the segmentation alone and the last one has
    lambda = 1 / epochs; without, both weights are constant: 1 and delta.
    """
    if not dynamic:
        return 1.0, delta
    share = 1 - epoch / epochs
    return share, (1 - share) * delta


def distance_weight(mask_HW: Array, p: float, maximum: float, per: str = "image") -> Floats:
    """Loss weight of each pixel [1]: 1 on background, maximum * (d / d_max)^p on a defect.

    d is the Euclidean distance to the defect's edge; d_max its largest value, over the image as in the paper or
    (`per="component"`) over each 8-connected component, as the public code has it since. An empty mask weighs 1.
    """
    if per not in ("image", "component"):
        raise ValueError(f"per must be 'image' or 'component', found {per!r}")
    mask = np.asarray(mask_HW) > 0
    distance = _distance_to_edge(mask)
    if per == "image":
        largest = np.full_like(distance, distance.max(initial=0))
    else:
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        components = np.arange(labels.max() + 1)
        largest = np.asarray(ndimage.maximum(distance, labels, components))[labels]
    weight = np.ones(mask.shape)
    weight[mask] = maximum * (distance[mask] / largest[mask]) ** p
    return weight


_LONGEST_EXACT = 1000.0
"""px: a distance in float32 up to this one gives away which whole number is its square"""


def _distance_to_edge(mask_HW: Array) -> Floats:
    """What scipy's distance_transform_edt says of each pixel, to the bit, in a fraction of its time."""
    near = cv2.distanceTransform(mask_HW.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if near.max(initial=0) > _LONGEST_EXACT:  # also where all is defect, so that there is no edge
        return np.asarray(ndimage.distance_transform_edt(mask_HW))
    return np.sqrt(np.rint(near.astype(np.float64) ** 2))
