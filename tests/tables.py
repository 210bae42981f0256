"""Count tables of whole arrays, for tests."""

import numpy as np

from model.arrays import Array
from model.counts import TOLERANCE, CountsBuilder, PixelCounts, tally, to_half


def count(truth_NHW: Array, logits_NHW: Array, tolerance: int = TOLERANCE) -> PixelCounts:
    builder = CountsBuilder()
    for truth_HW, logits_HW in zip(truth_NHW, logits_NHW, strict=True):
        mask_HW = (np.asarray(truth_HW) != 0).astype(np.uint8)
        builder.add(tally(np, to_half(np.asarray(logits_HW)), mask_HW, tolerance))
    return builder.build()
