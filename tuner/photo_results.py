"""What verbs that answer photos share: the folder of their results, how images are written, what is told meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.arrays import Array
from model.files import write_atomically
from tuner.names import shown
from tuner.photos import Photo

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
"""of a disk"""
FAILURES = ValueError, FloatingPointError, MemoryError, cv2.error
"""of one photo; the next one may fare better"""

CRACK = (213, 94, 0)
"""Vermillion of Okabe and Ito, as in reports (`tuner.report.style.RED`); the photo below it is grey."""
_OPACITY = 0.6


def check_is_free(folder: Path, is_ours: Callable[[], bool], earlier: str) -> None:
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
    if others and not is_ours():
        raise ValueError(
            f"--out must be a new folder, an empty one or one of earlier {earlier}, found {folder} with "
            f"{min(others)} in it; take another name"
        )


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be made, found {folder} ({error.strerror}); take another name"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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


def reason(error: Exception, photo: Photo) -> str:
    """An error's message without the file's name, which stands before it."""
    return str(error).removeprefix(f"{photo.path}: ") or type(error).__name__


def overlay(image_HWC: Array, mask_HW: Array) -> Array:
    """BGR: the photo in grey, the crack in a colour that no grey is like. Written over the photo, to save memory."""
    grey_HW = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
    cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2BGR, dst=image_HWC)
    found = mask_HW > 0
    under = grey_HW[found].astype(np.float32)[:, None] * (1 - _OPACITY)
    image_HWC[found] = (under + _OPACITY * np.array(CRACK[::-1], np.float32)).astype(np.uint8)
    return image_HWC


def write_image(path: Path, pixels: Array, how: list[int]) -> None:
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


class Told:
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
def progress(console: Console, images: int) -> Iterator[Told]:
    if not console.is_terminal:
        yield Told(console, None, images)
        return
    words = TextColumn("{task.description}", markup=False)
    with Progress(
        words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        yield Told(console, bar, images)
