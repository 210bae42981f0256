"""Cross-validation by group: training and validation as one pool, dealt into folds that are held out in turn.

Every sample has a place in the pool, its row. The test split is no part of it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from model.arrays import Array
from model.config import CrossValidation
from model.sample import Sample, Supervision
from model.splits import Splits


class Fold(NamedTuple):
    """What one training is given, as rows of the pool."""

    train: list[int]
    validation: list[int]
    """on which epoch and thresholds are chosen"""
    outer: list[int]
    """which are only scored; none unless it is nested"""


def pool(splits: Splits) -> list[Sample]:
    """What is dealt: the samples of training and validation, sorted by name."""
    return sorted(splits.train + splits.validation, key=lambda sample: sample.name)


def deal(samples: list[Sample], wanted: CrossValidation, seed: int) -> list[Fold]:
    """The folds of a pool. Fold n is held out of training n; a nested one also leaves out the next fold, which chooses.
    ValueError as `held_out`."""
    held = held_out(samples, wanted.folds, seed)
    found = []
    for n, rows in enumerate(held):
        chooses, outer = (held[(n + 1) % len(held)], rows) if wanted.nested else (rows, [])
        out = {*chooses, *outer}
        found.append(Fold([row for row in range(len(samples)) if row not in out], chooses, outer))
    return found


def splits_of_each(found: Splits, wanted: CrossValidation | None, seed: int) -> list[Splits]:
    """What each training of a trial has for its train and validation; the data's own where a trial is one training."""
    if wanted is None:
        return [found]
    samples = pool(found)
    return [
        Splits([samples[row] for row in fold.train], [samples[row] for row in fold.validation], found.test)
        for fold in deal(samples, wanted, seed)
    ]


def held_out(samples: list[Sample], folds: int, seed: int) -> list[list[int]]:
    """The rows of each fold, in their order; what is in none is always trained on.

    No group and no file lies in two folds, and positives and negatives are both spread evenly, large groups first. What
    has an image without a mask is in no fold, since nothing can be measured on it. ValueError if a fold would have no
    positives, or no negatives where there are some.
    """
    parts = [part for part in _inseparable(samples) if all(samples[n].supervision is Supervision.PIXEL for n in part)]
    has_negatives = not all(sample.positive for sample in samples)
    _check_enough_to_deal(samples, parts, folds, has_negatives)
    np.random.default_rng(seed).shuffle(parts)
    parts.sort(key=lambda part: -len(part))  # the shuffle decides between equals
    counts_P2 = np.array([_of_both_kinds([samples[n] for n in part]) for part in parts])
    wanted = np.maximum(counts_P2.sum(axis=0) / folds, 1e-9)
    held = np.zeros((folds, 2))
    dealt: list[list[int]] = [[] for _ in range(folds)]
    for p, part in enumerate(parts):
        open_to = np.ones(folds, bool)
        for kind, left in enumerate((counts_P2[p:] > 0).sum(axis=0)):  # where few are left, they are for who has none
            lacks = held[:, kind] == 0
            if counts_P2[p, kind] and left <= lacks.sum() and (lacks & open_to).any():
                open_to &= lacks
        room = ((wanted - held) / wanted) @ counts_P2[p]
        target = int(np.where(open_to, room, -np.inf).argmax())
        held[target] += counts_P2[p]
        dealt[target] += part
    for kind, name in enumerate(("positive", "negative")):
        if (name == "positive" or has_negatives) and not held[:, kind].all():
            raise ValueError(
                f"each of {folds} folds needs {name} images, found none for one of them; lower cross_validation.folds, "
                "or split the data into smaller groups"
            )
    return [sorted(rows) for rows in dealt]


def _inseparable(samples: list[Sample]) -> list[list[int]]:
    """Rows that share a group or a file, directly or through others; in an order that depends on the samples alone."""
    leader = list(range(len(samples)))

    def find(n: int) -> int:
        while leader[n] != n:
            n = leader[n]
        return n

    first: dict[tuple[str, str], int] = {}
    for n, sample in enumerate(samples):
        for key in (("group", sample.group), ("file", sample.digest)):
            leader[find(n)] = find(first.setdefault(key, n))
    together: dict[int, list[int]] = defaultdict(list)
    for n in range(len(samples)):
        together[find(n)].append(n)
    return sorted(together.values())


def _of_both_kinds(samples: list[Sample]) -> Array:
    """How many positives and negatives."""
    positives = sum(sample.positive for sample in samples)
    return np.array([positives, len(samples) - positives])


def _check_enough_to_deal(samples: list[Sample], parts: list[list[int]], folds: int, has_negatives: bool) -> None:
    for name, positive, needed in (("positive", True, True), ("negative", False, has_negatives)):
        found = sum(any(samples[n].positive is positive for n in part) for part in parts)
        if needed and found < folds:
            why = "; a group with an image that has no mask is always trained on" if positive else ""
            raise ValueError(
                f"{folds} folds need at least as many groups with {name} images to hold out, found {found}{why}; lower "
                "cross_validation.folds, add images, or split the data into smaller groups"
            )
