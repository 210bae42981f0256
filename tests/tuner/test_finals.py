"""What the evaluation keeps of the test images. That it opens them once is in tests/e2e/test_main_job.py."""

from pathlib import Path

import numpy as np
import pytest

from model.centre_lines import CentreLines
from model.config import RunConfig
from model.evaluate import Scores
from model.splits import Splits
from model.thresholds import Thresholds
from tests.tables import count
from tuner import finals
from tuner.checkpoints import Torn, Trials
from tuner.cluster import Resources
from tuner.finals import SHOWN_EXAMPLES, Finalist, _image_sizes, example_rows
from tuner.records import SearchFailed
from tuner.report import failures as report_failures
from tuner.report.inputs import Split
from tuner.report.tables import Judged


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


def judged(found: Scores, thresholds: Thresholds) -> Judged:
    """As the report reads what the evaluation wrote."""
    names = [f"{n}.png" for n in range(len(found.labels))]
    logits = found.decision_logits.astype(np.float32)
    lines = CentreLines(*np.ones((6, len(names)), int))
    split = Split(names, names, names, found.labels, logits, found.counts, lines)
    return Judged(split, thresholds.to_dict(), not found.labels.all())


@pytest.mark.parametrize("decision", [0.25, -9.0, None])
@pytest.mark.parametrize("negatives", [0, 3, 30, 77])
@pytest.mark.parametrize("seed", range(3))
def test_every_failure_that_the_report_names_has_its_picture(decision: float | None, negatives: int, seed: int) -> None:
    """However few a kind has: the rows that it leaves to others are pictured too."""
    found = scores(80, negatives, seed)
    decision = decision if negatives else None
    thresholds = Thresholds("grid", 1, 1.5, decision)
    rows = example_rows(found, thresholds)
    named = report_failures.find(judged(found, thresholds)).shown()
    assert len(named) == 12
    assert {n for _, n in named} <= set(rows)


@pytest.mark.parametrize("negatives", [0, 30, 70])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_and_the_middle_of_images_with_a_defect_are_kept(negatives: int, seed: int) -> None:
    found = scores(80, negatives, seed)
    thresholds = Thresholds("grid", 1, 1.5, 0.25)
    rows = example_rows(found, thresholds)
    selected = thresholds.select(found.counts, found.decision_logits)
    dice, there = selected.dice()[:, 0], selected.truth[:, 0] > 0
    kept = np.isin(np.arange(80), rows) & there
    assert sorted(dice[kept])[-4:] == sorted(dice[there])[-4:]
    middle = np.median(dice[there])
    assert abs(dice[kept] - middle).min() == abs(dice[there] - middle).min()


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


def test_a_torn_checkpoint_is_no_wrong_request(tmp_path: Path, monkeypatch) -> None:
    def torn(*_: object) -> None:
        raise Torn("the checkpoint is not whole any more")

    config = RunConfig(input_height=64, input_width=128)
    winner = Finalist("a", "there", config, Thresholds("grid", 1, 0.0, None), 1, 0.5, None)
    monkeypatch.setattr(finals, "_finalist", lambda trials, record: winner)
    monkeypatch.setattr(finals, "run_on_worker", torn)
    with pytest.raises(SearchFailed, match="the checkpoint is not whole any more"):
        finals.evaluate(tmp_path, Trials(tmp_path), Splits([], [], []), "dice", Resources(1, 0, 1))
    assert not (tmp_path / "evaluation/selection.json").exists()
