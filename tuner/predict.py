"""`tuner predict` as a story: find the photos, load the model, and for each photo write what it says of it."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model import deployed, tiles
from model.arrays import Array
from model.crack_size import CrackSize, measure
from model.files import write_atomically
from tuner.names import cell, quoting, shown
from tuner.photos import PART, TABLE, Photo, find, is_table, read
from tuner.records import SearchFailed

_COLUMNS = (
    "file", "height_px", "width_px", "tiles", "score", "defect", "cracks", "area_px", "area_share", "length_px",
    "width_mean_px", "width_max_px",
)  # fmt: skip
_IN_MM = ("length_mm", "width_mean_mm", "width_max_mm", "area_mm2")
_REMARKS = ("note", "error")

_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG

_CRACK = (213, 94, 0)
"""Vermillion of Okabe and Ito, as in reports (`tuner.report.style.RED`); the photo below it is grey."""
_OPACITY = 0.6
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
    _check_is_free(folder)
    network = deployed.load(Path(model))
    if network.note:
        console.print(network.note, style="yellow", markup=False, highlight=False)
    outcome = Outcome(folder, len(photos), Counter())
    done = 0
    _make(folder)
    with _locked(folder), _table(folder, mm_per_px, photos) as table, _progress(console, len(photos)) as told:
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
            if error.errno not in _FULL:
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


def _check_is_free(folder: Path) -> None:
    """ValueError for a folder that cannot be written, or has something else in it: masks/ may be somebody's data."""
    if not folder.exists():
        there = next(path for path in Path(os.path.abspath(folder)).parents if path.exists())  # noqa: PTH100
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            kind = "cannot be written in" if there.is_dir() else "is no folder"
            raise ValueError(
                f"--out must be a folder that can be made, found {folder}, but {there} {kind}; take another name"
            )
        return
    if not folder.is_dir():
        raise ValueError(f"--out must be a folder, found the file {folder}; take another name")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"--out must be a folder that can be written, found {folder}; allow it or take another name")
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if others and not is_table(folder / TABLE) and not is_table(folder / PART):
        raise ValueError(
            f"--out must be a new folder, an empty one or one of earlier predictions, found {folder} with "
            f"{min(others)} in it; take another name"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be made, found {folder} ({error.strerror}); take another name"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time writes there; the kernel frees the lock when the process ends, however it ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--out must not be written by two runs at once, found {folder}, which another process writes; wait "
                "for it, or take another name"
            ) from error
        yield
    finally:
        os.close(lock)


def _predict_one(
    photo: Photo, network: deployed.Deployed, folder: Path, mm_per_px: float | None, told: Any
) -> dict[str, Any]:
    """The photo's row; its mask and overlay are written before."""
    row: dict[str, Any] = {"file": cell(photo.name)}
    try:
        image_HWC, note = read(photo.path)
        found = tiles.segment(image_HWC, network.answer, network.sizes, told)
        _write(folder / "masks" / f"{photo.name}.png", found.mask_HW * np.uint8(255), [cv2.IMWRITE_PNG_COMPRESSION, 3])
        kind = ".jpg" if max(found.mask_HW.shape) <= _JPEG_SIDE else ".png"
        overlay_HWC = _overlay(image_HWC, found.mask_HW)
        _write(folder / "overlays" / f"{photo.name}{kind}", overlay_HWC, _JPEG if kind == ".jpg" else [])
        del image_HWC, overlay_HWC  # measuring takes the most memory beside the network
        size = measure(found.mask_HW)
    except OSError as error:
        if error.errno in (*_FULL, errno.EROFS):  # no later photo would fare better
            raise
        return row | {"error": _said(error, photo)}
    except (ValueError, FloatingPointError, MemoryError, cv2.error) as error:
        return row | {"error": _said(error, photo)}
    return row | _figures(found, size, mm_per_px) | ({"note": note} if note else {})


def _said(error: Exception, photo: Photo) -> str:
    """An error's message without the file's name, which stands before it."""
    return str(error).removeprefix(f"{photo.path}: ") or type(error).__name__


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


def _overlay(image_HWC: Array, mask_HW: Array) -> Array:
    """BGR: the photo in grey, the crack in a colour that no grey is like. Written over the photo, to save memory."""
    grey_HW = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
    cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2BGR, dst=image_HWC)
    found = mask_HW > 0
    under = grey_HW[found].astype(np.float32)[:, None] * (1 - _OPACITY)
    image_HWC[found] = (under + _OPACITY * np.array(_CRACK[::-1], np.float32)).astype(np.uint8)
    return image_HWC


def _write(path: Path, pixels: Array, how: list[int]) -> None:
    """A grey or BGR image, whole or not at all."""
    ok, data = cv2.imencode(path.suffix, pixels, how)
    assert ok
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.tobytes())
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(
            f"what is written to {path.parent.name}/{path.name} must not lie where the result of another image does "
            "(x.jpg and x.jpg.png/y.jpg cannot both be); rename one of them"
        ) from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(
            f"names of what is written must have at most 255 bytes, found {len(os.fsencode(path.name))}; rename the "
            "image"
        ) from error


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


class _Told:
    """Says how far it is, on a terminal alone, and what went wrong, anywhere."""

    def __init__(self, console: Console, progress: Progress | None, images: int) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=images) if progress else None

    def of(self, photo: Photo, before: int) -> Any:
        """Hears of the tiles of one photo."""

        def told(done: int, tiles: int) -> None:
            if self._progress is not None and self._task is not None:
                what = shown(photo.name)[-50:] + (f", tile {done} of {tiles}" if tiles > 1 else "")
                self._progress.update(self._task, completed=before + done / tiles, description=what)

        return told

    def say(self, photo: Photo, problem: str) -> None:
        self._console.print(
            f"{shown(photo.name)}: {shown(problem)}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


@contextmanager
def _progress(console: Console, images: int) -> Iterator[_Told]:
    if not console.is_terminal:
        yield _Told(console, None, images)
        return
    words = TextColumn("{task.description}", markup=False)
    with Progress(
        words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        yield _Told(console, bar, images)
