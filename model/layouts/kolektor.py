"""Kolektor's two sets. Neither states a label but by its masks: every image has one, all 0 where nothing is wrong.

KolektorSDD (Tabernik et al., J. Intell. Manuf. 2019; vicos.si/resources/kolektorsdd): `kosNN/PartM.jpg` and
`PartM_label.bmp`. An item, kosNN, is a group. The published splits are three folds over items; none is taken here.

KolektorSDD2 (Bozic et al., Computers in Industry 2021; vicos.si/resources/kolektorsdd2): `train/NNNNN.png` and
`NNNNN_GT.png`, `test/` likewise. No validation split is published. The archive holds a duplicate, `10301 (copy).png`
and `10301_GT (copy).png`, which is left out: without it there are the paper's 2,331 training images.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.layouts.listing import Item, images_of, need_mask, suffix_pairs

_ITEM_FOLDER = re.compile(r"kos\d+", re.IGNORECASE)


def ksdd_matches(path: Path) -> bool:
    return bool(_item_folders(path))


def ksdd(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for folder in _item_folders(path):
        for image, mask in suffix_pairs(folder, "_label", problems):
            need_mask(image, mask, f"{image.stem}_label.bmp", problems)
            found.append(Item(f"{folder.name}_{image.stem}", image, mask, None, group=folder.name))
    return found


def ksdd2_matches(path: Path) -> bool:
    return any(file.stem.endswith("_GT") for file in images_of(path / "train"))


def ksdd2(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for part in ("train", "test"):
        for image, mask in suffix_pairs(path / part, "_GT", problems):
            if image.stem.endswith(" (copy)"):
                continue
            need_mask(image, mask, f"{part}/{image.stem}_GT.png", problems)
            split = "test" if part == "test" else None
            found.append(Item(image.stem, image, mask, None, group=image.stem, split=split))
    return found


def _item_folders(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _ITEM_FOLDER.fullmatch(folder.name)]
