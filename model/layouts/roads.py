"""Three road crack sets: DeepCrack, CRACK500 and CrackForest. None states a label: an image's mask says it.

DeepCrack (Liu et al., Neurocomputing 338, 2019; github.com/yhlleo/DeepCrack): `train_img`, `train_lab`, `test_img`,
`test_lab`; NAME.jpg and NAME.png with 0 and 255. No validation split is published.

CRACK500 (Yang et al., T-ITS 2019; github.com/fyangneil/pavement-crack-detection): `traincrop`, `valcrop`, `testcrop`
with DATE_TIME_X_Y.jpg and the mask of the same name and the ending .png (or NAME_mask.png). `train.txt`, `val.txt` and
`test.txt`, where they are, list "image mask" pairs; the archive may hold `traincrop/traincrop`. A crop's group is its
photo, DATE_TIME.

CrackForest (Shi et al., T-ITS 2016; github.com/cuilimeng/CrackForest-dataset): `image/NNN.jpg` and
`groundTruth/NNN.mat`, whose Segmentation has crack as labels 2 and 4. Images 201-208 and 301-329 come without a
ground truth and are left out. No split is published.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.layouts.listing import Item, by_stem, folder_pairs, need_mask, some_images_of

_CROPS = {"train": "train", "val": "validation", "test": "test"}
_CROP_NAME = re.compile(r"(\d{8}_\d{6})_\d+_\d+")
_CRACKFOREST_UNLABELLED = {f"{n:03}" for n in (*range(201, 209), *range(301, 330))}


def deepcrack_matches(path: Path) -> bool:
    return (path / "train_img").is_dir()


def deepcrack(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for part in ("train", "test"):
        for image, mask in folder_pairs(path / f"{part}_img", path / f"{part}_lab", problems):
            need_mask(image, mask, f"{part}_lab/{image.stem}.png", problems)
            group = re.sub(r"-\d+$", "", image.stem)  # 11125-1 and 11125-2 are crops of one photo
            found.append(Item(image.stem, image, mask, None, group, split="test" if part == "test" else None))
    return found


def crack500_matches(path: Path) -> bool:
    return (path / "traincrop").is_dir()


def crack500(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for part, split in _CROPS.items():
        listed = path / f"{part}.txt"
        pairs = _listed_pairs(listed, problems) if listed.exists() else _crop_pairs(path / f"{part}crop", problems)
        for image, mask in pairs:
            need_mask(image, mask, f"{image.stem}.png", problems)
            photo = _CROP_NAME.fullmatch(image.stem)
            found.append(Item(image.stem, image, mask, None, photo[1] if photo else image.stem, split=split))
    return found


def _crop_pairs(folder: Path, problems: list[str]) -> list[tuple[Path, Path | None]]:
    if (folder / folder.name).is_dir():
        folder = folder / folder.name
    files = some_images_of(folder, problems)
    images = by_stem((file for file in files if file.suffix.lower() != ".png"), problems)
    masks = by_stem((file for file in files if file.suffix.lower() == ".png"), problems, "_mask")
    problems += [
        f"{masks[stem]}: there is no photo {stem}.jpg beside this mask; remove the mask or add the photo"
        for stem in sorted(masks.keys() - images.keys())
    ]
    return [(images[stem], masks.get(stem)) for stem in sorted(images)]


def _listed_pairs(file: Path, problems: list[str]) -> list[tuple[Path, Path | None]]:
    pairs: list[tuple[Path, Path | None]] = []
    for line, text in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = text.split()
        if not words:
            continue
        if len(words) != 2:
            problems.append(f"{file}, line {line}: must be an image and a mask, found {text[:80]!r}; mend the line")
            continue
        image, mask = (_under(file.parent, word) for word in words)
        missing = [path for path in (image, mask) if not path.is_file()]
        problems += [f"{file}, line {line}: there is no file {path}; add it or remove the line" for path in missing]
        if not missing:
            pairs.append((image, mask))
    if not pairs and not problems:
        problems.append(f"{file}: lists no image; add lines of an image and a mask, or remove the file")
    return pairs


def _under(root: Path, word: str) -> Path:
    """A listed path; `traincrop/NAME` may lie in `traincrop/traincrop`, as archives are unpacked."""
    path = root / word.lstrip("/")
    nested = path.parent / path.parent.name / path.name
    return nested if not path.is_file() and nested.is_file() else path


def crackforest_matches(path: Path) -> bool:
    return (path / "image").is_dir() and (path / "groundTruth").is_dir()


def crackforest(path: Path, problems: list[str]) -> list[Item]:
    images = by_stem(some_images_of(path / "image", problems), problems)
    truths = {file.stem: file for file in sorted((path / "groundTruth").glob("*.mat"))}
    problems += [
        f"{truths[stem]}: there is no image of this name in image/; remove the file or add the image"
        for stem in sorted(truths.keys() - images.keys())
    ]
    found = []
    for stem, image in sorted(images.items()):
        if stem in truths or stem not in _CRACKFOREST_UNLABELLED:
            need_mask(image, truths.get(stem), f"groundTruth/{stem}.mat", problems)
            found.append(Item(stem, image, truths.get(stem), None, group=stem))
    return found
