"""Pictures that look alike on two sides of a split, by a perceptual hash (imagehash's pHash, 16 x 16 bits).

Measured on 418 real crack images: two different ones differ in 90 bits and more (in 60 where crops overlap); a copy as
JPEG of quality 50, at half the size, brighter or moved by 4 px in 36 at most, but for one image in a hundred. A copy
that is cropped, flipped or turned is not found; plain surfaces that hardly differ are. So this is a hint to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from model.arrays import Array
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
    hashes = [_packed(perceptual_hashes([s.image for s in split])) for split in splits]
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


def different_first(values: Sequence[float], groups: Sequence[str], hashes_NB: Array) -> list[tuple[int, int]]:
    """Rows in an order that takes the largest value first, but counts the second of a kind half, the third a third.

    Of a kind are images of one group (an empty name is none) and near-duplicates. Each row comes with the place that
    it has among its kind, from 1. Of equal values the earlier row comes first. `hashes_NB` are perceptual hashes.
    """
    names = np.array(groups, object)
    packed = _packed(hashes_NB)
    left = np.array(values, np.float64)
    place = np.ones(len(left), np.int64)
    is_left = np.ones(len(left), bool)
    order = []
    for _ in range(len(left)):
        row = int(np.where(is_left, left / place, -np.inf).argmax())
        order.append((row, int(place[row])))
        is_left[row] = False
        is_alike = np.bitwise_count(packed ^ packed[row]).sum(axis=1, dtype=np.int64) <= NEAR_BITS
        place += is_alike | ((names == names[row]) & bool(names[row]))
    return order


def _packed(hashes_NB: Array) -> Array:
    """(N, B / 64) uint64"""
    return np.packbits(hashes_NB, axis=1).view(np.uint64)
