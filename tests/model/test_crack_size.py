"""Drawn lines measure what was drawn, at any angle; the bounds are those of docs/predict.md."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.arrays import Array
from model.crack_size import CrackSize, measure


def line(length: float, width: float, degrees: float, offset: tuple[float, float] = (0, 0)) -> Array:
    """px whose middles lie in a rectangle."""
    side = int(length + width) + 8
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    x, y = x - offset[0], y - offset[1]
    along = x * np.cos(np.deg2rad(degrees)) + y * np.sin(np.deg2rad(degrees))
    across = -x * np.sin(np.deg2rad(degrees)) + y * np.cos(np.deg2rad(degrees))
    return (np.abs(along) < length / 2) & (np.abs(across) < width / 2)


SHIFT = st.floats(-0.5, 0.5)


@given(st.floats(60, 200), st.floats(1.5, 15), st.floats(0, 180), SHIFT, SHIFT)
@example(120, 4, 45, 0.1, 0.4)  # Zhang and Suen's skeleton loses half of it
def test_lines_of_any_angle(length: float, width: float, degrees: float, x: float, y: float) -> None:
    found = measure(line(length, width, degrees, (x, y)))
    assert found.cracks == 1
    assert found.width_mean is not None
    assert found.width_max is not None
    assert abs(found.length - length) <= 0.05 * length + 1
    assert abs(found.width_mean - width) <= 1.3
    assert abs(found.width_max - width) <= 2


@pytest.mark.parametrize("width", range(1, 16))
@pytest.mark.parametrize("transpose", [False, True])
def test_upright_lines_measure_their_width_exactly(width: int, transpose: bool) -> None:
    mask = np.zeros((40, 160), np.uint8)
    mask[10 : 10 + width, 20:140] = 1
    found = measure(mask.T if transpose else mask)
    assert found.area == 120 * width
    assert found.width_max == pytest.approx(width, abs=1e-3)
    assert found.width_mean == pytest.approx(width, rel=0.03)
    assert found.length == pytest.approx(0.98 * 120, abs=1 + width / 10)


def test_an_upright_line_is_2_percent_short_as_documented() -> None:
    assert measure(np.ones((1, 300), np.uint8)).length == pytest.approx(0.98 * 300, abs=0.1)
    assert measure(np.ones((300, 1), np.uint8)).length == pytest.approx(0.98 * 300, abs=0.1)
    assert measure(np.eye(300, dtype=np.uint8)).length == pytest.approx(0.993 * 300 * 2**0.5, abs=0.5)


def test_a_straight_line_is_as_long_at_every_angle_on_average() -> None:
    lengths = [measure(line(150, 5, degrees)).length for degrees in range(0, 180, 3)]
    assert np.mean(lengths) == pytest.approx(150, rel=0.01)


def test_parts_add_up_and_the_widest_counts() -> None:
    mask = np.zeros((200, 300), np.uint8)
    mask[10:13, 10:60] = 1
    alone = measure(mask)
    mask[100:110, 20:220] = 1
    both = measure(mask)
    assert (alone.cracks, both.cracks) == (1, 2)
    assert both.width_max == pytest.approx(10, abs=1e-3)
    assert both.length == pytest.approx(alone.length + 200, rel=0.03)
    assert both.width_mean == pytest.approx(both.area / both.length)


def test_a_crack_that_crosses_another_adds_its_length() -> None:
    mask = np.zeros((200, 200), np.uint8)
    mask[98:102, 20:180] = 1
    mask[20:180, 98:102] = 1
    found = measure(mask)
    assert found.cracks == 1
    assert found.length == pytest.approx(320, rel=0.04)


def test_a_ragged_edge_gives_no_branches() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((60, 300), np.uint8)
    for column in range(20, 280):
        mask[25 - rng.integers(0, 3) : 35 + rng.integers(0, 3), column] = 1
    assert measure(mask).length == pytest.approx(260, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "length", "width"), [((1, 1), 1, 1), ((2, 2), 2, 2), ((1, 7), 7, 1), ((9, 9), 9, 9), ((3, 90), 90, 3)]
)
def test_small_marks_have_a_length_too(shape: tuple[int, int], length: float, width: float) -> None:
    mask = np.pad(np.ones(shape, np.uint8), 5)
    found = measure(mask)
    assert found.length == pytest.approx(length, abs=1 + 0.03 * length)
    assert found.width_max == pytest.approx(width, abs=0.01)


def test_marks_at_the_border_are_measured_as_far_as_they_are_seen() -> None:
    assert measure(np.ones((5, 100), np.uint8)).length == pytest.approx(100, rel=0.03)


def test_no_crack_has_no_width() -> None:
    assert measure(np.zeros((20, 30), np.uint8)) == CrackSize(0, 0, 0.0, None, None)


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.9))
def test_any_mask_has_a_length_above_0_and_small_parts_measured_together_change_nothing(
    seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((90, 120), np.uint8)
    mask[5:60, 5:50] = rng.random((55, 45)) < share
    alone = measure(mask)
    assert alone.area == mask.sum()
    assert (alone.length > 0) == bool(mask.any())
    mask[80:83, 10:110] = 1  # too long for the small ones
    both = measure(mask)
    assert both.length == pytest.approx(alone.length + 100, abs=3)
