"""What is unsure about a photo, with networks that are plain functions of its pixels."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.arrays import Array
from model.duplicates import different_first
from model.inspection import perceptual_hash
from model.thresholds import Thresholds, logit, sigmoid
from model.tiles import Answers, Sizes
from model.uncertainty import Maps, Uncertainty, look, relative, usual_share

SIDES = 32, 48
SIZES = Sizes(SIDES, SIDES, SIDES, SIDES)
AT_HALF = Thresholds("grid", 1, 0.0, 0.0)
NO_DECISION = Thresholds("grid", 1, 0.0, None)


def answer(images_NHWC: Array) -> Answers:
    """A px is of a defect as its red says, an image as its brightest green says."""
    probability = images_NHWC[..., 0].astype(np.float32) / 255
    score = images_NHWC[..., 1].max(axis=(1, 2)).astype(np.float32) / 255
    return Answers(probability, (probability >= 0.5).astype(np.uint8), score, score >= 0.5)


def photo(red: float, green: float = 1.0, line: float | None = None) -> Array:
    """Of shares; a line of 48 px through the middle."""
    out = np.zeros((*SIDES, 3), np.uint8)
    out[..., 0], out[..., 1] = round(255 * red), round(255 * green)
    if line is not None:
        out[SIDES[0] // 2, :, 0] = round(255 * line)
    return out


def ask(image: Array, thresholds: Thresholds = AT_HALF, label: bool | None = None) -> tuple[Uncertainty, Maps]:
    return look(image, answer, SIZES, thresholds, label)


def test_a_sure_mask_costs_nothing_and_an_unsure_one_the_px_that_may_be_wrong() -> None:
    sure, _ = ask(photo(0, line=1))
    assert (sure.mask, sure.held, sure.doubt, sure.disagreement, sure.contradiction(0.1)) == (48, 48, 0, 0, 0)
    unsure, maps = ask(photo(0, line=0.6))
    assert unsure.doubt == pytest.approx(48 * 0.4)
    assert unsure.score(0) == pytest.approx(0.4 / 1.6)  # 1 less Dice: 0.4 wrong of 0.6 + 1 a px
    assert maps.error_HW.sum() == pytest.approx(48 * 0.4, rel=1e-5)
    assert maps.mask_HW.sum() == 48


def test_views_that_disagree_cost_what_their_mean_is_unsure_of() -> None:
    def one_sided(images_NHWC: Array) -> Answers:
        found = answer(images_NHWC)
        probability = found.probability.copy()
        probability[:, :, : SIDES[1] // 2] = 0  # blind on the left
        return found._replace(probability=probability)

    found, maps = look(photo(0, line=1), one_sided, SIZES, AT_HALF)
    assert found.doubt == 0
    assert found.disagreement == pytest.approx(48 / 2)
    assert maps.error_HW.max() == 0.5


@given(st.floats(-12, 12), st.floats(0.001, 0.999))
def test_a_probability_is_moved_as_its_logit(threshold: float, probability: float) -> None:
    assert relative(probability, threshold) == pytest.approx(sigmoid(logit(probability) - threshold), rel=1e-4)
    assert relative(float(sigmoid(threshold)), threshold) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("threshold", [-1e6, 1e6])
@pytest.mark.filterwarnings("error")
def test_thresholds_beyond_all_numbers_leave_finite_ones(threshold: float) -> None:
    found = relative(np.array([0, 1e-30, 0.5, 1], np.float32), threshold)
    assert np.isfinite(found).all()
    assert (found[0], found[-1]) == (0, 1)


def test_what_is_unsure_follows_the_threshold() -> None:
    image = photo(0, line=0.2)
    lowered, _ = ask(image, Thresholds("grid", 1, float(logit(0.2)), 0.0))
    assert lowered.doubt == pytest.approx(48 / 2, rel=0.01)
    assert lowered.doubt > ask(image)[0].doubt


def test_a_mask_that_contradicts_what_is_known_counts_as_wrong() -> None:
    usual = 0.02
    empty, line = photo(0, green=0.5), photo(0, green=0.5, line=1)
    missed, _ = ask(empty, label=True)
    assert missed.contradiction(usual) == pytest.approx(usual * empty[..., 0].size)
    assert missed.score(usual) == 1
    false_alarm, _ = ask(line, label=False)
    assert false_alarm.contradiction(usual) == 48
    assert false_alarm.defect == 0
    for image, label in ((empty, False), (line, True)):
        assert ask(image, label=label)[0].score(usual) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("decision", "of_line", "of_empty"), [(0.0, 1, 0), (0.25, 0.5, 0), (0.5, 0, 0), (0.75, 0, 0.5), (1.0, 0, 1)]
)
def test_a_decision_speaks_against_the_mask_by_how_far_it_is_beyond_its_threshold(
    decision: float, of_line: float, of_empty: float
) -> None:
    line, empty = (ask(photo(0, decision, value))[0] for value in (1, None))
    assert line.contradiction(0.02) == pytest.approx(48 * of_line, abs=0.3)
    assert empty.contradiction(0.02) == pytest.approx(0.02 * SIDES[0] * SIDES[1] * of_empty, abs=0.3)


def test_without_a_decision_nothing_contradicts_the_mask() -> None:
    for image in (photo(0), photo(0, line=1)):
        found, _ = ask(image, NO_DECISION)
        assert found.decision is None
        assert found.contradiction(0.1) == 0


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([None, True, False]),
    st.booleans(), st.floats(0, 1),
)  # fmt: skip
def test_a_score_is_a_share(
    red: float, green: float, line: float, label: bool | None, decides: bool, usual: float
) -> None:
    found, _ = ask(photo(red, green, line), AT_HALF if decides else NO_DECISION, label)
    wrong = found.doubt + found.disagreement + found.contradiction(usual)
    assert 0 <= wrong <= max(found.held + found.mask, usual * found.pixels) + 0.01  # so nothing is cut off
    assert 0 <= found.score(usual) <= 1


def test_mirror_images_of_any_size_score_alike() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 131, 3), np.uint8)
    scores = [ask(np.flip(noise, axes))[0].score(0.05) for axes in ((), (0,), (1,), (0, 1))]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-5)


def test_the_usual_defect_is_the_median_of_masks_that_are_not_empty() -> None:
    px = SIDES[0] * SIDES[1]
    empty, line = ask(photo(0.1))[0], ask(photo(0, line=1))[0]
    assert usual_share([empty, empty, line]) == pytest.approx(48 / px)
    assert usual_share([empty]) == pytest.approx(26 / 255)
    assert usual_share([]) == 0


def test_nothing_is_told_but_tiles() -> None:
    told = []
    look(np.zeros((70, 48, 3), np.uint8), answer, SIZES, AT_HALF, told=lambda *both: told.append(both))
    assert told == [(k, 12) for k in range(1, 13)]


def surface(seed: int) -> Array:
    grain = np.random.default_rng(seed).normal(0, 60, (64, 64, 3)).astype(np.float32)
    return np.asarray((150 + cv2.GaussianBlur(grain, (0, 0), 3) * 5).clip(0, 255).astype(np.uint8))


def test_a_second_one_of_a_kind_counts_half() -> None:
    copy = (surface(0) * 0.9).astype(np.uint8)
    hashes = np.stack([perceptual_hash(image) for image in (surface(0), copy, *map(surface, (1, 2, 3, 4)))])
    values = [0.9, 0.8, 0.7, 0.6, 0.3, 0.1]
    order = different_first(values, ["", "", "a", "a", "", "a"], hashes)
    assert order == [(0, 1), (2, 1), (1, 2), (3, 2), (4, 1), (5, 3)]
    assert different_first([], [], np.zeros((0, 256), bool)) == []
    assert different_first([1, 1], ["", ""], hashes[[0, 2]]) == [(0, 1), (1, 1)]
