"""Photos that a user names: found, named apart, and read as training reads its images."""

from __future__ import annotations

import glob
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from model.arrays import Array
from model.inspection import decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
"""of the files that a folder or a pattern stands for; a file that is named itself may have any"""

TABLE = "predictions.csv"
PART = f"{TABLE}.part"
"""the table while a run writes it"""
NEXT = "next.csv"
"""the table of `tuner next`"""
_HEADS = {TABLE: b"file,height_px,width_px,tiles,", PART: b"file,height_px,width_px,tiles,", NEXT: b"rank,file,score,"}
"""Tables that begin so are ours; others of these names are not."""

MOST_PIXELS = 150_000_000
"""in a photo; a small file can claim to be a huge image, and fill the memory"""

_DARK = 64
"""Levels of 256 below which an image is asked whether it has 16 bit: those of a 14-bit camera, and of less."""


@dataclass(frozen=True)
class Photo:
    path: Path
    name: str
    """path below the folder that all photos share, with /; no two photos have the same"""


def find(images: Sequence[str], out: Path) -> list[Photo]:
    """The photos of files, folders and patterns, each once. ValueError where one of these stands for none.

    What predictions have written, into `out` or elsewhere, is left out unless it is named itself. A shell expands
    `photos/*` to arguments that hold nothing else: these are passed over while others are left.
    """
    found: dict[str, Path] = {}
    bases = []
    problem = ""
    holds_predictions = cache(_holds_predictions)

    def is_written(path: Path, base: Path) -> bool:
        if _lies_in(path, out):
            return True
        return any(holds_predictions(folder) for folder in path.parents if folder.is_relative_to(base))

    for words in images:
        base, there = _named(words)
        if _lies_in(base, out):
            problem = f"--out must not hold the images, found {out}, where {words} lies; take another folder"
            continue
        is_itself = Path(words).is_file()
        paths = there if is_itself else [path for path in there if not is_written(path, base)]
        if not paths:
            problem = f"{words}: no image in there; images are files *{', *'.join(SUFFIXES)}"
            if not there:
                raise ValueError(problem)
            problem += ", and not what predictions have written"
            continue
        bases.append(base)
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise ValueError(problem)
    shared = os.path.commonpath(bases)
    return [Photo(path, path.relative_to(shared).as_posix()) for path in found.values()]


def is_table(path: Path) -> bool:
    """Whether a file is a table that we have written, by its name and how it begins."""
    try:
        with path.open("rb") as file:
            return file.read(80).replace(b'"', b"").startswith(_HEADS[path.name])
    except OSError:
        return False


def _holds_predictions(folder: Path) -> bool:
    return any(is_table(folder / name) for name in _HEADS)


def _lies_in(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _named(words: str) -> tuple[Path, list[Path]]:
    """What one argument stands for, in order, and the folder that it names. Hidden files are in neither."""
    if not words:
        raise ValueError("IMAGE must be a file, a folder or a pattern, found ''; the current folder is .")
    path = Path(os.path.abspath(words))  # noqa: PTH100 (links keep their own names)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, _below(path)
    parts = enumerate(path.parts)
    fixed = next((n for n, part in parts if glob.has_magic(part) and not Path(*path.parts[: n + 1]).exists()), None)
    if fixed is None:
        raise ValueError(f"{words}: no such file or folder, and no pattern such as '*.jpg'")
    base = Path(*path.parts[:fixed])
    matches = sorted(base.glob(str(Path(*path.parts[fixed:]))))
    return base, [match for match in matches if _is_image(match, base)]


def _below(folder: Path) -> list[Path]:
    found = [Path(root) / name for root, _, files in os.walk(folder) for name in files]
    return [path for path in sorted(found) if _is_image(path, folder)]


def _is_image(path: Path, base: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
    return path.suffix.lower() in SUFFIXES and not is_hidden and path.is_file()


def read(path: Path) -> tuple[Array, str]:
    """RGB (H, W, 3) uint8, by training's own decoder, and what is to be said of the file, or nothing.

    So orientation (EXIF) is applied, grey becomes three equal channels, colours are taken from a palette or from CMYK,
    alpha is dropped, and 16 bit become 8 by leaving out the lower ones, whatever the image's own range: another
    reading would not be what the network was trained and measured on. ValueError where it is no image, or too large.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    pages = _look(path)
    image_HWC = decode_image(path)
    notes = [f"{pages} pages, of which the first was read"] if pages > 1 else []
    if image_HWC.max() < _DARK and (most := _largest_of_16_bit(path)):
        notes.append(
            f"16 bit whose largest value is {most} of 65535, read over the whole range as in training, so it is dark; "
            "stretch it to the range that training images had"
        )
    return image_HWC, "; ".join(notes)


def _look(path: Path) -> int:
    """How many pages a file has, from its head alone. ValueError for one that claims to be huge."""
    from PIL import Image

    pixels, pages = 0, 1
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            pixels = image.width * image.height
            pages = getattr(image, "n_frames", 1) if image.format in ("TIFF", "WEBP") else 1
    except Image.DecompressionBombError:
        pixels = MOST_PIXELS + 1
    except Exception as error:  # what Pillow does not know, OpenCV may, which has a limit of its own
        logging.getLogger(__name__).debug("%s: %s", path, error)
    if pixels > MOST_PIXELS:
        raise ValueError(f"{path}: an image must have at most {MOST_PIXELS:,} px; cut it into parts or make it smaller")
    return pages


def _largest_of_16_bit(path: Path) -> int:
    """The largest value of a file of 16 bit; 0 for any other."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    values = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return int(values.max()) if values is not None and values.dtype == np.uint16 else 0
