import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model import metrics, thresholds
from model.thresholds import Thresholds, ThresholdSearch


@pytest.fixture(scope="session")
def golden(reference: Path) -> dict:
    arrays = np.load(reference / "evaluation.npz", allow_pickle=False)
    return {"answers": json.loads((reference / "evaluation.json").read_text()), **arrays}


def test_rules_equal_the_public_implementation(golden: dict) -> None:
    truth, probability, answers = golden["truth"], golden["probability"], golden["answers"]
    assert thresholds.min_of_max(truth, probability) == answers["min_of_max_threshold"]
    for factor in (1, 10):
        threshold, f_measure = thresholds.pr_curve(truth, probability, factor)
        assert threshold == answers[f"pr_curve_factor_{factor}"]["threshold"]
        assert f_measure == pytest.approx(answers[f"pr_curve_factor_{factor}"]["f_measure"], rel=1e-12)


def test_sweep_equals_the_public_implementation(golden: dict) -> None:
    grid = golden["grid"]
    swept = thresholds.sweep(golden["truth"], golden["probability"], grid[:, 0])
    np.testing.assert_allclose(np.stack(swept, axis=1), grid[:, 1:], rtol=1e-10, atol=1e-12)


def test_two_pixel_equals_the_public_implementation(golden: dict) -> None:
    table = golden["two_pixel"]
    figures = metrics.two_pixel(golden["truth"], golden["probability"], table[:, 0])
    np.testing.assert_allclose(np.stack(figures, axis=1), table[:, 1:], rtol=1e-10, atol=1e-12)


def test_decision_equals_the_public_implementation(golden: dict) -> None:
    answers = golden["answers"]["decision"]
    labels, scores = golden["label"], golden["decision_score"]
    points = metrics.curve(labels, scores)
    assert metrics.average_precision(points) == pytest.approx(answers["AP"], rel=1e-12)
    assert metrics.area_under_roc(points) == pytest.approx(answers["AUC"], rel=1e-12)
    threshold, f_measure = thresholds.decision_threshold(labels, scores)
    assert threshold == answers["threshold"]
    assert f_measure == pytest.approx(answers["f_measure"], rel=1e-12)
    assert np.sum(labels & (scores >= threshold)) == answers["TP"]
    assert np.sum(~labels & (scores >= threshold)) == answers["FP"]


LOGITS = hnp.arrays(
    np.float32, (3, 4, 5), elements=st.sampled_from([-12.0, -1.0, -0.0, 0.0, 0.5, 10.9, 11.0, 11.1, 70000.0])
)
TRUTHS = hnp.arrays(np.bool_, (3, 4, 5)).filter(lambda truth: truth.any())


@given(TRUTHS, LOGITS, st.sampled_from(["min_of_max", "pr_curve", "grid"]), st.integers(1, 3))
def test_a_search_over_images_equals_brute_force(truth, logits, rule, factor) -> None:
    search = ThresholdSearch((factor,))
    for truth_HW, logits_HW in zip(truth, logits, strict=True):
        search.add(truth_HW, logits_HW)
    chosen = search.choose(rule, factor)
    scores = metrics.to_half(logits).astype(float)

    if rule == "min_of_max":
        assert chosen == min(scores[n].max() for n in range(3) if truth[n].any())
        return
    if rule == "grid":
        candidates = thresholds.logit(thresholds.GRID)

        def figure(t: float) -> float:
            return np.mean([_dice(truth[n], scores[n] >= t) for n in range(3)])
    else:
        candidates = np.unique(scores.ravel()[::factor])

        def figure(t: float) -> float:
            return _dice(truth.ravel()[::factor], scores.ravel()[::factor] >= t)

        if not truth.ravel()[::factor].any():
            return
    assert figure(chosen) == pytest.approx(max(figure(t) for t in candidates), abs=1e-7)


def _dice(truth: np.ndarray, mask: np.ndarray) -> float:
    return (2 * np.sum(truth & mask) + 1e-15) / (truth.sum() + mask.sum() + 1e-15)


def test_saturated_scores_stay_apart() -> None:
    """Probabilities of 11 and 11.02 are one number in half precision; their logits are two."""
    truth = np.array([[[1, 0]]])
    logits = np.array([[[11.02, 11.0]]], np.float32)
    assert np.unique(thresholds.sigmoid(logits).astype(np.float16)).size == 1
    search = ThresholdSearch()
    search.add(truth[0], logits[0])
    selected = search.counts().at(search.choose("pr_curve"))
    assert (selected.predicted, selected.hits) == (1, 1)


def test_what_min_of_max_applies_keeps_the_image_that_defined_it() -> None:
    search = ThresholdSearch()
    search.add(np.array([[1, 0]]), np.array([[0.3, -2.0]]))
    assert search.counts().at(search.choose("min_of_max")).predicted == 1


@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve", "grid"])
def test_no_positive_is_an_error_that_says_so(rule: str) -> None:
    search = ThresholdSearch()
    search.add(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="needs images with a defect"):
        search.choose(rule)


def test_equal_scores_select_everything_or_nothing() -> None:
    search = ThresholdSearch()
    search.add(np.array([[1, 0], [0, 0]]), np.full((2, 2), 0.25))
    for rule in ("min_of_max", "pr_curve"):
        assert search.choose(rule) == 0.25
    assert search.counts().at(search.choose("grid")).predicted == 4


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_figures_that_need_both_classes_are_nan(labels: list[bool]) -> None:
    points = metrics.curve(np.array(labels), np.array([0.1, 0.9]))
    assert np.isnan(metrics.average_precision(points))
    assert np.isnan(metrics.area_under_roc(points))


@given(
    TRUTHS, LOGITS, hnp.arrays(np.float64, 3, elements=st.sampled_from([-1.0, 0.0, 2.0])), st.booleans(),
    st.sampled_from([1.0, 0.9, 0.5]), st.sampled_from([-1.0, 0.5, 12.0]), st.sampled_from([None, 0.0, 1.0]),
)  # fmt: skip
def test_tables_and_masks_apply_thresholds_alike(truth, logits, decisions, blacken, lower, threshold, decision) -> None:
    """One way for figures (from tables) and one for pictures (from maps): they must select the same pixels."""
    applied = Thresholds("grid", 1, threshold, decision, blacken, lower)
    selected = applied.select(metrics.count(truth, metrics.to_half(logits)), decisions)
    for n in range(3):
        mask = applied.mask(logits[n], decisions[n])
        assert selected.predicted[n, 0] == mask.sum()
        assert selected.hits[n, 0] == (mask & truth[n]).sum()
        if blacken and decision is not None and decisions[n] < decision:
            assert not mask.any()
    assert Thresholds.from_dict(applied.to_dict()) == applied


def test_lowering_happens_once_and_only_where_a_positive_is_empty() -> None:
    below = float(thresholds.logit(0.46))
    logits = np.array([[[below, -3.0]], [[below, 1.0]], [[float(thresholds.logit(0.44)), -3.0]]], np.float32)
    counts = metrics.count(np.ones((3, 1, 2)), metrics.to_half(logits))
    applied = Thresholds("grid", 1, 0.0, 0.0, blacken=False, lower_threshold=0.9)
    assert applied.select(counts, np.array([1.0, 1.0, 1.0])).predicted[:, 0].tolist() == [1, 1, 0]
    assert applied.select(counts, np.array([-1.0, 1.0, 1.0])).predicted[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve", "grid"])
def test_blackening_comes_before_the_search(rule: str) -> None:
    """A loud false alarm in an image that is decided negative no longer drives the threshold up."""
    search = ThresholdSearch()
    search.add(np.array([[1, 0, 0, 0]]), np.array([[0.5, -2.0, -2.0, -2.0]]))
    search.add(np.array([[0, 0, 0, 0]]), np.array([[5.0, 5.0, 5.0, 0.6]]))
    kept = np.array([True, False])
    chosen = search.choose(rule, 1, kept)
    assert -2.0 < chosen <= 0.5
    assert search.counts().blackened(kept).at(chosen).dice().tolist() == [[1.0], [1.0]]


def test_with_all_positives_blackened_every_rule_still_answers() -> None:
    search = ThresholdSearch()
    search.add(np.array([[1, 0]]), np.array([[0.5, -2.0]]))
    search.add(np.array([[0, 0]]), np.array([[0.1, -2.0]]))
    for rule in ("min_of_max", "pr_curve", "grid"):
        for kept in ([False, True], [False, False]):
            threshold = search.choose(rule, 1, np.array(kept))
            assert np.isfinite(threshold)
            assert search.counts().blackened(np.array(kept)).at(threshold).predicted[0, 0] == 0
