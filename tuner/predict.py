"""`tuner predict` as a story: find the photos, load the model, and for each photo write what it says of it."""

from __future__ import annotations

import csv
import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import cv2
import numpy as np
from rich.console import Console

from model import deployed, tiles
from model.crack_size import CrackSize, measure
from tuner.names import cell, quoting, shown
from tuner.photo_results import (
    FAILURES,
    FULL,
    check_is_free,
    locked,
    make,
    overlay,
    progress,
    reason,
    write_image,
)
from tuner.photos import PART, TABLE, Photo, find, is_table, read
from tuner.records import SearchFailed

_COLUMNS = (
    "file", "height_px", "width_px", "tiles", "score", "defect", "cracks", "area_px", "area_share", "length_px",
    "width_mean_px", "width_max_px",
)  # fmt: skip
_IN_MM = ("length_mm", "width_mean_mm", "width_max_mm", "area_mm2")
_REMARKS = ("note", "error")

_JPEG = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
"""A line of one px keeps its colour, which JPEG otherwise stores for four px at once."""
_JPEG_SIDE = 65_500
"""px; a JPEG file cannot have more"""


@dataclass
class Outcome:
    """How predictions went."""

    out: Path
    images: int
    counts: Counter[str]
    """`defect` and `failed`"""

    def __str__(self) -> str:
        failed = f", {self.counts['failed']} failed" if self.counts["failed"] else ""
        return f"{shown(self.out / TABLE)}: {self.images} images, {self.counts['defect']} with a defect{failed}"


def predict(model: str, images: Sequence[str], out: str, mm_per_px: float | None, console: Console) -> Outcome:
    """Writes masks/, overlays/ and predictions.csv into `out`; a broken file is told and does not stop the rest."""
    folder = Path(out)
    photos = find(images, folder)
    check_is_free(folder, lambda: is_table(folder / TABLE) or is_table(folder / PART), "predictions")
    network = deployed.load(Path(model))
    if network.note:
        console.print(network.note, style="yellow", markup=False, highlight=False)
    outcome = Outcome(folder, len(photos), Counter())
    done = 0
    make(folder)
    with locked(folder), _table(folder, mm_per_px, photos) as table, progress(console, len(photos)) as told:
        try:
            for photo in photos:
                row = _predict_one(photo, network, folder, mm_per_px, told.of(photo, done))
                table.add(row)
                done += 1
                outcome.counts["defect"] += row.get("defect") == 1
                outcome.counts["failed"] += "error" in row
                if problem := row.get("error") or row.get("note"):
                    told.say(photo, problem)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise SearchFailed(
                f"the disk is full ({error}); make room, then the same command begins anew; {done} of {len(photos)} "
                f"images are in {shown(folder / TABLE)}"
            ) from error
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"{done} of {len(photos)} images are in {shown(folder / TABLE)}; the same command begins anew"
            ) from stop
    return outcome


def _predict_one(
    photo: Photo, network: deployed.Deployed, folder: Path, mm_per_px: float | None, told: Any
) -> dict[str, Any]:
    """The photo's row; its mask and overlay are written before."""
    row: dict[str, Any] = {"file": cell(photo.name)}
    try:
        image_HWC, note = read(photo.path)
        found = tiles.segment(image_HWC, network.answer, network.sizes, told)
        write_image(
            folder / "masks" / f"{photo.name}.png", found.mask_HW * np.uint8(255), [cv2.IMWRITE_PNG_COMPRESSION, 3]
        )
        kind = ".jpg" if max(found.mask_HW.shape) <= _JPEG_SIDE else ".png"
        overlay_HWC = overlay(image_HWC, found.mask_HW)
        write_image(folder / "overlays" / f"{photo.name}{kind}", overlay_HWC, _JPEG if kind == ".jpg" else [])
        del image_HWC, overlay_HWC  # measuring takes the most memory beside the network
        size = measure(found.mask_HW)
    except OSError as error:
        if error.errno in (*FULL, errno.EROFS):  # no later photo would fare better
            raise
        return row | {"error": reason(error, photo)}
    except FAILURES as error:
        return row | {"error": reason(error, photo)}
    return row | _figures(found, size, mm_per_px) | ({"note": note} if note else {})


def _figures(found: tiles.Segmentation, size: CrackSize, mm_per_px: float | None) -> dict[str, Any]:
    """The cells of one photo; those that cannot exist are left out."""
    height, width = found.mask_HW.shape
    cells = {
        "height_px": height,
        "width_px": width,
        "tiles": found.tiles,
        "score": f"{found.score:.6g}",
        "defect": int(found.defect),
        "cracks": size.cracks,
        "area_px": size.area,
        "area_share": f"{size.area / found.mask_HW.size:.6g}",
    }
    lengths = {"length": size.length, "width_mean": size.width_mean, "width_max": size.width_max}
    for name, value in lengths.items():
        if value is not None:
            cells[f"{name}_px"] = f"{value:.2f}"
            if mm_per_px:
                cells[f"{name}_mm"] = f"{value * mm_per_px:.6g}"
    if mm_per_px:
        cells["area_mm2"] = f"{size.area * mm_per_px**2:.6g}"
    return cells


class _Table:
    """A line at a time, so that a kill leaves those that are done."""

    def __init__(self, file: TextIO, columns: Sequence[str], quoting: Literal[0, 1]) -> None:
        self._file = file
        self._lines = csv.DictWriter(file, columns, restval="", lineterminator="\n", quoting=quoting)
        self._lines.writeheader()
        self._file.flush()
        self.lines = 0

    def add(self, row: dict[str, Any]) -> None:
        self._lines.writerow(row)
        self._file.flush()
        self.lines += 1


@contextmanager
def _table(folder: Path, mm_per_px: float | None, photos: Sequence[Photo]) -> Iterator[_Table]:
    """Becomes predictions.csv when the run ends, also early; where it ends before a line, an earlier table stays."""
    part = folder / PART
    table = None
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            columns = [*_COLUMNS, *(_IN_MM if mm_per_px else ()), *_REMARKS]
            table = _Table(file, columns, quoting(photo.name for photo in photos))
            yield table
    finally:
        if table is not None and (table.lines or not is_table(folder / TABLE)):
            part.replace(folder / TABLE)
        else:
            part.unlink(missing_ok=True)
