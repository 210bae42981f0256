import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model import curves, metrics, thresholds
from model.counts import CountsBuilder, tally, to_half
from model.thresholds import Thresholds, ThresholdSearch
from tests.tables import count


def search(truth: np.ndarray, logits: np.ndarray, factor: int = 1, kept: np.ndarray | None = None) -> ThresholdSearch:
    """As a pass over a split makes it."""
    strided = CountsBuilder()
    for n in range(len(truth)):
        first = -n * truth[n].size % factor
        every = to_half(logits[n].ravel())[None, first::factor], truth[n].ravel()[None, first::factor]
        strided.add(tally(np, every[0], every[1].astype(np.uint8), tolerance=0))
    kept = np.ones(len(truth), bool) if kept is None else kept
    return ThresholdSearch(count(truth, logits), {factor: strided.build()}, kept)


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
    points = curves.curve(labels, scores)
    assert curves.average_precision(points) == pytest.approx(answers["AP"], rel=1e-12)
    assert curves.area_under_roc(points) == pytest.approx(answers["AUC"], rel=1e-12)
    threshold, f_measure = thresholds.decision_threshold(labels, scores)
    assert threshold == answers["threshold"]
    assert f_measure == pytest.approx(answers["f_measure"], rel=1e-12)
    assert np.sum(labels & (scores >= threshold)) == answers["TP"]
    assert np.sum(~labels & (scores >= threshold)) == answers["FP"]


LOGITS = hnp.arrays(
    np.float32, (3, 4, 5), elements=st.sampled_from([-12.0, -1.0, -0.0, 0.0, 0.5, 10.9, 11.0, 11.1, 70000.0])
)
TRUTHS = hnp.arrays(np.bool_, (3, 4, 5)).filter(lambda truth: truth.any())


@given(TRUTHS, LOGITS, st.sampled_from(["min_of_max", "pr_curve", "grid"]), st.integers(1, 7))
def test_a_search_over_images_equals_brute_force(truth, logits, rule, factor) -> None:
    chosen = search(truth, logits, factor).choose(rule, factor)
    scores = to_half(logits).astype(float)

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
    found = search(truth, logits)
    selected = found.counts.at(found.choose("pr_curve"))
    assert (selected.predicted, selected.hits) == (1, 1)


@pytest.mark.parametrize("score", [-30.0, 0.0, 11.0, 60.0, 70000.0])
@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve"])
def test_a_threshold_at_the_highest_score_still_selects(rule: str, score: float) -> None:
    """All positive, saturated: the public code searched with >= and tested with >, and had TP 0 of 1,124."""
    truth, logits = np.ones((4, 2, 2), int), np.full((4, 2, 2), score, np.float32)
    found = search(truth, logits)
    selected = found.counts.at(found.choose(rule))
    assert selected.hits.sum() == 16
    decision, f_measure = thresholds.decision_threshold(np.ones(4, bool), np.full(4, score))
    assert np.sum(np.full(4, score) >= decision) == 4
    assert f_measure == pytest.approx(1)


def test_what_min_of_max_applies_keeps_the_image_that_defined_it() -> None:
    found = search(np.array([[[1, 0]]]), np.array([[[0.3, -2.0]]]))
    assert found.counts.at(found.choose("min_of_max")).predicted == 1


@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve", "grid"])
def test_no_positive_is_an_error_that_says_so(rule: str) -> None:
    with pytest.raises(ValueError, match="needs images with a defect"):
        search(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))).choose(rule)


@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve", "grid"])
def test_without_negatives_every_rule_answers(rule: str) -> None:
    found = search(np.ones((2, 2, 2)), np.array([[[1.0, 2.0], [3.0, 0.5]], [[1.0, -1.0], [0.5, 2.0]]]))
    assert found.counts.at(found.choose(rule)).hits.all()


def test_equal_scores_select_everything_or_nothing() -> None:
    found = search(np.array([[[1, 0], [0, 0]]]), np.full((1, 2, 2), 0.25))
    for rule in ("min_of_max", "pr_curve"):
        assert found.choose(rule) == 0.25
    assert found.counts.at(found.choose("grid")).predicted == 4


@given(
    TRUTHS, LOGITS, hnp.arrays(np.float64, 3, elements=st.sampled_from([-1.0, 0.0, 2.0])), st.booleans(),
    st.sampled_from([1.0, 0.9, 0.5]), st.sampled_from([-1.0, 0.5, 12.0]), st.sampled_from([None, 0.0, 1.0]),
)  # fmt: skip
def test_tables_and_masks_apply_thresholds_alike(truth, logits, decisions, blacken, lower, threshold, decision) -> None:
    """One way for figures (from tables) and one for pictures (from maps): they must select the same pixels."""
    applied = Thresholds("grid", 1, threshold, decision, blacken, lower)
    selected = applied.select(count(truth, logits), decisions)
    for n in range(3):
        mask = applied.mask(logits[n], decisions[n])
        assert selected.predicted[n, 0] == mask.sum()
        assert selected.hits[n, 0] == (mask & truth[n]).sum()
        if blacken and decision is not None and decisions[n] < decision:
            assert not mask.any()
    assert Thresholds.from_dict(applied.to_dict()) == applied


@given(st.floats(-20, 20))
def test_the_image_that_set_the_decision_threshold_is_decided_alike_after_another_order_of_sums(score: float) -> None:
    applied = Thresholds("grid", 1, 0.0, float(to_half(np.float64(score))))
    again = np.array([score, np.nextafter(np.float32(score), np.float32(-99))])
    assert applied.decide(again)[0]
    assert applied.decide(again)[1] or to_half(again)[1] < to_half(again)[0]  # it lay on an edge of rounding


def test_lowering_happens_once_and_only_where_a_positive_is_empty() -> None:
    below = float(thresholds.logit(0.46))
    logits = np.array([[[below, -3.0]], [[below, 1.0]], [[float(thresholds.logit(0.44)), -3.0]]], np.float32)
    tables = count(np.ones((3, 1, 2)), logits)
    applied = Thresholds("grid", 1, 0.0, 0.0, blacken=False, lower_threshold=0.9)
    assert applied.select(tables, np.array([1.0, 1.0, 1.0])).predicted[:, 0].tolist() == [1, 1, 0]
    assert applied.select(tables, np.array([-1.0, 1.0, 1.0])).predicted[:, 0].tolist() == [0, 1, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("logit", [-65504.0, -800.0, -3.0, 0.0, 3.0, 12.0])
def test_a_lowered_threshold_is_a_share_of_the_probability(logit: float) -> None:
    lowered = Thresholds("grid", 1, logit, None, lower_threshold=0.9).lowered()
    assert np.isfinite(lowered)
    assert lowered < logit
    assert thresholds.sigmoid(lowered) == pytest.approx(0.9 * thresholds.sigmoid(logit), rel=1e-6)
    assert Thresholds("grid", 1, logit, None).lowered() == logit


def test_many_thresholds_select_in_one_pass_what_each_does_alone() -> None:
    rng = np.random.default_rng(0)
    tables = count(rng.random((5, 6, 6)) > 0.8, rng.normal(0, 2, (5, 6, 6)))
    decisions = rng.normal(0, 1, 5)
    found = [
        Thresholds("grid", 1, t, d, blacken, lower)
        for t in (-1.0, 0.5, 3.0)
        for d in (None, 0.0)
        for blacken in (True, False)
        for lower in (1.0, 0.5)
    ]
    for one, together in zip(found, thresholds.select_all(found, tables, decisions), strict=True):
        for a, b in zip(one.select(tables, decisions), together, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decision", [None, 0.0])
@pytest.mark.parametrize("blacken", [True, False])
@pytest.mark.parametrize("lower", [1.0, 0.5])
def test_a_sweep_lowers_and_blackens_at_each_threshold(decision: float | None, blacken: bool, lower: float) -> None:
    rng = np.random.default_rng(0)
    tables = count(rng.random((5, 6, 6)) > 0.8, rng.normal(0, 2, (5, 6, 6)))
    decisions = rng.normal(0, 1, 5)
    swept = np.linspace(-3, 6, 40)
    applied = Thresholds("grid", 1, 0.3, decision, blacken, lower)
    together = applied.select_at(swept, tables, decisions)
    for k, at in enumerate(swept):
        alone = Thresholds("grid", 1, at, decision, blacken, lower).select(tables, decisions)
        for a, b in zip(alone, together.columns([k]), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", ["min_of_max", "pr_curve", "grid"])
def test_blackening_comes_before_the_search(rule: str) -> None:
    """A loud false alarm in an image that is decided negative no longer drives the threshold up."""
    truth = np.array([[[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    logits = np.array([[[0.5, -2.0, -2.0, -2.0]], [[5.0, 5.0, 5.0, 0.6]]])
    kept = np.array([True, False])
    found = search(truth, logits, kept=kept)
    chosen = found.choose(rule)
    assert -2.0 < chosen <= 0.5
    assert found.counts.at(chosen).blackened(kept).dice().tolist() == [[1.0], [1.0]]


@given(TRUTHS, LOGITS, hnp.arrays(np.bool_, 3))
def test_a_blackened_image_is_one_whose_map_is_nought(truth, logits, kept) -> None:
    """The public code sets the map to 0 and searches then; a score below all others stands for that here."""
    if not (truth.any(axis=(1, 2)) & kept).any():
        return
    nought = np.where(kept[:, None, None], logits, -60000.0).astype(np.float32)
    for rule in ("pr_curve", "grid"):
        chosen = search(truth, logits, kept=kept).choose(rule)
        if (plain := search(truth, nought).choose(rule)) != -60000.0:
            assert chosen == plain


def test_with_all_positives_blackened_every_rule_still_answers() -> None:
    truth, logits = np.array([[[1, 0]], [[0, 0]]]), np.array([[[0.5, -2.0]], [[0.1, -2.0]]])
    for rule in ("min_of_max", "pr_curve", "grid"):
        for kept in ([False, True], [False, False]):
            found = search(truth, logits, kept=np.array(kept))
            threshold = found.choose(rule)
            assert np.isfinite(threshold)
            assert found.counts.at(threshold).blackened(np.array(kept)).predicted[0, 0] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_golden_rules_hold_in_any_precision(golden: dict, dtype: type) -> None:
    """What half precision holds exactly gives the same answers in a wider type, by the slower way."""
    truth, probability = golden["truth"], golden["probability"].astype(dtype)
    answer = golden["answers"]["pr_curve_factor_10"]
    assert thresholds.pr_curve(truth, probability, 10)[0] == answer["threshold"]
    swept = thresholds.sweep(truth, probability, golden["grid"][:, 0])
    np.testing.assert_allclose(np.stack(swept, axis=1), golden["grid"][:, 1:], rtol=1e-10, atol=1e-12)


def test_grid_and_two_pixel_optima_are_the_public_ones(golden: dict) -> None:
    answers = golden["answers"]
    swept = thresholds.sweep(golden["truth"], golden["probability"], thresholds.GRID)
    assert thresholds.GRID[swept.dice_mean.argmax()] == answers["grid"]["best_dice_threshold"]
    assert swept.dice_mean.max() == pytest.approx(answers["grid"]["best_dice"], rel=1e-12)
    grid = np.arange(0.1, 1, 0.005)
    found = metrics.two_pixel(golden["truth"], golden["probability"], grid).f1
    assert grid[found.argmax()] == answers["two_pixel"]["best_threshold"]
    assert found.max() == pytest.approx(answers["two_pixel"]["best_f1"], rel=1e-12)


def test_the_rule_that_trials_apply_finds_the_golden_optimum(golden: dict) -> None:
    """On logits, through the tables of a pass with torch: the same best Dice as the public grid."""
    probability = golden["probability"].astype(np.float64).clip(1e-7, 1 - 1e-7)
    logits = torch.from_numpy(thresholds.logit(probability))
    builder = CountsBuilder()
    for truth_HW, logits_HW in zip(golden["truth"], logits, strict=True):
        builder.add(tally(torch, to_half(logits_HW), torch.from_numpy(truth_HW.astype(np.uint8))))
    found = ThresholdSearch(builder.build(), {}, np.ones(len(logits), bool))
    best = found.counts.at(found.choose("grid")).dice().mean()
    # Not equal: a probability on the grid and its logit in half precision may lie on two sides of a threshold.
    assert best == pytest.approx(golden["answers"]["grid"]["best_dice"], abs=2e-4)
