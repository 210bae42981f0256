"""The merged crack_segmentation set (github.com/khanhha/crack_segmentation) and its relative of the SCCDNet paper.

`by_label`: folders `train_positive`, `train_negative`, `val_...`, `test_...`, each with NAME.jpg and NAME_GT.png (any
image format), as the SegDecNet++ experiments use it. The folder says the label: an image without a GT file is legal.
Without validation folders, the train part is split by photo.

`published`: `train/images`, `train/masks`, `test/images`, `test/masks`; masks are JPEG files of the images' names.
Names that begin with `noncrack` are negatives; of other images the mask says it (6 rissbilder and 3 Sylvie_Chambon
images of the test part have empty ones). No validation split is published: the train part is split by photo.

SCCDNet (Li et al., Applied Sciences 11(11):5074, 2021; corrected by Tabernik et al., 2023) has the same tree and the
same names, by github.com/vicoslab/segdec-net-plusplus-conbuildmat2023/datasets/README.md. Its seven test lists are the
test images by source, which `source` says here.

Masks are cut at > 127: JPEG ones ring, and `> 0` would be a third larger.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.layouts.listing import Item, folder_pairs, need_mask, suffix_pairs

_SPLIT_WORDS = dict.fromkeys(("val", "valid", "validation"), "validation") | {"train": "train", "test": "test"}
_LABEL_FOLDER = re.compile(f"({'|'.join(_SPLIT_WORDS)})_(positive|negative)", re.IGNORECASE)

_PHOTOS = (
    # source and photo of a crop, from its name: what follows is where in the photo the crop lies
    re.compile(r"(?P<source>CRACK500)_(?P<photo>\d{8}_\d{6})_.*", re.IGNORECASE),
    re.compile(r"(?P<source>GAPS384)_(?P<photo>(?:train|test|valid)_\d+)_.*", re.IGNORECASE),
    re.compile(r"(?P<source>Rissbilder|Volker|Eugen_Muller)(?:_for_Florian)?_(?P<photo>[^_]+)_.*", re.IGNORECASE),
    re.compile(r"(?P<source>DeepCrack)_(?P<photo>.+?)(?:-\d+)?", re.IGNORECASE),
    re.compile(r"(?P<source>noncrack)_(?P<photo>.+?)(?:_\d+)?", re.IGNORECASE),
    # three copies of CrackForest (METHOD 7): CFD_ and forest_ carry its numbers
    re.compile(r"(?P<source>CFD|forest)_(?P<photo>\d+)", re.IGNORECASE),
    re.compile(r"(?P<source>cracktree200|Sylvie_Chambon)_(?P<photo>.+)", re.IGNORECASE),
)


def label_folders_match(path: Path) -> bool:
    return bool(_label_folders(path))


def by_label(path: Path, problems: list[str]) -> list[Item]:
    folders = _label_folders(path)
    validates = any(split == "validation" for _, split, _ in folders)
    found = []
    for folder, part, positive in folders:
        split = part if validates or part == "test" else None
        for image, mask in suffix_pairs(folder, "_GT", problems):
            source, group = photo(image.stem)
            found.append(Item(image.stem, image, mask, positive, group, source, split))
    return found


def published_matches(path: Path) -> bool:
    return (path / "train" / "images").is_dir() and (path / "test" / "images").is_dir()


def published(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for part in ("train", "test"):
        for image, mask in folder_pairs(path / part / "images", path / part / "masks", problems):
            negative = image.stem.lower().startswith("noncrack")
            if not negative:
                need_mask(image, mask, f"{part}/masks/{image.stem}.jpg", problems)
            source, group = photo(image.stem)
            found.append(
                Item(
                    image.stem, image, mask, False if negative else None, group, source,
                    "test" if part == "test" else None, stated="the name", way_out="mend the mask",
                )
            )  # fmt: skip
    return found


def photo(name: str) -> tuple[str, str]:
    """Source and photo of an image, from its name. Crops of one photo have one group."""
    for pattern in _PHOTOS:
        if found := pattern.fullmatch(name):
            source = found["source"].lower()
            camera = "crackforest" if source in ("cfd", "forest") else source
            number = found["photo"].lstrip("0") if camera == "crackforest" else found["photo"]
            return source, f"{camera}:{number}"
    return "", name


def _label_folders(path: Path) -> list[tuple[Path, str, bool]]:
    """Folder, split and label of each."""
    return [
        (folder, _SPLIT_WORDS[found[1].lower()], found[2].lower() == "positive")
        for folder in sorted(path.iterdir())
        if folder.is_dir() and (found := _LABEL_FOLDER.fullmatch(folder.name))
    ]
