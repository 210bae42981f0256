"""Pictures of `tuner next`: where a model is unsure, and a sheet of the first images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np

from model.arrays import Array, Bools
from tuner.names import shown
from tuner.photo_results import overlay
from tuner.report import style, words
from tuner.report.examples import beside, resize, text_bar

_CELL = 240
"""px, sides of a picture on the sheet"""
_GAP = 10
_COLUMNS = 2
_PANELS = ("photo", "prediction", "uncertain where bright")
_LETTER = 14
"""px"""


@dataclass(frozen=True)
class Entry:
    """One image on the sheet, small."""

    title: str
    panels: list[Array]
    """RGB"""

    @classmethod
    def of(cls, rank: int, name: str, score: str, image_HWC: Array, mask_HW: Bools, uncertainty_HWC: Array) -> Entry:
        title = f"{rank}    {float(score):.3f}    {words.shorten(shown(name), 64)}"
        small_HWC = _fit(image_HWC)
        height, width = small_HWC.shape[:2]
        share_HW = cv2.resize(mask_HW.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        answer_HWC = overlay(small_HWC.copy(), share_HW >= 1 / 3)[..., ::-1]  # thin cracks do not vanish
        return cls(title, [small_HWC, np.ascontiguousarray(answer_HWC), _fit(uncertainty_HWC)])


def uncertainty_map(image_HWC: Array, error_HW: Array) -> Array:
    """RGB, of the photo's size: the photo in dark grey, the brighter and warmer the surer a px is to be wrong."""
    colours_HWC = np.asarray(matplotlib.colormaps["inferno"](np.arange(256), bytes=True))[:, :3]
    level_HW = np.minimum(2 * error_HW, 1)
    grey_HW = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shown_HWC = colours_HWC[(level_HW * 255).astype(np.uint8)].astype(np.float32)
    weight_HW1 = np.sqrt(level_HW)[..., None]
    mixed_HWC = (1 - weight_HW1) * 0.45 * grey_HW[..., None] + weight_HW1 * shown_HWC
    return np.asarray(mixed_HWC.round().astype(np.uint8))


def sheet(entries: Sequence[Entry]) -> Array:
    """RGB: for each image, photo, prediction and uncertainty side by side under rank, score and name."""
    height = max(panel.shape[0] for entry in entries for panel in entry.panels)
    blocks = [_block(entry, height) for entry in entries]
    columns = min(_COLUMNS, len(blocks))
    blocks += [np.full_like(blocks[0], 255)] * (-len(blocks) % columns)
    rows = [beside(blocks[k : k + columns]) for k in range(0, len(blocks), columns)]
    lefts = [k * (_CELL + 6) for k in range(len(_PANELS))]
    titles = tuple((left, name, style.MUTED, "normal") for left, name in zip(lefts, _PANELS, strict=True))
    head = beside([text_bar(blocks[0].shape[1], titles, _LETTER)] * columns)
    return np.concatenate([head, *rows])


def _block(entry: Entry, height: int) -> Array:
    row = beside([_centred(panel, height) for panel in entry.panels])
    title = text_bar(row.shape[1], ((0, style.drawable(entry.title), style.INK, "bold"),), _LETTER)
    return np.concatenate([title, row, np.full((_GAP, row.shape[1], 3), 255, np.uint8)])


def _fit(picture_HWC: Array) -> Array:
    """At most as large as a cell, in its own proportions."""
    height, width = picture_HWC.shape[:2]
    return resize(picture_HWC, max(1, round(_CELL * min(1.0, width / height))))[:_CELL]


def _centred(picture_HWC: Array, cell_height: int) -> Array:
    cell = np.full((cell_height, _CELL, 3), 255, np.uint8)
    height, width = picture_HWC.shape[:2]
    top, left = (cell_height - height) // 2, (_CELL - width) // 2
    cell[top : top + height, left : left + width] = picture_HWC
    return cell
