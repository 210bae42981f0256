"""How long and how wide cracks are, by the centre line of a mask. All in px of the mask.

The centre line is the skeleton of Lee, Kashyap and Chu, CVGIP 1994 (that of Zhang and Suen loses half of a diagonal
line of even width). Its length is that of Vossepoel and Smeulders, Computer Graphics and Image Processing 20 (1982):
0.980 for a straight step, 1.406 for a diagonal one, less 0.091 for each change of direction; counting 1 and the square
root of 2 is 5 % too long on average. Each end is half a width longer than its centre line.
Widths: the mean is area over length; the largest is found at the centre line by the distance to the background.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from model.arrays import Array, Floats, Ints

_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""rows and columns of the neighbours, around; the even ones are diagonal"""

_STRAIGHT, _DIAGONAL, _CORNER = 0.980, 1.406, 0.091


_SMALL = 64
"""px; parts whose box has no longer side are measured together"""


class CrackSize(NamedTuple):
    """Of all cracks of a mask together."""

    cracks: int
    """connected parts, diagonal neighbours being connected"""
    area: int
    length: float
    width_mean: float | None
    width_max: float | None
    """None where there is no crack"""


def measure(mask_HW: Array) -> CrackSize:
    """A large part is measured in its own box, since thinning costs an area times the largest width; all small ones
    together, since there may be a hundred thousand of them."""
    count, labels_HW, boxes, _ = cv2.connectedComponentsWithStats((np.asarray(mask_HW) > 0).astype(np.uint8))
    boxes, area = boxes[1:], int(boxes[1:, cv2.CC_STAT_AREA].sum())
    is_small = boxes[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(axis=1, initial=0) <= _SMALL
    measured = [_measure(np.concatenate([[False], is_small])[labels_HW])] if is_small.any() else []
    for part in np.flatnonzero(~is_small).tolist():
        left, top, width, height, _ = boxes[part].tolist()
        measured.append(_measure(labels_HW[top : top + height, left : left + width] == part + 1))
    if not measured:
        return CrackSize(0, 0, 0.0, None, None)
    length = sum(one for one, _ in measured)
    return CrackSize(count - 1, area, length, area / length, max(widest for _, widest in measured))


def _measure(mask_HW: Array) -> tuple[float, float]:
    """Length of all parts together, and the largest width."""
    # Imported on use: a machine that only trains needs no scikit-image.
    from skimage.morphology import skeletonize

    mask_HW = np.pad(mask_HW, 1)
    line_HW = np.asarray(skeletonize(mask_HW, method="lee")).view(np.bool_)
    to_edge_HW = cv2.distanceTransform(mask_HW.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    _remove_spurs(line_HW, to_edge_HW)
    rows, columns, links_8P = _links(line_HW)
    steps_P = links_8P.sum(axis=0)
    corners = np.count_nonzero((steps_P == 2) & ~(links_8P[:4] & links_8P[4:]).any(axis=0))
    widths_P = _widths(line_HW, to_edge_HW, rows, columns)
    ends_P = np.maximum(2 - steps_P, 0)  # a lone px is two ends
    straight, diagonal = links_8P[1::2].sum() / 2, links_8P[::2].sum() / 2
    length = _STRAIGHT * straight + _DIAGONAL * diagonal - _CORNER * corners + float((ends_P * widths_P).sum()) / 2
    return float(length), float(widths_P.max())


def _links(line_HW: Array) -> tuple[Ints, Ints, Array]:
    """Rows and columns of a line's px, and (8, P) to which neighbours each is linked: to a diagonal one only where no
    straight neighbour links both."""
    rows, columns = np.nonzero(line_HW)
    there_8P = np.stack([line_HW[rows + dy, columns + dx] for dy, dx in _RING])
    links_8P = there_8P.copy()
    links_8P[::2] &= ~there_8P[1::2] & ~np.roll(there_8P, 1, axis=0)[::2]
    return rows, columns, links_8P


def _widths(line_HW: Array, to_edge_HW: Array, rows: Ints, columns: Ints) -> Floats:
    """(P,) width at each px of a line: its distance to the background and that of the neighbour beside the line that
    is farthest from it. In a crack of an even width the line lies on one of two middle px, and the other is as far."""
    beside_P = np.zeros(len(rows), np.float32)
    for dy, dx in _RING:
        there = rows + dy, columns + dx
        np.maximum(beside_P, np.where(line_HW[there], 0, to_edge_HW[there]), out=beside_P)
    return np.asarray(to_edge_HW[rows, columns] + beside_P, np.float64)


def _remove_spurs(line_HW: Array, to_edge_HW: Array) -> None:
    """Takes away branches that end within the square around the crack at their root: they come from a ragged edge,
    or fork into the corners of an end, and reach out of the crack by less than a fifth of its width."""
    rows, columns, links_8P = _links(line_HW)
    steps_P = links_8P.sum(axis=0)
    neighbours_2P = _two_neighbours(line_HW, rows, columns, links_8P)
    ends = np.flatnonzero(steps_P == 1)
    at, before, walking = ends.copy(), ends.copy(), np.arange(len(ends))
    walked = [(walking, ends)]
    farthest = 2**0.5 * float(to_edge_HW.max(initial=0))
    while len(walking) and len(walked) <= farthest + 1:
        one, other = neighbours_2P[:, at[walking]]
        ahead = np.where(one == before[walking], other, one)
        before[walking], at[walking] = at[walking], ahead
        walking, ahead = walking[steps_P[ahead] == 2], ahead[steps_P[ahead] == 2]
        walked.append((walking, ahead))
    out = np.hypot(rows[ends] - rows[at], columns[ends] - columns[at])
    is_spur = (steps_P[at] > 2) & (out <= 2**0.5 * to_edge_HW[rows[at], columns[at]])
    gone = np.concatenate([places[is_spur[walkers]] for walkers, places in walked])
    line_HW[rows[gone], columns[gone]] = False


def _two_neighbours(line_HW: Array, rows: Ints, columns: Ints, links_8P: Array) -> Ints:
    """(2, P) the first and the last px that each is linked to, itself where it is alone."""
    # px are in the order of the image, so that a search finds one by its place
    places = rows * line_HW.shape[1] + columns
    steps = np.array([dy * line_HW.shape[1] + dx for dy, dx in _RING])
    first, last = links_8P.argmax(axis=0), 7 - links_8P[::-1].argmax(axis=0)
    wanted = np.stack([places + np.where(links_8P.any(axis=0), steps[one], 0) for one in (first, last)])
    return np.asarray(np.searchsorted(places, wanted), np.int64)
