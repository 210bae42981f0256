"""Count tables: how many pixels of an image score at least this much. Every figure at every threshold follows from
them, so that one pass over a split answers all thresholds exactly, and neither images nor maps are held.

Scores are logits in half precision, as 65,536 codes of the same order. Shapes: N images, H x W px, K thresholds, M rows
of a table. A score selects a pixel when score >= threshold.

The functions that take `xp` count with numpy or with torch, whichever it is, on the device where the arrays are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from model.arrays import Array, Bools, Floats, Ints
from model.curves import Curve

TOLERANCE = 2
"""px within which the crack papers' F1 forgives a pixel"""

_EPSILON = 1e-15
_LARGEST = 65504.0
"""the largest number of half precision"""

_CODES = 1 << 16
_LOWEST_CODE = -(1 << 15)
_CODE_OF_INFINITY = 0x7C00

ROW = np.dtype([("code", "i2"), ("background", "i4"), ("margin", "i4"), ("truth", "i4"), ("reached", "i4")])
"""One distinct score of an image, and how many pixels have just it: outside the truth and far from it; outside within
the tolerance; of the truth; and of the truth with this as the best score within the tolerance."""

_KINDS = ("background", "margin", "truth", "reached")

_ROWS_AT_ONCE = 1 << 17
"""of a table that are summed up at a time"""


def to_half(logits: Any) -> Any:
    """Logits (numpy or torch) as every part of this project compares them: rounded to half precision, no infinities.

    Probabilities would not do: in half precision only 206 values lie above 0.9, so that sure scores become equal.
    """
    finite = logits.clip(-_LARGEST, _LARGEST)
    return finite.half() if hasattr(finite, "half") else finite.astype(np.float16)


def codes(xp: Any, half: Any) -> Any:
    """Half-precision numbers as int16 of the same order; 0 and -0 are 0."""
    bits = half.view(xp.int16)
    ordered = bits ^ ((bits >> 15) & 0x7FFF)
    return ordered + (ordered == -1)


def scores_of(codes_M: Array) -> Floats:
    """The inverse of `codes`."""
    ordered = np.ascontiguousarray(codes_M, np.int16)
    return (ordered ^ ((ordered >> 15) & np.int16(0x7FFF))).view(np.float16).astype(np.float64)


def least_codes(thresholds_K: Array) -> Ints:
    """(K,) the lowest code that each threshold selects; 32768, which is no code, where it selects nothing."""
    half = to_half(np.asarray(thresholds_K, np.float64))
    least = codes(np, half).astype(np.int64) + (half.astype(np.float64) < thresholds_K)
    least = np.where(np.asarray(thresholds_K) > _LARGEST, -_LOWEST_CODE, least)
    return np.where(np.isneginf(thresholds_K), _LOWEST_CODE, least)


def spread(xp: Any, values_HW: Any, distance: int) -> Any:
    """The largest value (uint8 or int16) within a cross with arms of `distance` px, the public code's 5x5 cross for 2.

    Of a 0/1 mask this is the dilated mask; of scores, what the dilated prediction selects at each threshold. With torch
    also of a batch (B, H, W).
    """
    if distance == 0:
        return values_HW
    if xp is np:
        size = 2 * distance + 1
        return cv2.dilate(values_HW, cv2.getStructuringElement(cv2.MORPH_CROSS, (size, size)))
    best = values_HW + 0
    for step in range(1, distance + 1):
        for shifted, source in (
            (best[..., step:, :], values_HW[..., :-step, :]),
            (best[..., :-step, :], values_HW[..., step:, :]),
            (best[..., step:], values_HW[..., :-step]),
            (best[..., :-step], values_HW[..., step:]),
        ):
            xp.maximum(shifted, source, out=shifted)
    return best


def tally(xp: Any, half_HW: Any, truth_HW: Any, tolerance: int = TOLERANCE) -> tuple[Any, ...]:
    """The columns of ROW for one image, codes rising, on the device of the arrays. The truth is uint8, 0 or 1."""
    codes_HW = codes(xp, half_HW)
    truth = _positions(xp, truth_HW)
    near = _positions(xp, spread(xp, truth_HW, tolerance))
    pixels = _histogram(xp, codes_HW.ravel())
    present = xp.where(pixels > 0)[0]
    # Few pixels are of the truth or near it: picking them out is cheaper than a histogram of all kinds.
    pixels, near_it, inside, reached = (
        table[present]
        for table in (
            pixels,
            _histogram(xp, codes_HW.ravel()[near]),
            _histogram(xp, codes_HW.ravel()[truth]),
            _histogram(xp, spread(xp, codes_HW, tolerance).ravel()[truth]),
        )
    )
    return present + _LOWEST_CODE, pixels - near_it, near_it - inside, inside, reached


def _histogram(xp: Any, codes_P: Any) -> Any:
    """(65536,) how often each code occurs, the lowest code first."""
    # Unsigned, numpy counts without a copy in between; torch knows no such numbers.
    from_0 = codes_P.view(np.uint16) ^ 0x8000 if xp is np else xp.asarray(codes_P, dtype=xp.int32) - _LOWEST_CODE
    return xp.bincount(from_0, minlength=_CODES)


def _positions(xp: Any, mask_HW: Any) -> Any:
    """Where a flattened 0/1 mask is 1."""
    return xp.where(mask_HW.ravel() > 0)[0]


class Selected(NamedTuple):
    """Pixels that K thresholds select in N images."""

    predicted: Ints
    """(N, K)"""
    hits: Ints
    """(N, K) of these, pixels of the truth"""
    grown_hits: Ints
    """(N, K) of these, pixels within the tolerance of the truth"""
    found: Ints
    """(N, K) pixels of the truth within the tolerance of a predicted one"""
    truth: Ints
    """(N, 1) pixels of the truth"""
    pixels: Ints
    """(N, 1) all pixels"""

    @property
    def tables(self) -> tuple[Ints, Ints, Ints, Ints]:
        """What depends on the threshold."""
        return self.predicted, self.hits, self.grown_hits, self.found

    def over(self, tables: Iterable[Ints]) -> Selected:
        """Other tables over the same truth."""
        predicted, hits, grown_hits, found = tables
        return Selected(predicted, hits, grown_hits, found, self.truth, self.pixels)

    def columns(self, chosen_K: Any) -> Selected:
        """Some of the thresholds."""
        return self.over(table[:, chosen_K] for table in self.tables)

    def rows(self, chosen_N: Any) -> Selected:
        """Some of the images."""
        return Selected(*(table[chosen_N] for table in self))

    def blackened(self, kept_N: Bools) -> Selected:
        """The same with nothing predicted in the other images."""
        return self.over(table * kept_N[:, None] for table in self.tables)

    def pooled(self) -> Selected:
        """All images as one: arrays (1, K)."""
        return Selected(*(table.sum(axis=0, keepdims=True) for table in self))

    def dice(self) -> Floats:
        return (2 * self.hits + _EPSILON) / (self.predicted + self.truth + _EPSILON)

    def iou(self) -> Floats:
        return (self.hits + _EPSILON) / (self.predicted + self.truth - self.hits + _EPSILON)

    def precision(self) -> Floats:
        return (self.hits + _EPSILON) / (self.predicted + _EPSILON)

    def recall(self) -> Floats:
        return (self.hits + _EPSILON) / (self.truth + _EPSILON)

    def two_pixel(self) -> tuple[Floats, Floats, Floats]:
        """Precision, "recall" and F1 as the public code has them: hits and false alarms against the grown truth,
        misses against the truth as drawn (so the second is no recall). Empty predictions score 0."""
        misses = self.truth - self.hits
        precision = self.grown_hits / np.maximum(self.predicted, 1)
        recall = self.grown_hits / np.maximum(self.grown_hits + misses, 1)
        return precision, recall, 2 * precision * recall / np.maximum(precision + recall, _EPSILON)

    def tolerant(self) -> tuple[Floats, Floats, Floats]:
        """Precision, recall and F1 that forgive the tolerance on both sides: predicted pixels near the truth, and
        pixels of the truth near the prediction. Empty against empty scores 1."""
        precision = (self.grown_hits + _EPSILON) / (self.predicted + _EPSILON)
        recall = (self.found + _EPSILON) / (self.truth + _EPSILON)
        return precision, recall, 2 * precision * recall / np.maximum(precision + recall, _EPSILON)


@dataclass(frozen=True)
class PixelCounts:
    """Count tables of N images. Image n owns rows offsets[n]:offsets[n + 1], codes rising."""

    rows: Array
    """(M,) of ROW; may be mapped from a file"""
    offsets: Ints
    """(N + 1,)"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, n: int) -> Array:
        """The rows of one image."""
        return self.rows[self.offsets[n] : self.offsets[n + 1]]

    def at(self, thresholds_K: Array | float) -> Selected:
        """What thresholds, logits, select in each image."""
        least, column_K = np.unique(least_codes(np.atleast_1d(thresholds_K)), return_inverse=True)
        reached = np.searchsorted(least, np.arange(_LOWEST_CODE, -_LOWEST_CODE), side="right")  # how many, by code
        sums = np.empty((len(_KINDS), len(self), len(least) + 1), np.int64)
        for images, rows, image_M in self._chunks():
            places = image_M * sums.shape[2] + reached[rows["code"].astype(np.int64) - _LOWEST_CODE]
            shape = len(images), sums.shape[2]
            for kind, name in enumerate(_KINDS):
                # The sums are exact: what numpy adds up here is float64, and an image has far less than 2^53 pixels.
                sums[kind, images] = np.bincount(places, rows[name], math.prod(shape)).reshape(shape)
        background, margin, truth, grown_truth = sums[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
        pixels = background + margin + truth
        predicted, hits, grown_hits, found = (
            table[:, 1:][:, column_K] for table in (pixels, truth, margin + truth, grown_truth)
        )
        return Selected(predicted, hits, grown_hits, found, truth[:, :1], pixels[:, :1])

    def _chunks(self, images: Ints | None = None) -> Iterator[tuple[Ints, Array, Ints]]:
        """Some images, rising (all, if none are named), their rows, and which of these images each row is of: so many
        at a time that memory stays bounded and arithmetic on arrays pays."""
        images = np.arange(len(self)) if images is None else images
        lengths = np.diff(self.offsets)[images]
        chunk = np.cumsum(lengths) // _ROWS_AT_ONCE
        for part in np.split(np.arange(len(images)), np.flatnonzero(np.diff(chunk)) + 1):
            if len(part):
                few = images[part]
                adjacent = few[-1] - few[0] == len(few) - 1
                rows = (
                    self.rows[self.offsets[few[0]] : self.offsets[few[-1] + 1]]
                    if adjacent
                    else np.concatenate([self.of(n) for n in few])
                )
                yield few, rows, np.repeat(np.arange(len(few)), lengths[part])

    def pixel_curve(self, kept_N: Bools) -> Curve:
        """All pixels of all images as one. Those of images that are not kept have no score, -infinity."""
        return _curve(self._dense(None, kept_N))

    def curves_without(self, kept_N: Bools, groups_N: Ints) -> Iterator[Curve]:
        """The same without one group of images after another, in the order of their codes."""
        whole = self._dense(None, kept_N)
        for group in np.unique(groups_N):
            yield _curve(whole - self._dense(np.flatnonzero(groups_N == group), kept_N))

    def _dense(self, images: Ints | None, kept_N: Bools) -> Ints:
        """(2, 65537) pixels inside and outside the truth by score, those without one first; of all images, if none are
        named."""
        dense = np.zeros((2, 1 + _CODES), np.int64)
        for few, rows, image_M in self._chunks(images):
            at = rows["code"].astype(np.int64) - (_LOWEST_CODE - 1)
            if not kept_N[few].all():
                at *= kept_N[few][image_M]
            dense[0] += np.bincount(at, rows["truth"], 1 + _CODES).astype(np.int64)
            dense[1] += np.bincount(at, rows["background"] + rows["margin"], 1 + _CODES).astype(np.int64)
        return dense

    def truth(self) -> Ints:
        """(N,) pixels of the truth"""
        sums = [np.bincount(image_M, rows["truth"], len(few)) for few, rows, image_M in self._chunks()]
        return np.concatenate([np.empty(0), *sums]).astype(np.int64)

    def largest(self) -> Floats:
        """(N,) the largest score of each image"""
        return scores_of(self.rows["code"][self.offsets[1:] - 1])

    def arrays(self) -> dict[str, Array]:
        """What `from_arrays` takes back, for an .npz file; column by column, which compresses better."""
        return {"counts_offsets": self.offsets} | {f"counts_{name}": self.rows[name] for name in ROW.names or ()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> PixelCounts:
        """The inverse of `arrays`."""
        rows = np.empty(len(arrays["counts_code"]), ROW)
        for name in ROW.names or ():
            rows[name] = arrays[f"counts_{name}"]
        return cls(rows, arrays["counts_offsets"])


def _curve(dense: Ints) -> Curve:
    present = np.flatnonzero(dense.any(axis=0))[::-1]
    scores = np.where(present > 0, scores_of(present - 1 + _LOWEST_CODE), -np.inf)
    return Curve(scores, *np.cumsum(dense[:, present], axis=1).astype(np.float64))


class CountsBuilder:
    """Collects the tables of one image after another in a file that nobody else sees, so that memory does not grow
    with the number of images."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="segdec-counts-")  # noqa: SIM115  (lives as long as this object)
        self._lengths: list[int] = []

    def add(self, columns: tuple[Any, ...]) -> None:
        """The next image's columns, as `tally` returns them."""
        on_host = [column if isinstance(column, np.ndarray) else column.cpu().numpy() for column in columns]
        rows = np.empty(len(on_host[0]), ROW)
        for name, column in zip(ROW.names or (), on_host, strict=True):
            rows[name] = column
        self.extend(rows, [len(rows)])

    def extend(self, rows: Array, lengths: Sequence[int]) -> None:
        """The rows of the next images, one after another, and how many each has."""
        self._file.write(rows.data)
        self._lengths += lengths

    def build(self) -> PixelCounts:
        """The tables of all images added so far, mapped from the file."""
        self._file.flush()
        rows = np.memmap(self._file, ROW, "r") if any(self._lengths) else np.empty(0, ROW)
        return PixelCounts(rows, np.cumsum([0, *self._lengths]))


def select(truth_NHW: Array, scores_NHW: Array, thresholds_K: Array, tolerance: int) -> Selected:
    """What `scores >= threshold` selects, for scores of any kind and without tables: one histogram an image. Half
    precision is counted by its codes; all else by a search among the thresholds, which is slower and as exact.

    Any truth but 0 is 1. ValueError for scores that are NaN, and for more than 32,766 thresholds.
    """
    codes_of, least = _coding(scores_NHW.dtype, np.asarray(thresholds_K, np.float64))

    def of_many(codes_HW: Array) -> Ints:
        above = _histogram(np, codes_HW.ravel())[::-1].cumsum()[::-1]
        return np.append(above, 0)[least - _LOWEST_CODE]

    def of_few(codes_P: Array) -> Ints:
        return len(codes_P) - np.searchsorted(np.sort(codes_P), least)

    out = np.empty((4, len(truth_NHW), len(least)), np.int64)
    whole = np.empty((2, len(truth_NHW), 1), np.int64)
    for n, (truth_HW, scores_HW) in enumerate(zip(truth_NHW, scores_NHW, strict=True)):
        mask_HW = (np.asarray(truth_HW) != 0).astype(np.uint8)
        codes_HW = codes_of(scores_HW)
        truth = _positions(np, mask_HW)
        out[:2, n] = of_many(codes_HW), of_few(codes_HW.ravel()[truth])
        if tolerance:
            near = _positions(np, spread(np, mask_HW, tolerance))
            best_HW = spread(np, codes_HW, tolerance)
            out[2:, n] = of_few(codes_HW.ravel()[near]), of_few(best_HW.ravel()[truth])
        else:
            out[2:, n] = out[1, n]
        whole[:, n, 0] = len(truth), mask_HW.size
    return Selected(*out, *whole)


def _coding(dtype: Any, thresholds_K: Floats) -> tuple[Callable[[Array], Array], Ints]:
    """How scores become int16 codes of the same order, and the lowest code that each threshold selects."""
    if dtype == np.float16:
        return _codes_of_half, least_codes(thresholds_K)
    # A score's code is how many of the thresholds it reaches.
    ordered = np.sort(thresholds_K)
    if len(ordered) >= -_LOWEST_CODE - 1:
        raise ValueError(
            f"at most {-_LOWEST_CODE - 2:,} thresholds can be tried at a time, found {len(ordered):,}; "
            "pass them in parts"
        )

    def codes_of_any(scores_HW: Array) -> Array:
        refuse_nan(bool(np.isnan(scores_HW).any()))
        return np.searchsorted(ordered, scores_HW, side="right").astype(np.int16)

    return codes_of_any, np.searchsorted(ordered, thresholds_K) + 1


def _codes_of_half(half_HW: Array) -> Array:
    half = np.ascontiguousarray(half_HW)
    bits = half.view(np.int16)
    found = bits if bits.min() >= 0 else codes(np, half)  # probabilities are their own codes
    refuse_nan(found.max() > _CODE_OF_INFINITY or found.min() < -_CODE_OF_INFINITY - 1)
    return found


def refuse_nan(found: bool) -> None:
    """ValueError if there is one."""
    if found:
        raise ValueError("scores must be numbers, found NaN; the network that gave them has diverged")
