"""Photos of any size, answered by a network that has seen images of one size.

Shapes: N images, H x W px; sizes are (height, width). A photo about as large as training's images is stretched to the
network's input, as they were. A larger one is cut into tiles of the size that training images had (the median) before
they were stretched, and each tile goes the way of a training image: so a crack has as many px as in training, and
FeatureNorm and the decision, which see a whole input, see one as they were taught. One that is much smaller lies in the
middle of such a tile, mirrored all around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np

from model.arrays import Array
from model.inspection import resize_image

Size = tuple[int, int]


class Answers(NamedTuple):
    """What a deployable model says of N images."""

    probability: Array
    """(N, H, W) float32 that a pixel is of a defect"""
    mask: Array
    """(N, H, W) uint8, 1 where it is taken for one"""
    score: Array
    """(N,) float32 that an image has a defect"""
    defect: Array
    """(N,) bool, whether it is taken to have one"""


Answerer = Callable[[Array], Answers]
"""answers images, uint8 (N, H, W, 3) RGB"""

OVERLAP = 1 / 4
"""Neighbouring tiles share at least this part of a side. See bench/RESULTS.md: without, seams cost Dice; more costs
time alone."""

_WHOLE = 1 / 2, 3 / 2
"""Sides from the first to the second times training's median may be stretched, where training had such images: one odd
image among its thousands must not decide what is stretched."""


@dataclass(frozen=True)
class Sizes:
    """What a network was trained on, px."""

    input: Size
    """of the network"""
    median: Size
    """of image files in training"""
    smallest: Size
    largest: Size
    """sides of image files in training"""

    @classmethod
    def of(cls, input_size: Size, images: Mapping[str, int] | None) -> Sizes:
        """From `images.json`, which may lack the smallest; without, of training images that had the size of the input.
        ValueError for what are no sizes."""
        if images is None or images == {}:
            return cls(input_size, input_size, input_size, input_size)
        if not isinstance(images, Mapping):
            raise ValueError(f"sizes of images must be an object, found {images!r}")
        median, smallest, largest = (_size(images, kind) for kind in ("", "smallest_", "largest_"))
        if median is None or largest is None:
            raise ValueError(
                f"sizes of images must have height, width, largest_height and largest_width, found {', '.join(images)}"
            )
        return cls(input_size, median, smallest or median, largest)

    def is_stretched(self, size: Size) -> bool:
        """Whether a photo of this size goes whole into the network, as training's images did."""
        return all(
            min(small, _WHOLE[0] * usual) <= side <= min(large, _WHOLE[1] * usual)
            for side, small, usual, large in zip(size, self.smallest, self.median, self.largest, strict=True)
        )


def _size(images: Mapping[str, int], kind: str) -> Size | None:
    names = f"{kind}height", f"{kind}width"
    if not any(name in images for name in names):
        return None
    for name in names:
        side = images.get(name)
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise ValueError(f"{name} of images must be a whole number above 0, found {side!r}")
    return images[names[0]], images[names[1]]


@dataclass(frozen=True)
class Span:
    """A tile along one axis, px of the photo."""

    start: int
    stop: int
    """what is cut out, [start, stop); beyond the photo it is mirrored"""
    first: int
    last: int
    """what the tile answers, [first, last)"""


@dataclass(frozen=True)
class Segmentation:
    """What a network says of a photo."""

    mask_HW: Array
    """uint8 of 0 and 1, of the photo's own size"""
    score: float
    """the largest of the tiles'"""
    defect: bool
    """whether a tile has one"""
    tiles: int


def spans(length: int, tile: int) -> list[Span]:
    """Tiles that cover `length` px, evenly spread, the first and the last flush with the ends.

    Each px is answered by the tile whose middle is nearest. A photo narrower than a tile is mirrored at both ends: that
    leaves what FeatureNorm measures nearly as it is, where a border of one colour would not, and cracks their width.
    """
    if length <= tile:
        start = -((tile - length) // 2)
        return [Span(start, start + tile, 0, length)]
    count = int(np.ceil((length - OVERLAP * tile) / (tile * (1 - OVERLAP))))
    starts = [round(k * (length - tile) / (count - 1)) for k in range(count)]
    seams = [0, *((a + tile + b) // 2 for a, b in pairwise(starts)), length]
    return [Span(start, start + tile, *ends) for start, ends in zip(starts, pairwise(seams), strict=True)]


def cuts(size: Size, sizes: Sizes) -> list[tuple[Span, Span]]:
    """The tiles of a photo: rows and columns of each."""
    if sizes.is_stretched(size):
        return [(Span(0, size[0], 0, size[0]), Span(0, size[1], 0, size[1]))]
    rows, columns = (spans(side, tile) for side, tile in zip(size, sizes.median, strict=True))
    return [(row, column) for row in rows for column in columns]


def segment(
    photo_HWC: Array, answer: Answerer, sizes: Sizes, told: Callable[[int, int], Any] | None = None
) -> Segmentation:
    """One tile after another, so that a network's memory does not grow with the photo. `told` hears of every tile.

    FloatingPointError if the network returns a number that is not finite.
    """
    mask_HW = np.zeros(photo_HWC.shape[:2], np.uint8)
    score, defect, tiles = -np.inf, False, 0
    for piece in _answered(photo_HWC, answer, sizes, told):
        mask_HW[piece.own] = bring_back(piece.answers.mask[0], piece.size)[piece.inner]
        score, defect = max(score, float(piece.answers.score[0])), defect or bool(piece.answers.defect[0])
        tiles += 1
    return Segmentation(mask_HW, score, defect, tiles)


def probability(
    photo_HWC: Array, answer: Answerer, sizes: Sizes, told: Callable[[int, int], Any] | None = None
) -> tuple[Array, float]:
    """(H, W) float32 that a px is of a defect, and the largest of the tiles' scores; else as `segment`."""
    probability_HW = np.zeros(photo_HWC.shape[:2], np.float32)
    score = -np.inf
    for piece in _answered(photo_HWC, answer, sizes, told):
        whole_HW = resize_image(piece.answers.probability[0], piece.size)
        probability_HW[piece.own] = whole_HW[piece.inner]
        score = max(score, float(piece.answers.score[0]))
    return probability_HW, score


class _Piece(NamedTuple):
    """A tile that was answered."""

    answers: Answers
    """of one image, the tile at the size of the network's input"""
    size: Size
    """of the tile"""
    own: tuple[slice, slice]
    """the px of the photo that it answers"""
    inner: tuple[slice, slice]
    """the same px in the tile"""


def _answered(
    photo_HWC: Array, answer: Answerer, sizes: Sizes, told: Callable[[int, int], Any] | None
) -> Iterator[_Piece]:
    tiles = cuts((photo_HWC.shape[0], photo_HWC.shape[1]), sizes)
    for done, pair in enumerate(tiles, start=1):
        tile_HWC = _cut(photo_HWC, *pair)
        answers = Answers(*answer(resize_image(tile_HWC, sizes.input)[None]))
        if not (np.isfinite(answers.score).all() and np.isfinite(answers.probability).all()):
            raise FloatingPointError("the network returned a number that is not finite")
        rows, columns = pair
        yield _Piece(
            answers,
            (tile_HWC.shape[0], tile_HWC.shape[1]),
            (slice(rows.first, rows.last), slice(columns.first, columns.last)),
            (
                slice(rows.first - rows.start, rows.last - rows.start),
                slice(columns.first - columns.start, columns.last - columns.start),
            ),
        )
        if told:
            told(done, len(tiles))


def _cut(photo_HWC: Array, rows: Span, columns: Span) -> Array:
    height, width = photo_HWC.shape[:2]
    inside = photo_HWC[max(0, rows.start) : rows.stop, max(0, columns.start) : columns.stop]
    before, after = (-rows.start, rows.stop - height), (-columns.start, columns.stop - width)
    top, bottom, left, right = (max(0, beyond) for beyond in (*before, *after))
    if not any((top, bottom, left, right)):
        return np.ascontiguousarray(inside)
    return cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_REFLECT_101)


def bring_back(mask_HW: Array, size: Size) -> Array:
    """A mask of the network's input at the size of what was stretched to it.

    Where that is larger, a px takes the answer nearest to it; where it is smaller, it is set when half of it is: lines
    neither swell nor shrink.
    """
    smaller = (min(mask_HW.shape[0], size[0]), min(mask_HW.shape[1], size[1]))
    if mask_HW.shape != smaller:
        covered = cv2.resize(mask_HW.astype(np.float32), smaller[::-1], interpolation=cv2.INTER_AREA)
        mask_HW = (covered >= 0.499).astype(np.uint8)
    return cv2.resize(mask_HW, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def tiled_against_whole(
    answer: Answerer, images: Sequence[Array], truths: Sequence[Array], sizes: Sizes
) -> dict[str, float | None]:
    """Mean Dice of tiled prediction and of one pass over each whole image, on images larger than training's.

    Images have training's scale and sides that the network takes, truths are (H, W) of 0 and 1. Empty on empty is 1.
    `positives` are of the images with a defect alone; `agreement` is the mean Dice of the two predictions with each
    other. None for what cannot exist.
    """
    assert sizes.median == sizes.input, "one pass over the whole would have another scale"
    rows = []
    for image_HWC, truth_HW in zip(images, truths, strict=True):
        tiled_HW = segment(image_HWC, answer, sizes).mask_HW
        whole_HW = answer(image_HWC[None])[1][0]
        rows.append([dice(truth_HW, tiled_HW), dice(truth_HW, whole_HW), dice(whole_HW, tiled_HW)])
    positive = [row for row, truth_HW in zip(rows, truths, strict=True) if truth_HW.any()]
    tiled, whole, agreement = np.mean(rows, axis=0).tolist()
    tiled_positives, whole_positives = np.mean(positive, axis=0).tolist()[:2] if positive else (None, None)
    return {
        "images": len(rows),
        "tiled": tiled,
        "whole": whole,
        "agreement": agreement,
        "positives": len(positive),
        "tiled_positives": tiled_positives,
        "whole_positives": whole_positives,
    }


def mosaic(four: Array | Sequence[Array]) -> Array:
    """Four images or masks of one size as one of twice their sides."""
    return np.concatenate([np.concatenate(four[:2], axis=1), np.concatenate(four[2:], axis=1)])


def dice(a_HW: Array, b_HW: Array) -> float:
    """Of two masks of 0 and 1; empty on empty is 1."""
    total = np.count_nonzero(a_HW) + np.count_nonzero(b_HW)
    return 2 * np.count_nonzero((a_HW > 0) & (b_HW > 0)) / total if total else 1.0
