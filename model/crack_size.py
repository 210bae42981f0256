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
    """Part by part, each in its own box."""
    count, labels_HW, boxes, _ = cv2.connectedComponentsWithStats((np.asarray(mask_HW) > 0).astype(np.uint8))
    area, length, widest = 0, 0.0, 0.0
    for part in range(1, count):
        left, top, width, height, pixels = boxes[part].tolist()
        box_HW = labels_HW[top : top + height, left : left + width] == part
        part_length, part_width = _measure_part(np.pad(box_HW, 1))
        area, length, widest = area + pixels, length + part_length, max(widest, part_width)
    return CrackSize(count - 1, area, length, *((area / length, widest) if area else (None, None)))


def _measure_part(mask_HW: Array) -> tuple[float, float]:
    """Length and largest width of one part, with background around it."""
    # Imported on use: a machine that only trains needs no scikit-image.
    from skimage.morphology import skeletonize

    to_edge_HW = cv2.distanceTransform(mask_HW.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    line_HW = np.asarray(skeletonize(mask_HW, method="lee") > 0)
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
    beside_8P = np.stack(
        [np.where(line_HW[rows + dy, columns + dx], 0, to_edge_HW[rows + dy, columns + dx]) for dy, dx in _RING]
    )
    return np.asarray(to_edge_HW[rows, columns] + beside_8P.max(axis=0), np.float64)


def _remove_spurs(line_HW: Array, to_edge_HW: Array) -> None:
    """Takes away branches that end within the square around the crack at their root: they come from a ragged edge,
    or fork into the corners of an end, and reach out of the crack by less than a fifth of its width."""
    rows, columns, links_8P = _links(line_HW)
    steps_P = links_8P.sum(axis=0)
    if steps_P.max(initial=0) < 3:
        return
    index = {place: p for p, place in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))}
    farthest = float(to_edge_HW.max()) * 2**0.5
    for end in np.flatnonzero(steps_P == 1).tolist():
        branch, before = [end], -1
        while steps_P[branch[-1]] < 3 and len(branch) <= farthest + 2:
            at = branch[-1]
            ways = [_RING[k] for k in np.flatnonzero(links_8P[:, at])]
            ahead = [index[rows[at] + dy, columns[at] + dx] for dy, dx in ways]
            ahead = [p for p in ahead if p != before]
            if not ahead:
                break
            before = at
            branch.append(ahead[0])
        root = branch.pop()
        out = np.hypot(rows[end] - rows[root], columns[end] - columns[root])
        if steps_P[root] > 2 and out <= 2**0.5 * to_edge_HW[rows[root], columns[root]]:
            line_HW[rows[branch], columns[branch]] = False
