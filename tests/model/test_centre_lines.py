import numpy as np
import pytest

from model import centre_lines
from model.centre_lines import CentreLines


def scored(truth: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    lines = CentreLines(*(np.array([value]) for value in centre_lines.trace(truth, mask)))
    return lines.dice()[0], lines.iou()[0]


def bar(top: int, height: int, left: int = 10, right: int = 90) -> np.ndarray:
    mask = np.zeros((60, 100), np.uint8)
    mask[top : top + height, left:right] = 1
    return mask


EMPTY = np.zeros((60, 100), np.uint8)


def test_an_equal_mask_scores_one() -> None:
    assert scored(bar(20, 5), bar(20, 5)) == (1.0, 1.0)
    assert scored(EMPTY, EMPTY) == (1.0, 1.0)


def test_nothing_against_something_scores_zero() -> None:
    assert scored(bar(20, 5), EMPTY) == (0.0, 0.0)
    assert scored(EMPTY, bar(20, 5)) == (0.0, 0.0)


def test_width_does_not_matter_to_centre_lines() -> None:
    """A mask three times as wide along the same line: Dice would be about 0.5."""
    dice, iou = scored(bar(22, 3), bar(20, 7))
    assert dice > 0.95
    assert iou > 0.9


@pytest.mark.parametrize(("shift", "near"), [(3, True), (4, True), (5, False), (12, False)])
def test_lines_are_one_within_four_pixels(shift: int, near: bool) -> None:
    dice, iou = scored(bar(20, 1), bar(20 + shift, 1))
    assert dice == 0.0  # neither line touches the other's area
    assert iou == (1.0 if near else 0.0)


def test_half_of_a_crack_found() -> None:
    dice, iou = scored(bar(20, 1, 10, 90), bar(20, 1, 10, 50))
    assert dice == pytest.approx(2 * 0.5 / 1.5)
    assert iou == pytest.approx(40 / 76)  # 4 px beyond its end are within the tolerance


def test_means_of_many_images_are_of_each_image() -> None:
    pairs = [(bar(20, 5), bar(21, 5)), (EMPTY, EMPTY), (bar(5, 3), EMPTY)]
    lines = CentreLines(*np.array([centre_lines.trace(*pair) for pair in pairs]).T)
    assert lines.dice().tolist() == [scored(*pair)[0] for pair in pairs]
    assert lines.iou().tolist() == [scored(*pair)[1] for pair in pairs]
