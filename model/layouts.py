"""Data sets on disk -> samples.

The layout: `images/NAME.jpg` (or another image format), `masks/NAME.png` of the same size, and optionally `index.csv`
with the columns `name` and any of `positive` (0/1), `segmented` (0/1), `split` (train, validation, test), `source`,
and the first of `group`, `photo_group`, `item`: which images must stay on one side of a split. Without `positive`, an
image is positive when its mask is not empty.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from model.inspection import inspect
from model.sample import Sample, Supervision

LAYOUTS = ("auto", "images_masks")
SPLITS = ("train", "validation", "test")
_GROUP_COLUMNS = ("group", "photo_group", "item")
_IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_SHOWN_PROBLEMS = 20


class DataError(ValueError):
    """A data set that cannot be used; the message lists every problem found."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        shown = problems[:_SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        super().__init__("\n  ".join([f"the data set {path} cannot be used:", *shown]))


def read(path: Path, layout: str = "auto") -> list[Sample]:
    """All samples of a data set, sorted by name. DataError with every problem, found by looking at every file."""
    if layout not in LAYOUTS:
        raise ValueError(f"data.layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if not path.is_dir():
        raise DataError(path, ["there is no such folder; give --data the folder that holds images/ and masks/"])
    problems: list[str] = []
    images = _by_stem(path / "images", problems)
    masks = _by_stem(path / "masks", problems)
    rows = _read_index(path / "index.csv", images, problems)
    if not images and not problems:
        problems.append(f"{path / 'images'}: no image found ({', '.join(sorted(_IMAGE_TYPES))})")
    problems += [f"{masks[name]}: there is no image of this name in images/" for name in sorted(masks.keys() - images)]
    for name in sorted(images.keys() - masks.keys()):
        if not _needs_no_mask(rows.get(name, {})):
            problems.append(
                f"{images[name]}: there is no mask for it; add masks/{name}.png, or say positive = 0 "
                "or segmented = 0 in index.csv"
            )
    if problems:
        raise DataError(path, problems)

    names = sorted(images)
    facts = inspect([(images[name], masks.get(name)) for name in names])
    samples = []
    for name, fact in zip(names, facts, strict=True):
        row = rows.get(name, {})
        positive = row["positive"] == "1" if row.get("positive") else fact["defect_pixels"] > 0
        if problem := fact["problem"] or _label_problem(images[name], row, positive, fact):
            problems.append(problem)
            continue
        samples.append(_sample(name, images[name], masks.get(name), row, positive, fact))
    if problems:
        raise DataError(path, problems)
    return samples


def _by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{folder}: there is no such folder; the layout is images/NAME.jpg and masks/NAME.png")
        return {}
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _IMAGE_TYPES:
            continue
        if file.stem in found:
            problems.append(f"{file}: {found[file.stem].name} has the same name; rename one")
        found[file.stem] = file
    return found


def _read_index(path: Path, images: dict[str, Path], problems: list[str]) -> dict[str, dict[str, str]]:
    """Rows of index.csv by the image's stem; problems are added to the list."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "name" not in rows[0]:
        problems.append(f"{path}: needs a column 'name' and a row for each image, found {len(rows)} rows")
        return {}
    index: dict[str, dict[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        name = row["name"] if row["name"] in images else Path(row["name"]).stem
        if name not in images:
            problems.append(f"{path}, line {line}: there is no image named {row['name']!r} in images/")
        if name in index:
            problems.append(f"{path}, line {line}: {name!r} is listed twice")
        for column, allowed in (("positive", ("0", "1", "")), ("segmented", ("0", "1", "")), ("split", (*SPLITS, ""))):
            if (value := row.get(column) or "") not in allowed:
                problems.append(
                    f"{path}, line {line}: {column} must be one of {', '.join(filter(None, allowed))}, found {value!r}"
                )
        index[name] = row
    problems += [f"{images[name]}: is not listed in index.csv" for name in sorted(images.keys() - index.keys())]
    return index


def _needs_no_mask(row: dict[str, str]) -> bool:
    return row.get("positive") == "0" or (row.get("segmented") == "0" and row.get("positive") == "1")


def _label_problem(image: Path, row: dict[str, str], positive: bool, fact: dict[str, Any]) -> str | None:
    """A label and a mask that contradict each other."""
    if not positive and fact["defect_pixels"]:
        return f"{image}: index.csv says positive = 0, but its mask has {fact['defect_pixels']} defect pixels"
    if positive and fact["mask_digest"] and not fact["defect_pixels"] and row.get("segmented") != "0":
        return f"{image}: index.csv says positive = 1, but its mask is empty; say segmented = 0 or positive = 0"
    return None


def _sample(
    name: str, image: Path, mask: Path | None, row: dict[str, str], positive: bool, fact: dict[str, Any]
) -> Sample:
    hidden = positive and row.get("segmented") == "0"
    return Sample(
        name=name,
        image=image,
        mask=mask,
        positive=positive,
        supervision=Supervision.IMAGE if hidden else Supervision.PIXEL,
        group=next((row[column] for column in _GROUP_COLUMNS if row.get(column)), name),
        source=row.get("source") or "",
        split=row.get("split") or None,
        digest=fact["digest"],
        mask_digest=fact["mask_digest"],
    )
