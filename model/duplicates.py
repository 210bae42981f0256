"""Pictures that look alike on two sides of a split, by a perceptual hash (imagehash's pHash, 16 x 16 bits).

Measured on 418 real crack images: two different ones differ in 90 bits and more (in 60 where crops overlap); a copy as
JPEG of quality 50, at half the size, brighter or moved by 4 px in 36 at most, but for one image in a hundred. A copy
that is cropped, flipped or turned is not found; plain surfaces that hardly differ are. So this is a hint to look at.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from model.inspection import HASH_SIDE, perceptual_hashes
from model.layouts import SPLITS
from model.splits import Splits

NEAR_BITS = 40
"""Hashes that differ in so many bits of 256 at most are near."""
_ROWS_AT_ONCE = 512


class NearDuplicate(NamedTuple):
    """Two images of different splits."""

    first: str
    second: str
    bits: int

    def __str__(self) -> str:
        return f"{self.first} and {self.second} look alike: their hashes differ in {self.bits} of {HASH_SIDE**2} bits"


def near_duplicates(splits: Splits) -> list[NearDuplicate]:
    """The pairs of images of different splits that look alike, the most alike first."""
    hashes = [np.packbits(perceptual_hashes([s.image for s in split]), axis=1).view(np.uint64) for split in splits]
    found = []
    for a, b in combinations(range(len(SPLITS)), 2):
        for start in range(0, len(hashes[a]), _ROWS_AT_ONCE):
            differing = hashes[a][start : start + _ROWS_AT_ONCE, None] ^ hashes[b][None]
            bits = np.bitwise_count(differing).sum(axis=2, dtype=np.int64)
            found += [
                NearDuplicate(
                    f"{splits[a][start + i].image} ({SPLITS[a]})",
                    f"{splits[b][j].image} ({SPLITS[b]})",
                    int(bits[i, j]),
                )
                for i, j in np.argwhere(bits <= NEAR_BITS).tolist()
            ]
    return sorted(found, key=lambda pair: (pair.bits, pair))
