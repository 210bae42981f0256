"""Test figures by what the images are: their source, how wide their cracks are, how much of them is defect.

The width of an image's cracks is the area of the truth over the length of its centre line, px; both at the network's
input size.
"""

from __future__ import annotations

import numpy as np

from model.arrays import Bools, Floats, Ints
from model.intervals import Ratio, contributing, difference_interval, ratio_interval
from tuner.report import charts, tables, words
from tuner.report.gallery import Block, Gallery, Pictures, Table, Tables, Text
from tuner.report.tables import Judged

_LEAST = 6
"""images with a mask, below which thirds of them say nothing"""

_MOST_SOURCES = 30
"""lines of the table"""


def equal_parts(values_N: Floats, parts: int) -> list[Bools]:
    """Which values lie in each of at most so many parts of as nearly equal size as ties allow, lowest first. Equal
    values stay together; no part is empty."""
    edges = np.quantile(values_N, np.arange(1, parts) / parts, method="inverted_cdf")
    code_N = np.searchsorted(edges, values_N, side="left")
    return [code_N == code for code in np.unique(code_N)]


def widths(test: Judged) -> Floats:
    """(N,) mean width of the cracks of each image, px; NaN without a mask."""
    length = np.asarray(test.split.centre_lines.truth, np.float64)
    area = test.selected.truth[:, 0].astype(np.float64)
    return np.where((length > 0) & (area > 0), area / np.maximum(length, 1), np.nan)


def shares(test: Judged) -> Floats:
    """(N,) percent of each image that is defect; NaN without a mask."""
    area, pixels = (table[:, 0].astype(np.float64) for table in (test.selected.truth, test.selected.pixels))
    return np.where(area > 0, 100 * area / np.maximum(pixels, 1), np.nan)


def by_size(test: Judged, baseline: Judged | None, gallery: Gallery) -> list[Block]:
    """Tables and pictures by width and by area of the defects of positive test images that have a mask."""
    rows = np.flatnonzero(test.split.labels & np.isfinite(widths(test)))
    if len(rows) < _LEAST:
        found = f"{words.plural(len(rows), 'positive test image')} with a mask"
        return [Text(f"No figures by width and area of defects: {found}, {_LEAST} are needed.")]
    other = None if baseline is test else baseline
    kinds = (
        ("width", widths(test)[rows], "mean width, px", "{:.1f} to {:.1f}", "mean crack width, px (logarithmic)"),
        ("area", shares(test)[rows], "area, %", "{:.2f} to {:.2f}", "defect, % of the image (logarithmic)"),
    )
    shown, pictures = [], []
    for name, values, column, form, axis in kinds:
        parts = equal_parts(values, 3)
        alike = " (too much alike for thirds)" if len(parts) < 3 else ""
        caption = f"Positive test images by {name} of their defects{alike}"
        named = [(form.format(values[part].min(), values[part].max()), rows[part]) for part in parts]
        shown.append(_table(test, other, column, named, caption, f"by-{name}"))
        figure = charts.dice_by_size(test, other, rows, values, parts, axis)
        caption = f"Dice of positive test images by {name} of their defects; bars: means of the thirds of the table."
        pictures.append(gallery.figure(figure, f"dice-by-{name}", caption))
    text = (
        "The width of an image's cracks is the area of its mask over the length of the mask's centre line, in px at "
        f"the network's input size. {words.plural(len(rows), 'positive test image')} with a mask in thirds."
    )
    return [Text(text), Tables(shown), Pictures(pictures)]


def by_source(test: Judged, baseline: Judged | None) -> Block | None:
    """Figures by where the images come from; None if that is one source. Of many, those with the fewest images are told
    together."""
    sources = np.array(test.split.sources)
    names, counts = np.unique(sources, return_counts=True)
    if len(names) < 2:
        return None
    if len(names) > max(2, len(sources) // 2):
        found = f"{len(names):,} sources for {words.plural(len(sources), 'test image')}"
        return Text(f"No figures by source: {found}, and a source says something from two images up.")
    named = [(str(name) or "(none stated)", np.flatnonzero(sources == name)) for name in names]
    if len(names) > _MOST_SOURCES:
        order = np.argsort(-counts, kind="stable")
        alone, others = np.sort(order[: _MOST_SOURCES - 1]), order[_MOST_SOURCES - 1 :]
        rest = np.flatnonzero(np.isin(sources, names[others]))
        named = [*(named[k] for k in alone), (f"{len(others):,} others", rest)]
    other = None if baseline is test else baseline
    return _table(test, other, "source", named, "Test figures by source of the images", "by-source", True)


def _table(
    test: Judged,
    baseline: Judged | None,
    column: str,
    named: list[tuple[str, Ints]],
    caption: str,
    label: str,
    has_negatives: bool = False,
) -> Table:
    """A row a name; columns that would be empty are left out. With negatives, Dice of all images beside positives."""
    key = "dice_positive_mean"
    intervals = [_interval(test, rows) for _, rows in named]
    gains = [_gain(test, baseline, rows) for _, rows in named]
    has_intervals, has_gains = any(intervals), any(gain for gain in gains)
    header = [column, "images", *(["positive"] if has_negatives else []), "groups"]
    header += ["Dice, positive" if has_negatives else "Dice", *(["95 % interval"] if has_intervals else [])]
    header += ["Dice, all"] if has_negatives else []
    header += ["IoU, all" if has_negatives else "IoU", "pixel F1" if has_negatives else "recall", "2-pixel F1"]
    header += ["Dice: winner - baseline"] if has_gains else []
    lines = []
    for (name, rows), interval, gain in zip(named, intervals, gains, strict=True):
        values = {k: tables.number(value) for k, value in test.of_rows(rows).items()}
        line = [name, f"{len(rows):,}", *([f"{test.split.labels[rows].sum():,}"] if has_negatives else [])]
        line += [f"{len(np.unique(test.groups[rows])):,}", words.figure(values[key])]
        line += [words.interval(interval) or words.NONE] if has_intervals else []
        last = ("dice_mean", "iou_mean", "f1") if has_negatives else ("iou_mean", "recall_mean")
        line += [words.figure(values[k]) for k in (*last, "two_pixel_f1")]
        line += [words.difference(*gain) if gain else words.NONE] if has_gains else []
        lines.append(line)
    return Table(header, lines, caption, frozenset(range(1, len(header))), label=label)


def _positives(judged: Judged, rows: Ints) -> Ratio:
    positive = judged.split.labels[rows].astype(np.float64)
    return Ratio(judged.dice[rows] * positive, positive)


def _interval(test: Judged, rows: Ints) -> tuple[float, float] | None:
    return ratio_interval(_positives(test, rows), test.groups[rows])


def _gain(test: Judged, baseline: Judged | None, rows: Ints) -> tuple[float, tuple[float, float] | None] | None:
    """Winner minus baseline in Dice of positives, with its interval."""
    if baseline is None or not contributing(test.split.labels[rows], test.groups[rows]):
        return None
    ours, theirs = _positives(test, rows), _positives(baseline, rows)
    return ours.value() - theirs.value(), difference_interval(ours, theirs, test.groups[rows])
