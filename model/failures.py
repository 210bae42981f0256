"""Which test images went wrong, by kind, and which of them are shown: the report names these, and the evaluation keeps
their pictures.

N images of a split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.arrays import Array, Bools, Floats, Ints

ROWS = 12
"""failures that are shown"""


@dataclass(frozen=True)
class Failures:
    """Rows of the split by kind, the worst first."""

    missed: Ints
    """images with a defect that were decided negative or whose mask is empty; most pixels of the truth first"""
    false_alarms: Ints
    """images without one that were decided positive or whose mask is not empty; most false pixels first"""
    poor: Ints
    """the other images with a defect, by Dice where it is below 1"""

    def shown(self, rows: int = ROWS) -> list[tuple[str, int]]:
        """(kind, row), kind by kind: equal parts, and what a kind leaves goes to the others."""
        kinds = {"missed": self.missed, "false alarm": self.false_alarms, "poor mask": self.poor}
        counts = dict.fromkeys(kinds, 0)
        while sum(counts.values()) < rows:
            open_ones = [name for name, all_of_it in kinds.items() if counts[name] < len(all_of_it)]
            if not open_ones:
                break
            counts[min(open_ones, key=counts.__getitem__)] += 1
        return [(name, int(n)) for name, all_of_it in kinds.items() for n in all_of_it[: counts[name]]]


def find(
    labels_N: Bools, decided_N: Bools | None, scores_N: Array, predicted_N: Ints, truth_N: Ints, dice_N: Floats
) -> Failures:
    """`decided_N` is None where there is no decision; `scores_N` orders false alarms with equal masks; `predicted_N`
    and `truth_N` are pixels."""
    defect = labels_N | (truth_N > 0)
    negative = np.zeros(len(defect), bool) if decided_N is None else ~decided_N
    positive = np.zeros(len(defect), bool) if decided_N is None else decided_N
    missed = defect & (negative | ((predicted_N == 0) & (truth_N > 0)))
    alarm = ~defect & ((predicted_N > 0) | positive)
    poor = defect & ~missed & (dice_N < 1)

    def ordered(rows_N: Bools, *keys: Array) -> Ints:
        return np.array([n for n in np.lexsort(keys) if rows_N[n]], np.int64)

    return Failures(
        ordered(missed, dice_N, -truth_N),
        ordered(alarm, -scores_N, -predicted_N),
        ordered(poor, -truth_N, dice_N),
    )
