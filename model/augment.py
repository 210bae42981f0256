"""Random changes of a training image and its mask. Each depends on the configuration and on three numbers alone: so it
is the same in any thread, beside any others, at any time.

They are, to the bit, what albumentations 2.0 makes of a Compose of HorizontalFlip, VerticalFlip, RandomRotate90,
RandomBrightnessContrast and ColorJitter with the same seed, which are not safe in threads and take three times as long.
Images are (H, W, 3) uint8 RGB, masks (H, W) uint8.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import cv2
import numpy as np

from model.arrays import Array
from model.config import RunConfig

Numbers = tuple[int, int, int]
"""seed, epoch and row of an image: they fix its random choices"""

Augment = Callable[[Array, Array, Numbers, Array, Array], None]
"""Takes an image, its mask and the numbers; writes the changed ones to where the last two arguments are."""

_TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


def augmentation(config: RunConfig) -> Augment:
    """The changes that a configuration asks for."""
    any_light = config.augment_brightness or config.augment_color
    if not (config.augment_flips or config.augment_quarter_turns or any_light):
        return _copy

    def augment(image: Array, mask: Array, numbers: Numbers, image_out: Array, mask_out: Array) -> None:
        seed = int(np.random.default_rng(numbers).integers(2**31))
        quarter_turns = 0
        if config.augment_flips and random.Random(seed).random() < 0.5:
            quarter_turns += 2
        if config.augment_quarter_turns:
            quarter_turns += random.Random(seed).randint(0, 3)
        turn = _TURNS[quarter_turns % 4]
        if turn is None:
            _copy(image, mask, numbers, image_out, mask_out)
        else:
            cv2.rotate(image, turn, dst=image_out)
            cv2.rotate(mask, turn, dst=mask_out)
        if config.augment_brightness:
            _brighten(image_out, config.augment_brightness, seed)
        if config.augment_color:
            _colour(image_out, config.augment_color, seed)

    return augment


def _copy(image: Array, mask: Array, _numbers: Numbers, image_out: Array, mask_out: Array) -> None:
    np.copyto(image_out, image)
    np.copyto(mask_out, mask)


def _brighten(image: Array, limit: float, seed: int) -> None:
    """Another contrast and brightness, in place."""
    draw = random.Random(seed)
    contrast, brightness = 1 + draw.uniform(-limit, limit), draw.uniform(-limit, limit)
    table = np.arange(256, dtype=np.float32) * contrast + brightness * 255
    cv2.LUT(image, table.clip(0, 255).astype(np.uint8), dst=image)


def _colour(image: Array, limit: float, seed: int) -> None:
    """Another saturation and hue, in an order that is drawn too, in place."""
    draw = random.Random(seed)
    for _unused in ("brightness", "contrast"):
        draw.random()
    saturation, hue = draw.uniform(1 - limit, 1 + limit), draw.uniform(-limit / 2, limit / 2)
    order = [0, 1, 2, 3]
    np.random.default_rng(seed).shuffle(order)
    for step in order:
        if step == 2 and saturation != 1:
            grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            cv2.addWeighted(image, saturation, grey, 1 - saturation, 0, dst=image)
        if step == 3 and hue != 0:
            table = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
            table[..., 0] = np.mod(np.arange(256, dtype=np.int16)[:, None] + 180 * hue, 180)
            shifted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            cv2.cvtColor(cv2.LUT(shifted, table, dst=shifted), cv2.COLOR_HSV2RGB, dst=image)
