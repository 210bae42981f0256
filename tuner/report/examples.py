"""Pictures of what the winner saw and answered, put together from pixels: fast, and sharp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model.arrays import Array, Floats
from tuner.report import style, words
from tuner.report.inputs import Examples

PANELS = ("input", "truth", "probability", "mask", "overlap")
LEGEND = (("hit", style.HIT), ("miss", style.MISS), ("false alarm", style.FALSE_ALARM))

_LEAST, _MOST, _GAP = 256, 640, 6
"""px: widths between which a panel is left as it is; between panels"""

_LETTER = 0.0125
"""size of letters as a share of a picture's width: readable where the picture is as wide as the page"""


def dice(examples: Examples) -> Floats:
    """(K,) Dice of each example; empty on empty is 1."""
    hits = (examples.truth & examples.mask).sum(axis=(1, 2))
    total = examples.truth.sum(axis=(1, 2)) + examples.mask.sum(axis=(1, 2))
    return np.asarray(np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1)))


def best_rows(examples: Examples, count: int) -> list[int]:
    """The best examples that show a defect, best first; any where none does."""
    order = np.argsort(-dice(examples), kind="stable")
    shown = [int(k) for k in order if examples.truth[k].any()] or [int(k) for k in order]
    return shown[:count]


def file_name(rank: int, value: float, name: str) -> str:
    return f"{rank:03d}_{value:.3f}_{words.file_name(name)}.png"


def overlap(image_HWC: Array, truth_HW: Array, mask_HW: Array) -> Array:
    """Hits, misses and false alarms over the dimmed grey image.

    The image may be smaller or larger than the masks. A pixel that shrinking mixes takes the kind that has most of
    it, if they have a third together, so that thin cracks keep their colours.
    """
    height, width = image_HWC.shape[:2]
    grey = cv2.cvtColor(np.ascontiguousarray(image_HWC), cv2.COLOR_RGB2GRAY)
    out = np.repeat((grey * 0.5)[..., None], 3, axis=2).astype(np.uint8)
    kinds = np.stack([truth_HW & mask_HW, truth_HW & ~mask_HW, mask_HW & ~truth_HW], axis=2).astype(np.float32)
    if kinds.shape[:2] != (height, width):
        way = cv2.INTER_AREA if width < kinds.shape[1] else cv2.INTER_NEAREST
        kinds = np.asarray(cv2.resize(kinds, (width, height), interpolation=way))
    colours = np.stack([_bytes(colour) for _, colour in LEGEND])
    shown = kinds.sum(axis=2) >= 1 / 3
    out[shown] = colours[kinds.argmax(axis=2)[shown]]
    return out


def strip(examples: Examples, k: int, rank: int, value: float) -> Array:
    """One example: a line of text, then input, truth, probability, mask and overlap side by side."""
    panels = [_fit(panel, smooth) for panel, smooth in _panels(examples, k)]
    width = panels[0].shape[1]
    row = beside(panels)
    title = f"{rank} of {len(examples.names)}    Dice {value:.3f}    {words.shorten(examples.names[k], 90)}"
    head = text_bar(row.shape[1], ((0, style.drawable(title), style.INK, "bold"),), row.shape[1] * _LETTER)
    foot = _panel_titles(row.shape[1], width)
    return np.concatenate([head, row, foot])


def _panels(examples: Examples, k: int) -> list[tuple[Array, bool]]:
    """The five pictures, and whether each is smooth (a photo) or has levels that must not mix."""
    image, truth, mask = examples.image[k], examples.truth[k], examples.mask[k]
    colours = np.asarray(matplotlib.colormaps["inferno"](examples.probability[k], bytes=True))[..., :3]
    return [
        (image, True),
        (_black_white(truth), False),
        (colours, False),
        (_black_white(mask), False),
        (overlap(image, truth, mask), False),
    ]


def contact_sheet(examples: Examples, columns: int = 6, cell: int = 236) -> Array:
    """Overlap of every example, the worst first, with rank and Dice."""
    values = dice(examples)
    order = np.argsort(values, kind="stable")
    tiles = []
    for rank, k in enumerate(order, start=1):
        picture = overlap(resize(examples.image[k], cell), examples.truth[k], examples.mask[k])
        name = words.shorten(examples.names[k], 17)
        text = style.drawable(f"{rank}  {values[k]:.3f}  {name}")
        tiles.append(np.concatenate([picture, text_bar(cell, ((0, text, style.INK, "normal"),), 14)]))
    columns = min(columns, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [beside(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    sheet = np.concatenate(rows)
    return np.concatenate([_legend_bar(sheet.shape[1]), sheet])


def headline_strip(examples: Examples, rows: Sequence[int], cell: int = 400) -> Array:
    """A few examples: inputs, overlaps below or beside them, Dice at the foot."""
    values = dice(examples)
    tall = examples.image.shape[1] > 1.3 * examples.image.shape[2]
    columns = []
    for k in rows:
        image = resize(examples.image[k], cell // 2 if tall else cell)
        answer = overlap(image, examples.truth[k], examples.mask[k])
        gap = np.full((_GAP, image.shape[1], 3), 255, np.uint8)
        both = beside([image, answer]) if tall else np.concatenate([image, gap, answer])
        foot = text_bar(both.shape[1], ((0, f"Dice {values[k]:.3f}", style.INK, "normal"),), 20)
        columns.append(np.concatenate([both, foot]))
    sheet = beside(columns)
    return np.concatenate([sheet, _legend_bar(sheet.shape[1])])


def _bytes(colour: str) -> Array:
    return np.round(255 * np.array(to_rgb(colour))).astype(np.uint8)


def _black_white(mask_HW: Array) -> Array:
    return np.repeat(mask_HW[..., None].astype(np.uint8) * 255, 3, axis=2)


def _fit(panel: Array, smooth: bool) -> Array:
    """Small pictures grow by a whole factor, so that pixels stay square; large ones shrink."""
    width = panel.shape[1]
    if width > _MOST:
        return resize(panel, _MOST)
    factor = -(-_LEAST // width)
    way = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return panel if factor == 1 else cv2.resize(panel, None, fx=factor, fy=factor, interpolation=way)


def resize(picture: Array, width: int) -> Array:
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    way = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=way))


def beside(pictures: Sequence[Array]) -> Array:
    gap = np.full((pictures[0].shape[0], _GAP, 3), 255, np.uint8)
    spaced = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(spaced[:-1], axis=1)


@cache
def _panel_titles(width: int, panel: int) -> Array:
    lefts = [k * (panel + _GAP) for k in range(len(PANELS))]
    titles = tuple((x, name, style.MUTED, "normal") for x, name in zip(lefts, PANELS[:-1], strict=False))
    return text_bar(width, titles, width * 0.85 * _LETTER, legend_from=lefts[-1])


@cache
def _legend_bar(width: int) -> Array:
    return text_bar(width, (), width * _LETTER, legend_from=0)


Words = tuple[int, str, str, str]
"""left edge in px, text, colour, weight"""


def text_bar(width: int, texts: tuple[Words, ...], size: float, legend_from: int | None = None) -> Array:
    """A white line of text; `size` of its letters in px. Optionally with the legend of the colours."""
    height = round(2.1 * size)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for x, text, colour, weight in texts:
        axes.text(x + 2, height / 2, text, fontsize=size, color=colour, fontweight=weight, va="center")
    x = legend_from or 0
    for name, colour in LEGEND if legend_from is not None else ():
        axes.add_patch(Rectangle((x + 2, height / 2 - size / 2), size, size, color=colour, linewidth=0))
        axes.text(x + size * 1.45 + 2, height / 2, name, fontsize=size, color=style.MUTED, va="center")
        x += round(size * (2.6 + 0.62 * len(name)))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
