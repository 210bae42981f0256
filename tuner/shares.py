"""What of a node each of its trials takes: arithmetic on cores, GPUs and bytes."""

from __future__ import annotations

import math

_DIGITS = 2, 4
"""of a fraction of a GPU: two where they do, and Ray keeps no more than four"""


def cores_each(cores: float, gpus_there: float, gpus_each: float) -> float:
    """CPU cores of a trial: what its GPUs, or its part of one, are of the node's; whole ones, and one at least."""
    return float(max(1, int(cores * gpus_each / gpus_there + 1e-9))) if gpus_there else 1.0


def places(gpus_there: float, gpus_each: float) -> int:
    """How many trials a node's GPUs hold: parts of one GPU lie on one GPU."""
    return int(gpus_there // gpus_each) if gpus_each >= 1 else int(gpus_there) * int(1 / gpus_each + 1e-9)


def most_on_a_gpu(cores: float, gpus_there: float, cpus_each: float | None, at_once: int | None = None) -> int:
    """How many trials on one GPU the node has cores for; no more than it takes to have so many at once."""
    enough = math.ceil(at_once / gpus_there) if at_once else math.inf
    return max(1, int(min(cores / gpus_there / (cpus_each or 1.0) + 1e-9, enough)))


def part_of_gpu(trial_bytes: int, gpu_bytes: int, most: int) -> float:
    """The largest part of a GPU of which as many fit as of the least that holds a trial, but at most so many: 1/n but
    for the last digits, which are cut so that n of them are no more than one."""
    for count in range(min(most, gpu_bytes // max(1, trial_bytes)), 1, -1):
        for digits in _DIGITS:
            part = math.floor(10**digits / count) / 10**digits
            if part * gpu_bytes >= trial_bytes and int(1 / part) == count:
                return part
    return 1.0
