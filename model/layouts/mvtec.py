"""MVTec-style folders (Bergmann et al., CVPR 2019; mvtec.com/company/research/datasets/mvtec-ad).

`CATEGORY/train/good`, `CATEGORY/test/good`, `CATEGORY/test/DEFECT` and `CATEGORY/ground_truth/DEFECT/NAME_mask.png`
with 0 and 255, for all categories of a folder, or for one that the path names. The folder states the label: a defect
without a mask is legal, and teaches its label alone.

As published, `train` holds good images alone, for methods that learn without defects. Ours learns from defects, so
there the published sides cannot serve: no split is taken, and all images are split at random. Where `train` has a
folder of defects too, `test` stays the test split; masks are those of the test image where both have one name.
"""

from __future__ import annotations

from pathlib import Path

from model.layouts.listing import Item, by_stem, images_of, some_images_of

_GOOD = "good"


def matches(path: Path) -> bool:
    return bool(_categories(path))


def items(path: Path, problems: list[str]) -> list[Item]:
    found = []
    for category in _categories(path):
        listed = _category(category, problems)
        if any(item.positive and item.split is None for item in listed):
            found += listed
        else:
            found += [item._replace(split=None) for item in listed]
    return found


def _category(category: Path, problems: list[str]) -> list[Item]:
    found = []
    known = set()
    category = category.absolute()  # "." has no name
    for part in ("train", "test"):
        for folder in sorted(path for path in (category / part).iterdir() if path.is_dir()):
            masks = by_stem(images_of(category / "ground_truth" / folder.name), problems, "_mask")
            for image in by_stem(some_images_of(folder, problems), problems).values():
                name = f"{category.name}_{part}_{folder.name}_{image.stem}"
                of_test = part == "test" or not (category / "test" / folder.name / image.name).exists()
                mask = masks.get(image.stem) if of_test else None
                known.add(mask)
                split = "test" if part == "test" else None
                found.append(Item(name, image, mask, folder.name != _GOOD, name, category.name, split))
    for folder in sorted((category / "ground_truth").glob("*")):
        problems += [
            f"{mask}: there is no image for this mask in test/{folder.name}/; remove the mask or add the image"
            for mask in images_of(folder)
            if mask not in known
        ]
    return found


def _categories(path: Path) -> list[Path]:
    found = [category for category in (path, *sorted(path.iterdir())) if _is_category(category)]
    return found[:1] if path in found else found


def _is_category(path: Path) -> bool:
    return (path / "train" / _GOOD).is_dir() and (path / "test").is_dir()
