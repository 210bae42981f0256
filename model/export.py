"""A network and its thresholds as one module that answers as training judged: from pixels of an image file to a mask.

Shapes: N images, H x W px.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from model.counts import to_half
from model.network import SegDecNet
from model.thresholds import Thresholds


class Deployable(nn.Module):
    """Scaling, network, sigmoid, thresholds and the rule of the decision in one, in single precision.

    `forward(image)`: uint8 (N, H, W, 3) RGB, of a size that the network accepts (`model.config.input_size_problem`), ->
    - `probability` float32 (N, H, W) that a pixel is of a defect;
    - `mask` uint8 (N, H, W), 1 where it is taken for one: what `Thresholds.mask` finds, bit for bit;
    - `score` float32 (N) that an image has a defect; and
    - `defect` bool (N), whether it is taken to have one: what `Thresholds.decide` finds.

    A network that was trained without negatives has learnt no decision. `defect` then says whether the mask has any
    pixel, and `score` is the largest probability, which is what decides that.
    """

    def __init__(self, network: SegDecNet, thresholds: Thresholds) -> None:
        super().__init__()
        self.network = network.float().eval()
        self.thresholds = thresholds
        self._pixel = least_single(thresholds.segmentation_logit)
        self._lowered = least_single(thresholds.lowered())
        decision = thresholds.decision_logit
        self._image = None if decision is None else least_single(float(to_half(np.float64(decision))))

    def forward(self, image_NHWC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(probability, mask, score, defect)"""
        decision_N1, segmentation_N1HW = self.network(image_NHWC.permute(0, 3, 1, 2).float() / 255)
        return self.decide(decision_N1[:, 0], segmentation_N1HW[:, 0])

    def decide(self, decision_N: Tensor, segmentation_NHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from the network's logits, which are finite."""
        found_NHW = segmentation_NHW >= self._pixel
        largest_N = segmentation_NHW.amax(dim=(1, 2))
        positive_N = None if self._image is None else decision_N >= self._image
        if self.thresholds.lower_threshold < 1:
            is_lowered_N = largest_N < self._pixel
            if positive_N is not None:
                is_lowered_N = is_lowered_N & positive_N
            found_NHW = found_NHW | (is_lowered_N[:, None, None] & (segmentation_NHW >= self._lowered))
        if positive_N is not None and self.thresholds.blacken:
            found_NHW = found_NHW & positive_N[:, None, None]
        if positive_N is None:
            score_N, defect_N = torch.sigmoid(largest_N), largest_N >= self._lowered
        else:
            score_N, defect_N = torch.sigmoid(decision_N), positive_N
        return torch.sigmoid(segmentation_NHW), found_NHW.to(torch.uint8), score_N, defect_N


def least_single(threshold: float) -> float:
    """The least number in single precision that reaches a threshold once it is rounded to half precision (`to_half`);
    -inf where all numbers do, inf where none does.

    Comparing with it is comparing in half precision, and no runtime can optimise the rounding away.
    """
    half = to_half(np.float64(threshold))
    with np.errstate(over="ignore"):  # beyond the largest lies infinity
        if float(half) < threshold:
            half = np.nextafter(half, np.float16(np.inf))
        below = np.nextafter(half, np.float16(-np.inf))
    if np.isinf(half):
        return float("inf")
    if np.isinf(below):
        return float("-inf")
    middle = np.float32((float(half) + float(below)) / 2)
    is_even = half.view(np.uint16) & 1 == 0  # to which a number in the middle is rounded
    return float(middle if is_even else np.nextafter(middle, np.float32(np.inf)))
