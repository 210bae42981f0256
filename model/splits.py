"""Train, validation and test by group, and what must hold between them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.layouts import SPLITS, DataError
from model.sample import Sample, Supervision


class Splits(NamedTuple):
    """The samples of each split, sorted by name."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]

    @property
    def has_negatives(self) -> bool:
        """Without any, there is nothing to decide: no decision score, no sampling of negatives."""
        return any(not sample.positive for split in self for sample in split)


def assign(samples: list[Sample], path: Path, validation_share: float, test_share: float, seed: int) -> Splits:
    """Splits a data set as its layout or index.csv says, or else at random by group.

    Where a split is given for the test images alone, they stay it; of the others, validation gets its share.
    Positives and negatives are both spread by the shares; a group with an image that has no mask goes to training,
    since nothing can be measured on it. `path` is for messages. DataError if a split lacks what the method needs, or
    if a group or a file lies on both sides.
    """
    given = Splits(*([s for s in samples if s.split == name] for name in SPLITS))
    free = [s for s in samples if s.split is None]
    if free and (given.train or given.validation):
        raise DataError(
            path,
            [
                f"index.csv must give a split for all images or none, found {len(samples) - len(free)} of "
                f"{len(samples)}; fill the column 'split', or say test in it and nothing else"
            ],
        )
    if free:
        splits = _at_random(free, validation_share, 0.0 if given.test else test_share, seed)
        splits = splits._replace(test=splits.test + given.test)
    else:
        splits = given
    if problems := _missing_classes(splits) + _leaks(splits):
        raise DataError(path, problems)
    return splits


def _at_random(samples: list[Sample], validation_share: float, test_share: float, seed: int) -> Splits:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    names = sorted(groups)
    np.random.default_rng(seed).shuffle(names)
    # Large groups first, while there is room for them; the shuffle decides between equals.
    names.sort(key=lambda name: -len(groups[name]))
    shares = np.array([1 - validation_share - test_share, validation_share, test_share])
    totals = np.array([sum(s.positive for s in samples), sum(not s.positive for s in samples)])
    wanted = shares[:, None] * totals
    held = np.zeros_like(wanted)
    chosen: list[list[Sample]] = [[], [], []]
    for name in names:
        members = groups[name]
        counts = np.array([sum(s.positive for s in members), sum(not s.positive for s in members)])
        if any(sample.supervision is Supervision.IMAGE for sample in members):
            target = 0
        else:
            room = ((wanted - held) / np.maximum(wanted, 1e-9)) @ counts
            target = int(np.where(shares > 0, room, -np.inf).argmax())
        held[target] += counts
        chosen[target] += members
    return Splits(*(sorted(split, key=lambda sample: sample.name) for split in chosen))


def _missing_classes(splits: Splits) -> list[str]:
    problems = []
    for name, split in zip(SPLITS, splits, strict=True):
        positives = sum(sample.positive for sample in split)
        for kind, found, needed in (
            ("positive", positives, True),
            ("negative", len(split) - positives, splits.has_negatives),
        ):
            if needed and not found:
                problems.append(
                    f"the {name} split needs {kind} images (the data set has some), found none among {len(split)}; "
                    "add images, split into smaller groups, or give index.csv a column 'split'"
                )
    for name, split in zip(SPLITS[1:], splits[1:], strict=True):
        if hidden := [s.name for s in split if s.supervision is Supervision.IMAGE]:
            problems.append(f"the {name} split needs a mask for every positive, found none for {', '.join(hidden[:5])}")
    return problems


def _leaks(splits: Splits) -> list[str]:
    problems = []
    for what, key in (("group", "group"), ("image file", "digest")):
        where: dict[str, dict[str, str]] = defaultdict(dict)
        for name, split in zip(SPLITS, splits, strict=True):
            for sample in split:
                where[getattr(sample, key)].setdefault(name, sample.name)
        for sides in where.values():
            if len(sides) > 1:
                found = " and ".join(f"{sample!r} in {name}" for name, sample in sides.items())
                problems.append(
                    f"one {what} must not lie in two splits, found {found}; give them one group, or where the splits "
                    "are given, leave one side out: tuner data convert --drop-leaks"
                )
    return problems


def without_leaks(samples: list[Sample]) -> list[Sample]:
    """The samples but those whose group or file also lies in a given split to the right: train, validation, test."""
    ranks: dict[tuple[str, str], int] = defaultdict(int)

    def rank(sample: Sample) -> int:
        return SPLITS.index(sample.split or "train")

    for sample in samples:
        for key in (("group", sample.group), ("digest", sample.digest)):
            ranks[key] = max(ranks[key], rank(sample))
    return [s for s in samples if rank(s) == ranks["group", s.group] == ranks["digest", s.digest]]


def keep_masks(train: list[Sample], num_segmented: int | str, seed: int = 0) -> list[Sample]:
    """The training samples of which only `num_segmented` positives keep their masks; negatives always do.

    Which ones is drawn once from the seed and their names, and fewer are always a part of more, so that counts can be
    compared. (A fixed list is the column `segmented` of index.csv.)
    ValueError if there are not so many.
    """
    if num_segmented == "all":
        return train
    segmented = [s for s in train if s.positive and s.supervision is Supervision.PIXEL]
    assert isinstance(num_segmented, int)
    if num_segmented > len(segmented):
        raise ValueError(
            f"num_segmented must be at most the number of positive training images with a mask, {len(segmented)}, "
            f"found {num_segmented}; use a smaller count or the word 'all'"
        )
    ranked = sorted(segmented, key=lambda s: hashlib.sha256(f"{seed}:{s.name}".encode()).digest())
    hidden = {sample.name for sample in ranked[num_segmented:]}
    return [_without_mask(s) if s.name in hidden else s for s in train]


def _without_mask(sample: Sample) -> Sample:
    return dataclasses.replace(sample, supervision=Supervision.IMAGE)


def counts(split: list[Sample]) -> dict[str, int]:
    """How many positives and negatives there are, and how many positives have masks."""
    positives = [sample for sample in split if sample.positive]
    return {
        "positive": len(positives),
        "negative": len(split) - len(positives),
        "segmented": sum(sample.supervision is Supervision.PIXEL for sample in positives),
    }


def fingerprint(splits: Splits) -> str:
    """Names the data and how they are split: equal when every file, label, group and side is."""
    return _fingerprint([line for name, split in zip(SPLITS, splits, strict=True) for line in _lines(name, split)])


def fingerprint_of_test(splits: Splits) -> str:
    """Names the test split alone: what an opening of it has shown."""
    return _fingerprint(_lines("test", splits.test))


def _lines(name: str, split: list[Sample]) -> list[list[Any]]:
    return [[name, s.name, s.digest, s.mask_digest, s.positive, s.supervision.value, s.group] for s in split]


def _fingerprint(lines: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
