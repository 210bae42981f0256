"""Data sets on disk -> samples.

A layout is how files lie in a folder. Its module lists them, with the labels, groups and splits that the layout
states, and decodes nothing; `read` looks at every file once, in a process of its own, and makes the samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from model.inspection import inspect
from model.layouts import crack_segmentation, dagm, images_masks, kolektor, mvtec, roads, severstal
from model.layouts.listing import SPLITS, DataError, Item
from model.sample import Sample, Supervision

__all__ = ["LAYOUTS", "SPLITS", "DataError", "read"]


class _Layout(NamedTuple):
    matches: Callable[[Path], bool]
    """whether a folder looks like it"""
    items: Callable[[Path, list[str]], list[Item]]
    """lists a folder; problems are added to the list"""


_BY_NAME = {
    "images_masks": _Layout(images_masks.matches, images_masks.items),
    "crack_segmentation": _Layout(crack_segmentation.label_folders_match, crack_segmentation.by_label),
    "crack_segmentation_published": _Layout(crack_segmentation.published_matches, crack_segmentation.published),
    "sccdnet": _Layout(crack_segmentation.published_matches, crack_segmentation.published),
    "deepcrack": _Layout(roads.deepcrack_matches, roads.deepcrack),
    "crack500": _Layout(roads.crack500_matches, roads.crack500),
    "crackforest": _Layout(roads.crackforest_matches, roads.crackforest),
    "ksdd": _Layout(kolektor.ksdd_matches, kolektor.ksdd),
    "ksdd2": _Layout(kolektor.ksdd2_matches, kolektor.ksdd2),
    "dagm": _Layout(dagm.matches, dagm.items),
    "severstal": _Layout(severstal.matches, severstal.items),
    "mvtec": _Layout(mvtec.matches, mvtec.items),
}
"""In the order in which `auto` tries them."""

LAYOUTS = ("auto", *_BY_NAME)


def read(path: Path, layout: str = "auto") -> list[Sample]:
    """All samples of a data set, sorted by name. DataError with every problem, found by looking at every file."""
    if layout not in LAYOUTS:
        raise ValueError(f"the layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if not path.is_dir():
        raise DataError(path, ["there is no such folder; name the one that holds images/ and masks/"])
    problems: list[str] = []
    chosen = detect(path) if layout == "auto" else layout
    items = sorted(_BY_NAME[chosen].items(path, problems), key=lambda item: item.name)
    if not items and not problems:
        problems.append(f"no image found as the layout {chosen} has them; see `tuner data check --help`")
    problems += _equal_names(items)
    facts = inspect([(item.image, item.mask) for item in items])
    positives = [
        fact["defect_pixels"] > 0 if item.positive is None else item.positive
        for item, fact in zip(items, facts, strict=True)
    ]
    for item, positive, fact in zip(items, positives, facts, strict=True):
        if problem := fact["problem"] or _label_problem(item, positive, fact):
            problems.append(problem)
    if problems:
        raise DataError(path, problems)
    return [_sample(*each) for each in zip(items, positives, facts, strict=True)]


def detect(path: Path) -> str:
    """The layout that a folder looks like. DataError if it looks like none."""
    for name, layout in _BY_NAME.items():
        if layout.matches(path):
            return name
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise DataError(
        path,
        [
            f"a folder must hold images/ and masks/, or have another known layout ({', '.join(LAYOUTS[2:])}), "
            f"found {found}; name the folder above or below, or the layout"
        ],
    )


def _equal_names(items: list[Item]) -> list[str]:
    twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    return [
        f"{' and '.join(str(item.image) for item in items if item.name == name)}: have one name; rename one"
        for name in twice
    ]


def _label_problem(item: Item, positive: bool, fact: dict[str, Any]) -> str | None:
    """A label and a mask that contradict each other."""
    if not positive and fact["defect_pixels"]:
        return (
            f"{item.image}: {item.stated} says positive = 0, but its mask has {fact['defect_pixels']} defect pixels; "
            f"{item.way_out}"
        )
    if positive and fact["mask_digest"] and not fact["defect_pixels"] and item.segmented:
        return f"{item.image}: {item.stated} says positive = 1, but its mask is empty; {item.way_out}"
    return None


def _sample(item: Item, positive: bool, fact: dict[str, Any]) -> Sample:
    hidden = positive and (item.mask is None or not item.segmented)
    return Sample(
        name=item.name,
        image=item.image,
        mask=item.mask,
        positive=positive,
        supervision=Supervision.IMAGE if hidden else Supervision.PIXEL,
        group=item.group,
        source=item.source,
        split=item.split,
        digest=fact["digest"],
        mask_digest=fact["mask_digest"],
    )
