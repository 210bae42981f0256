"""Random changes of a training image and its mask. Each depends on the configuration and on three numbers alone: so it
is the same in any thread, beside any others, at any time.

The changes are albumentations' own. Not its Compose, which gives each of them a generator with the same seed, so that
choices hang together: an image is flipped both ways or not at all, and has less contrast where it is flipped.
Images are (H, W, 3) uint8 RGB, masks (H, W) uint8.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from model.arrays import Array
from model.config import RunConfig

Numbers = tuple[int, int, int]
"""seed, epoch and row of an image: they fix its random choices"""

Augment = Callable[[Array, Array, Numbers, Array, Array], None]
"""Takes an image, its mask and the numbers; writes the changed ones to where the last two arguments are."""


def augmentation(config: RunConfig) -> Augment:
    """The changes that a configuration asks for; any thread may ask for them."""
    if not (config.augment_flips or config.augment_quarter_turns or config.augment_brightness or config.augment_color):
        return _copy
    of_thread = threading.local()  # a change keeps its generator

    def augment(image: Array, mask: Array, numbers: Numbers, image_out: Array, mask_out: Array) -> None:
        if not hasattr(of_thread, "changes"):
            of_thread.changes = _changes(config)
        seed = int(np.random.default_rng(numbers).integers(2**31))
        generators = np.random.default_rng(seed), random.Random(seed)
        changed = {"image": image, "mask": mask}
        for change in of_thread.changes:
            change.set_random_state(*generators)
            changed = change(**changed)
        _copy(changed["image"], changed["mask"], numbers, image_out, mask_out)

    return augment


def _changes(config: RunConfig) -> list[Any]:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would call home on import
    import albumentations

    found: list[Any] = []
    if config.augment_flips:
        found += [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
    if config.augment_quarter_turns:
        found.append(albumentations.RandomRotate90(p=1.0))
    if limit := config.augment_brightness:
        found.append(albumentations.RandomBrightnessContrast((-limit, limit), (-limit, limit), p=1.0))
    if limit := config.augment_color:
        saturation, hue = (1 - limit, 1 + limit), (-limit / 2, limit / 2)
        found.append(albumentations.ColorJitter((1.0, 1.0), (1.0, 1.0), saturation, hue, p=1.0))
    return found


def _copy(image: Array, mask: Array, _numbers: Numbers, image_out: Array, mask_out: Array) -> None:
    np.copyto(image_out, image)
    np.copyto(mask_out, mask)
