"""Augmentation, in threads and out of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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


def changed(config: RunConfig, n: int, numbers: Numbers) -> list[np.ndarray]:
    out = np.empty_like(IMAGES[n]), np.empty_like(MASKS[n])
    augmentation(config)(IMAGES[n], MASKS[n], numbers, *out)
    return list(out)


@given(st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_a_mask_moves_with_its_image(flips: bool, turns: bool, row: int) -> None:
    config = RunConfig(augment_flips=flips, augment_quarter_turns=turns)
    image, mask = np.repeat(MASKS[0][..., None], 3, axis=2), MASKS[0]
    image_out, mask_out = np.empty_like(image), np.empty_like(mask)
    augmentation(config)(image, mask, (0, 0, row), image_out, mask_out)
    np.testing.assert_array_equal(image_out[..., 0], mask_out)
    assert mask_out.sum() == mask.sum()


def test_light_leaves_the_mask_alone() -> None:
    config = RunConfig(augment_brightness=0.5, augment_color=0.5)
    image, mask = changed(config, 0, (0, 0, 0))
    assert not np.array_equal(image, IMAGES[0])
    np.testing.assert_array_equal(mask, MASKS[0])


def test_what_is_given_stays_as_it_is() -> None:
    """It is the cache that all trials share."""
    config = RunConfig(augment_flips=True, augment_quarter_turns=True, augment_brightness=0.4, augment_color=0.4)
    before = IMAGES[0].copy(), MASKS[0].copy()
    changed(config, 0, (0, 0, 0))
    np.testing.assert_array_equal(IMAGES[0], before[0])
    np.testing.assert_array_equal(MASKS[0], before[1])


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
