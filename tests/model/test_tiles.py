"""Every px of a photo is answered once, by a tile as training saw images."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import tiles
from model.arrays import Array
from model.inspection import resize_image
from model.tiles import Sizes

SIDE = st.integers(1, 400)


def pixelwise(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
    """A network without context: a px is a defect where it is dark, an image where one px is."""
    assert image_NHWC.dtype == np.uint8
    assert image_NHWC.flags.c_contiguous
    mask = (image_NHWC[..., 0] < 60).astype(np.uint8)
    score = mask.mean(axis=(1, 2), dtype=np.float32)
    return mask.astype(np.float32), mask, score, score > 0


def noise(height: int, width: int) -> Array:
    rng = np.random.default_rng(height * 1000 + width)
    return np.repeat(rng.integers(0, 256, (height, width, 1), dtype=np.uint8), 3, axis=2)


@given(SIDE, st.integers(8, 200))
def test_every_pixel_is_answered_by_one_tile_and_by_its_inner_part(length: int, tile: int) -> None:
    found = tiles.spans(length, tile)
    answered = np.concatenate([np.arange(one.first, one.last) for one in found])
    assert np.array_equal(answered, np.arange(length))
    for k, one in enumerate(found):
        assert one.stop - one.start == tile
        assert one.start <= one.first < one.last <= one.stop
        if length > tile:
            assert one.start >= 0
            assert one.stop <= length
        margin = int(tile * tiles.OVERLAP / 2) - 1
        assert k == 0 or one.first - one.start >= margin
        assert k == len(found) - 1 or one.stop - one.last >= margin


@given(SIDE, st.integers(8, 200))
def test_a_pixel_is_answered_by_the_tile_whose_middle_is_nearest(length: int, tile: int) -> None:
    found = tiles.spans(length, tile)
    middles = np.array([(one.start + one.stop) / 2 for one in found])
    for own, one in zip(middles, found, strict=True):
        for px in (one.first, one.last - 1):
            assert abs(px + 0.5 - own) <= np.abs(px + 0.5 - middles).min() + 1


@given(SIDE, SIDE, st.integers(8, 64), st.integers(8, 64))
def test_a_network_without_context_answers_as_if_there_were_no_tiles(
    height: int, width: int, tile_height: int, tile_width: int
) -> None:
    photo = noise(height, width)
    sizes = Sizes.of((tile_height, tile_width), {"height": tile_height, "width": tile_width, "largest_height": 8, "largest_width": 8})  # fmt: skip
    found = tiles.segment(photo, pixelwise, sizes)
    if height > 8 or width > 8:
        assert np.array_equal(found.mask_HW, photo[..., 0] < 60)
        assert found.defect == bool(found.mask_HW.any())


@pytest.mark.parametrize("size", [(100, 80), (37, 120), (64, 64), (120, 120), (45, 45)])
def test_a_photo_of_a_size_that_training_had_goes_the_way_of_a_training_image(size: tuple[int, int]) -> None:
    seen = []

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        seen.append(image_NHWC)
        return pixelwise(image_NHWC)

    photo = noise(*size)
    found = tiles.segment(photo, answer, Sizes((64, 64), (90, 90), (30, 60), (120, 120)))
    assert found.tiles == len(seen) == 1
    assert np.array_equal(seen[0][0], resize_image(photo, (64, 64)))
    assert found.mask_HW.shape == size


def test_every_tile_has_trainings_size_before_and_the_networks_after() -> None:
    shapes = set()

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        shapes.add(image_NHWC.shape)
        return pixelwise(image_NHWC)

    sizes = Sizes((64, 48), (90, 200), (90, 200), (120, 240))
    for size in ((121, 10), (10, 241), (500, 700)):
        assert tiles.segment(noise(*size), answer, sizes).mask_HW.shape == size
        for rows, columns in tiles.cuts(size, sizes):
            assert (rows.stop - rows.start, columns.stop - columns.start) == (90, 200)
    assert shapes == {(1, 64, 48, 3)}


def test_one_large_image_in_training_does_not_switch_tiles_off() -> None:
    sizes = Sizes.of((64, 64), {"height": 90, "width": 90, "largest_height": 5000, "largest_width": 120})
    assert len(tiles.cuts((135, 120), sizes)) == 1
    assert len(tiles.cuts((136, 90), sizes)) == 2
    assert len(tiles.cuts((90, 121), sizes)) == 2
    assert len(tiles.cuts((5000, 90), sizes)) > 50


@pytest.mark.parametrize(
    ("size", "is_whole"), [((45, 45), True), ((44, 90), False), ((20, 20), False), ((90, 1), False)]
)
def test_an_image_much_smaller_than_trainings_keeps_its_scale(size: tuple[int, int], is_whole: bool) -> None:
    seen = []

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        seen.append(image_NHWC[0])
        return pixelwise(image_NHWC)

    images = {"height": 90, "width": 90, "largest_height": 120, "largest_width": 120}
    photo = noise(*size)
    found = tiles.segment(photo, answer, Sizes.of((90, 90), images))
    assert len(seen) == 1
    assert found.mask_HW.shape == size
    top, left = (90 - size[0]) // 2, (90 - size[1]) // 2
    in_the_middle = seen[0][top : top + size[0], left : left + size[1]]
    assert np.array_equal(in_the_middle, photo) != is_whole
    if not is_whole:
        assert np.array_equal(found.mask_HW, photo[..., 0] < 60)
    small = images | {"smallest_height": 1, "smallest_width": 1}  # training had such
    tiles.segment(photo, answer, Sizes.of((90, 90), small))
    assert np.array_equal(seen[1], resize_image(photo, (90, 90)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"height": 448}, "width of images must be a whole number above 0, found None"),
        ({"height": 448, "width": 448}, "sizes of images must have height, width, largest_height"),
        ({"height": 0, "width": 448}, "height of images must be a whole number above 0, found 0"),
        ({"height": 448, "width": "448"}, "width of images must be a whole number above 0, found '448'"),
        ({"height": True, "width": 448}, "height of images must be a whole number above 0, found True"),
        ({"height": 300.5, "width": 448}, "height of images must be a whole number above 0, found 300.5"),
        ([1], r"sizes of images must be an object, found \[1\]"),
    ],
)
def test_what_are_no_sizes_is_refused(images: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes.of((64, 64), images)


def test_a_photo_has_a_defect_where_one_tile_has_and_its_score_is_the_largest() -> None:
    photo = np.full((200, 300, 3), 200, np.uint8)
    sizes = Sizes.of((64, 64), None)
    assert not tiles.segment(photo, pixelwise, sizes).defect
    photo[190, 290] = 0
    found = tiles.segment(photo, pixelwise, sizes)
    assert (found.defect, found.score, found.mask_HW.sum()) == (True, np.float32(1 / 64**2), 1)


def test_a_narrow_photo_is_mirrored_so_that_its_statistics_stay() -> None:
    seen = []

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        seen.append(image_NHWC[0])
        return pixelwise(image_NHWC)

    photo = noise(33, 64)
    tiles.segment(photo, answer, Sizes((64, 64), (64, 64), (20, 64), (20, 64)))
    assert np.array_equal(seen[0][15:48], photo)
    assert abs(seen[0].mean() - photo.mean()) < 5
    assert abs(seen[0].std() - photo.std()) < 5


def test_every_tile_is_told() -> None:
    told: list[tuple[int, int]] = []
    tiles.segment(noise(100, 100), pixelwise, Sizes.of((64, 64), None), lambda *numbers: told.append(numbers))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_number_that_is_not_finite_is_no_answer() -> None:
    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        probability, *rest = pixelwise(image_NHWC)
        return (np.full_like(probability, np.nan), *rest)  # type: ignore[return-value]

    with pytest.raises(FloatingPointError, match="not finite"):
        tiles.segment(noise(64, 64), answer, Sizes.of((64, 64), None))


@pytest.mark.parametrize("size", [(448, 448), (150, 150), (100, 100), (300, 150), (50, 400)])
def test_lines_keep_their_area_at_the_size_of_the_photo(size: tuple[int, int]) -> None:
    before, after = [], []
    for degrees in range(0, 180, 6):
        mask = np.zeros((200, 200), np.uint8)
        step = 70 * np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))])
        ends = [tuple(np.round(100 + sign * step).astype(int).tolist()) for sign in (-1, 1)]
        cv2.line(mask, *ends, 1, 5)
        back = tiles.bring_back(mask, size)
        assert back.shape == size
        assert set(np.unique(back)) == {0, 1}
        before.append(mask.mean())
        after.append(back.mean())
    assert np.mean(after) == pytest.approx(np.mean(before), rel=0.12)  # just half of a px counts as all


def test_no_training_sizes_means_those_of_the_input() -> None:
    assert Sizes.of((64, 32), None) == Sizes.of((64, 32), {}) == Sizes(*[(64, 32)] * 4)


def test_tiled_is_compared_with_whole() -> None:
    photos = [noise(128, 128), np.full((128, 128, 3), 200, np.uint8)]
    truths = [(photo[..., 0] < 60).astype(np.uint8) for photo in photos]
    found = tiles.tiled_against_whole(pixelwise, photos, truths, Sizes.of((64, 64), None))
    assert found == {
        "images": 2, "tiled": 1, "whole": 1, "agreement": 1, "positives": 1, "tiled_positives": 1, "whole_positives": 1,
    }  # fmt: skip
    found = tiles.tiled_against_whole(pixelwise, photos[1:], truths[1:], Sizes.of((64, 64), None))
    assert (found["tiled"], found["positives"], found["tiled_positives"]) == (1, 0, None)
