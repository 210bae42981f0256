"""Severstal steel (kaggle.com/c/severstal-steel-defect-detection).

`train_images/NAME.jpg`, all 1600x256 px, and `train.csv` with ImageId, ClassId and EncodedPixels, or with the older
column ImageId_ClassId (NAME.jpg_1). EncodedPixels are runs "start length ...", counted from 1 down the columns. A
pixel of any class is a defect; an image without a row, or with empty ones, is a negative. `test_images` have no public
labels and are not read. No split is published.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from model.layouts.listing import Item, by_stem, some_images_of
from model.sample import Rle

_HEIGHT_PX, _WIDTH_PX = 256, 1600


def matches(path: Path) -> bool:
    return (path / "train_images").is_dir() and (path / "train.csv").is_file()


def items(path: Path, problems: list[str]) -> list[Item]:
    table = path / "train.csv"
    images = {
        image.name: image for image in by_stem(some_images_of(path / "train_images", problems), problems).values()
    }
    runs = _read_runs(table, images, problems)
    found = []
    for name, image in sorted(images.items()):
        mask = Rle(table, name, tuple(runs[name]), _HEIGHT_PX, _WIDTH_PX) if runs.get(name) else None
        found.append(
            Item(image.stem, image, mask, mask is not None, image.stem, stated="train.csv", way_out="mend its row")
        )
    return found


def _read_runs(table: Path, images: dict[str, Path], problems: list[str]) -> dict[str, list[str]]:
    """The runs of each image's classes."""
    runs: dict[str, list[str]] = defaultdict(list)
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        key = "ImageId" if "ImageId" in columns else "ImageId_ClassId"
        if key not in columns or "EncodedPixels" not in columns:
            problems.append(
                f"{table}: needs the columns ImageId (or ImageId_ClassId) and EncodedPixels, "
                f"found {', '.join(sorted(columns)) or 'none'}; download it again"
            )
            return {}
        for line, row in enumerate(reader, start=2):
            name = row[key] if key == "ImageId" else row[key].rpartition("_")[0]
            if name not in images:
                problems.append(f"{table}, line {line}: there is no image {name!r} in train_images/; add it")
            if text := (row["EncodedPixels"] or "").strip():
                runs[name].append(text)
    return runs
