"""What the evaluation keeps of the test images. That it opens them once is in tests/e2e/test_main_job.py."""

import numpy as np
import pytest

from model.evaluate import Scores
from model.thresholds import Thresholds
from tests.tables import count
from tuner.finals import SHOWN_EXAMPLES, _image_sizes, example_rows


def scores(images: int, negatives: int, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) >= negatives
    truth = (rng.random((images, 8, 8)) < rng.uniform(0.05, 0.5, (images, 1, 1))) & labels[:, None, None]
    logits = rng.normal(0, 2, (images, 8, 8)) + 3 * truth - rng.uniform(0, 4, (images, 1, 1))
    return Scores(count(truth, logits), {}, labels, np.where(labels, 1.0, -1.0) + rng.normal(0, 1, images))


@pytest.mark.parametrize("decision", [0.25, None])
@pytest.mark.parametrize("seed", range(5))
def test_examples_run_from_the_worst_to_the_best_and_hold_the_failures(decision: float | None, seed: int) -> None:
    found = scores(80, 30, seed)
    thresholds = Thresholds("grid", 1, 1.5, decision)
    rows = example_rows(found, thresholds)
    assert len(set(rows)) == len(rows) == SHOWN_EXAMPLES
    selected = thresholds.select(found.counts, found.decision_logits)
    dice = selected.dice()[:, 0]
    assert list(dice[rows]) == sorted(dice[rows])
    predicted, truth = selected.predicted[:, 0], selected.truth[:, 0]
    alarms = np.flatnonzero(~found.labels & (predicted > 0))
    assert alarms[predicted[alarms].argmax()] in rows
    missed = np.flatnonzero(found.labels & (~thresholds.decide(found.decision_logits) | (predicted == 0)))
    if len(missed):
        assert missed[truth[missed].argmax()] in rows
    assert dice[rows].max() == dice.max()


@pytest.mark.parametrize("images", [1, 7, SHOWN_EXAMPLES])
def test_of_few_images_all_are_kept(images: int) -> None:
    assert sorted(example_rows(scores(images, images // 2, 0), Thresholds("grid", 1, 1.5, 0.25))) == list(range(images))


@pytest.mark.parametrize("negatives", [0, 60])
def test_a_split_of_one_class_fills_up_with_the_other_ranks(negatives: int) -> None:
    rows = example_rows(scores(60, negatives, 3), Thresholds("grid", 1, 1.5, 0.25))
    assert len(set(rows)) == SHOWN_EXAMPLES


def test_the_sizes_of_images_are_median_smallest_and_largest_of_each_side() -> None:
    assert _image_sizes(np.array([[300, 900], [400, 200], [500, 640]])) == {
        "height": 400, "width": 640, "smallest_height": 300, "smallest_width": 200, "largest_height": 500,
        "largest_width": 900,
    }  # fmt: skip
