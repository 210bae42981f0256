"""What all layouts share: an image as a layout lists it, before any file is decoded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from model.sample import Rle

SPLITS = ("train", "validation", "test")
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_SHOWN_PROBLEMS = 20


class DataError(ValueError):
    """A data set that cannot be used; the message lists every problem found."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        shown = problems[:_SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        super().__init__("\n  ".join([f"the data set {path} cannot be used:", *shown]))


class Item(NamedTuple):
    """One image as a layout lists it."""

    name: str
    """unique in the data set; good as a file name"""
    image: Path
    mask: Path | Rle | None
    positive: bool | None
    """None where the layout states no label but the mask: then there is one, and an empty one means negative"""
    group: str
    source: str = ""
    split: str | None = None
    segmented: bool = True
    """False: a positive that teaches its label alone, whatever mask there is"""
    stated: str = "the folder"
    """who says `positive`, for messages"""
    way_out: str = "mend the mask or move the image"
    """what to do when label and mask contradict each other, for messages"""


def images_of(folder: Path) -> list[Path]:
    """The image files of a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_TYPES and not file.name.startswith(".")
    )  # archives made on a Mac hold a ._NAME beside each file


def some_images_of(folder: Path, problems: list[str]) -> list[Path]:
    """The image files of a folder that must not be missing or empty."""
    found = images_of(folder)
    if not found:
        types = ", ".join(sorted(IMAGE_TYPES))
        problems.append(f"{folder}: no image found ({types}); add the images, or name another layout")
    return found


def by_stem(files: Iterable[Path], problems: list[str], suffix: str = "") -> dict[str, Path]:
    """Files by their names without `suffix` and the ending; two with one name are a problem."""
    found: dict[str, Path] = {}
    for file in files:
        stem = file.stem.removesuffix(suffix)
        if stem in found:
            problems.append(f"{file}: {found[stem].name} has the same name; rename one")
        found[stem] = file
    return found


def folder_pairs(images: Path, masks: Path, problems: list[str]) -> list[tuple[Path, Path | None]]:
    """Images of one folder with the masks of the same names in another; a mask alone is a problem."""
    pictures, truths = by_stem(some_images_of(images, problems), problems), by_stem(images_of(masks), problems)
    problems += [
        f"{truths[stem]}: there is no image of this name in {images.name}/; remove the mask or add the image"
        for stem in sorted(truths.keys() - pictures.keys())
    ]
    return [(pictures[stem], truths.get(stem)) for stem in sorted(pictures)]


def suffix_pairs(folder: Path, suffix: str, problems: list[str]) -> list[tuple[Path, Path | None]]:
    """Images of a folder with the masks beside them, called NAME + `suffix`; a mask alone is a problem."""
    files = some_images_of(folder, problems)
    masks = by_stem((file for file in files if file.stem.endswith(suffix)), problems, suffix)
    images = by_stem((file for file in files if not file.stem.endswith(suffix)), problems)
    problems += [
        f"{masks[stem]}: there is no image {stem!r} beside this mask; remove the mask or add the image"
        for stem in sorted(masks.keys() - images.keys())
    ]
    return [(images[stem], masks.get(stem)) for stem in sorted(images)]


def need_mask(image: Path, mask: Path | None, expected: str, problems: list[str]) -> None:
    """For layouts that state a label by the mask alone: no mask, no label."""
    if mask is None:
        problems.append(
            f"{image}: there is no mask for it, and nothing else in this layout says whether it shows a defect; "
            f"add {expected} (all 0 for a negative) or remove the image"
        )
