"""DAGM 2007 (Heidelberg; hci.iwr.uni-heidelberg.de/content/dagm-2007-dataset-bibtex-and-description).

`ClassN/Train/NNNN.PNG` and `ClassN/Train/Label/NNNN_label.PNG`, a coarse ellipse of 255, for defects alone;
`ClassN/Test` likewise. Archives may hold `ClassN/ClassN`. `Label/Labels.txt`, where it is, has a line for each image:
number, defect (0/1), image, a number, mask or 0; it states the label. Without it the label folder does: an image that
has no mask there is free of defects. An image is a group, a class a source. No validation split is published.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.layouts.listing import Item, by_stem, images_of, some_images_of

_CLASS_FOLDER = re.compile(r"Class\d+", re.IGNORECASE)


def matches(path: Path) -> bool:
    return bool(_class_folders(path))


def items(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for folder in _class_folders(path):
        for part in ("Train", "Test"):
            found += _part(folder, part, problems)
    return found


def _part(folder: Path, part: str, problems: list[str]) -> list[Item]:
    images = by_stem(some_images_of(folder / part, problems), problems)
    labels = folder / part / "Label"
    if images and not labels.is_dir():
        problems.append(f"{labels}: there is no such folder, so nothing says which images have a defect; add it")
    masks = by_stem(images_of(labels), problems, "_label")
    problems += [
        f"{masks[stem]}: there is no image {stem} for this mask; remove the mask or add the image"
        for stem in sorted(masks.keys() - images.keys())
    ]
    stated = _labels(labels / "Labels.txt", images, problems)
    found = []
    for stem, image in sorted(images.items()):
        positive = stated.get(stem, stem in masks)
        if positive and stem not in masks:
            problems.append(f"{image}: Labels.txt says that it has a defect; add Label/{stem}_label.PNG")
        name = f"{folder.name}_{part}_{stem}"
        split = "test" if part == "Test" else None
        found.append(
            Item(name, image, masks.get(stem), positive, name, folder.name, split, stated="Label/", way_out="mend one")
        )
    return found


def _labels(file: Path, images: dict[str, Path], problems: list[str]) -> dict[str, bool]:
    """Stems that Labels.txt calls defective or not; all of them, where there is one."""
    if not file.exists():
        return {}
    rows = [line.split() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    stated = {Path(row[2]).stem: row[1] == "1" for row in rows if len(row) >= 3 and row[1] in ("0", "1")}
    problems += [
        f"{images[stem]}: has no line in {file}; add one or remove the image"
        for stem in sorted(images.keys() - stated.keys())
    ]
    return stated


def _class_folders(path: Path) -> list[Path]:
    found = []
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and _CLASS_FOLDER.fullmatch(folder.name):
            nested = folder / folder.name
            folder = nested if nested.is_dir() else folder
            if (folder / "Train").is_dir():
                found.append(folder)
    return found
