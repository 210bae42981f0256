"""The plain layout, which `tuner data convert` writes.

`images/NAME.jpg` (or another image format), `masks/NAME.png` of the same size, and optionally `index.csv` with the
columns `name` and any of `positive` (0/1), `segmented` (0/1), `split` (train, validation, test), `source`, and the
first of `group`, `photo_group`, `item`: which images must stay on one side of a split. Without `positive`, an image
is positive when its mask is not empty. A mask's defect is 255.
"""

from __future__ import annotations

import csv
from pathlib import Path

from model.layouts.listing import IMAGE_TYPES, SPLITS, Item, by_stem, images_of

_GROUP_COLUMNS = ("group", "photo_group", "item")


def matches(path: Path) -> bool:
    return (path / "images").is_dir()


def items(path: Path, problems: list[str]) -> list[Item]:
    images, masks = _folder(path / "images", problems), _folder(path / "masks", problems)
    rows = _read_index(path / "index.csv", images, problems)
    if not images and not problems:
        problems.append(f"{path / 'images'}: no image found ({', '.join(sorted(IMAGE_TYPES))})")
    problems += [
        f"{masks[name]}: there is no image of this name in images/" for name in sorted(masks.keys() - images.keys())
    ]
    for name in sorted(images.keys() - masks.keys()):
        if not _needs_no_mask(rows.get(name, {})):
            problems.append(
                f"{images[name]}: there is no mask for it; add masks/{name}.png, or say positive = 0 "
                "or segmented = 0 in index.csv"
            )
    return [_item(name, images[name], masks.get(name), rows.get(name, {})) for name in sorted(images)]


def _item(name: str, image: Path, mask: Path | None, row: dict[str, str]) -> Item:
    return Item(
        name=name,
        image=image,
        mask=mask,
        positive={"1": True, "0": False}.get(row.get("positive") or ""),
        segmented=row.get("segmented") != "0",
        group=next((row[column] for column in _GROUP_COLUMNS if row.get(column)), name),
        source=row.get("source") or "",
        split=row.get("split") or None,
        stated="index.csv",
        way_out="say segmented = 0 or positive = 0",
    )


def _folder(folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{folder}: there is no such folder; the layout is images/NAME.jpg and masks/NAME.png")
    return by_stem(images_of(folder), problems)


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
