"""Augmentation against albumentations, in threads and out of them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import albumentations
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.augment import Numbers, augmentation
from model.config import RunConfig

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 64, 64, 3), np.uint8)
IMAGES[1] = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None]  # without colour
MASKS = (RNG.random((3, 64, 64)) > 0.7).astype(np.uint8)


def with_albumentations(config: RunConfig, image: np.ndarray, mask: np.ndarray, numbers: Numbers) -> list[np.ndarray]:
    steps: list[albumentations.BasicTransform] = []
    if config.augment_flips:
        steps += [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
    if config.augment_quarter_turns:
        steps.append(albumentations.RandomRotate90(p=1.0))
    if limit := config.augment_brightness:
        steps.append(albumentations.RandomBrightnessContrast((-limit, limit), (-limit, limit), p=1.0))
    if limit := config.augment_color:
        steps.append(
            albumentations.ColorJitter((1.0, 1.0), (1.0, 1.0), (1 - limit, 1 + limit), (-limit / 2, limit / 2), p=1.0)
        )
    seed = int(np.random.default_rng(numbers).integers(2**31))
    one, other = np.random.default_rng(seed), random.Random(seed)
    changed = {"image": image, "mask": mask}
    for step in steps:
        step.set_random_state(one, other)
        changed = step(**changed)
    return [changed["image"], changed["mask"]]


def changed(config: RunConfig, n: int, numbers: Numbers) -> list[np.ndarray]:
    out = np.empty_like(IMAGES[n]), np.empty_like(MASKS[n])
    augmentation(config)(IMAGES[n], MASKS[n], numbers, *out)
    return list(out)


@given(
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.tuples(st.integers(0, 2**31), st.integers(0, 50), st.integers(0, 10_000)), st.integers(0, 2),
)  # fmt: skip
def test_augmentation_is_that_of_albumentations(flips, turns, brightness, colour, numbers, n) -> None:
    config = RunConfig(
        augment_flips=flips, augment_quarter_turns=turns, augment_brightness=brightness, augment_color=colour
    )
    for ours, theirs in zip(
        changed(config, n, numbers), with_albumentations(config, IMAGES[n], MASKS[n], numbers), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_choices_do_not_hang_together() -> None:
    """Flips come in all four ways, and say nothing of contrast."""
    config = RunConfig(augment_flips=True, augment_brightness=0.5)
    gradient = np.add.outer(np.arange(64), np.arange(64) // 16).astype(np.uint8)
    contrasts: dict[tuple[bool, bool], list[int]] = {}
    for row in range(400):
        image, mask = np.empty_like(IMAGES[0]), np.empty_like(gradient)
        augmentation(config)(gradient[..., None].repeat(3, axis=2), gradient, (0, 0, row), image, mask)
        upside_down, mirrored = mask[0, 0] > mask[-1, 0], mask[0, 0] > mask[0, -1]
        contrasts.setdefault((bool(upside_down), bool(mirrored)), []).append(int(np.ptp(image.astype(int))))
    assert len(contrasts) == 4
    assert min(map(len, contrasts.values())) > 70
    means = [np.mean(each) for each in contrasts.values()]
    assert max(means) < 1.25 * min(means)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_change_nothing(threads: int) -> None:
    config = RunConfig(augment_flips=True, augment_quarter_turns=True, augment_brightness=0.4, augment_color=0.4)
    numbers = [(0, epoch, row) for epoch in range(10) for row in range(10)]
    alone = [changed(config, 0, one) for one in numbers]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(lambda one: changed(config, 0, one), numbers))
    np.testing.assert_array_equal([image for image, _ in alone], [image for image, _ in together])
    np.testing.assert_array_equal([mask for _, mask in alone], [mask for _, mask in together])
