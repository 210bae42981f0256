"""Random changes of a training image and its mask. Each depends on the configuration and on three numbers alone: so it
is the same in any thread, beside any others, at any time.

They are, to the bit, what albumentations 2.0 makes of HorizontalFlip, VerticalFlip, RandomRotate90,
RandomBrightnessContrast and ColorJitter that draw from one generator. (Its own Compose gives each of them a generator
with the same seed, so that choices hang together: an image is flipped both ways or not at all, and has less contrast
where it is flipped. It is also not safe in threads, and takes about twice as long.)
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

_FLIPS = {(False, False): None, (True, False): 1, (False, True): 0, (True, True): -1}
"""OpenCV's codes, by whether horizontally and vertically"""

_TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


def augmentation(config: RunConfig) -> Augment:
    """The changes that a configuration asks for."""
    any_light = config.augment_brightness or config.augment_color
    if not (config.augment_flips or config.augment_quarter_turns or any_light):
        return _copy

    def augment(image: Array, mask: Array, numbers: Numbers, image_out: Array, mask_out: Array) -> None:
        seed = int(np.random.default_rng(numbers).integers(2**31))
        draw = random.Random(seed)
        flip = turn = None
        if config.augment_flips:
            flip = _FLIPS[draw.random() < 0.5, draw.random() < 0.5]
        if config.augment_quarter_turns:
            turn = _TURNS[draw.randint(0, 3)]
        _move(image, flip, turn, image_out)
        _move(mask, flip, turn, mask_out)
        if config.augment_brightness:
            _brighten(image_out, config.augment_brightness, draw)
        if config.augment_color:
            _colour(image_out, config.augment_color, draw, seed)

    return augment


def _move(pixels: Array, flip: int | None, turn: int | None, out: Array) -> None:
    if turn is not None:
        cv2.rotate(pixels if flip is None else cv2.flip(pixels, flip), turn, dst=out)
    elif flip is not None:
        cv2.flip(pixels, flip, dst=out)
    else:
        np.copyto(out, pixels)


def _copy(image: Array, mask: Array, _numbers: Numbers, image_out: Array, mask_out: Array) -> None:
    np.copyto(image_out, image)
    np.copyto(mask_out, mask)


def _brighten(image: Array, limit: float, draw: random.Random) -> None:
    """Another contrast and brightness, in place."""
    contrast, brightness = 1 + draw.uniform(-limit, limit), draw.uniform(-limit, limit)
    table = np.arange(256, dtype=np.float32) * contrast + brightness * 255
    cv2.LUT(image, table.clip(0, 255).astype(np.uint8), dst=image)


def _colour(image: Array, limit: float, draw: random.Random, seed: int) -> None:
    """Another saturation and hue, in an order that is drawn too, in place."""
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
