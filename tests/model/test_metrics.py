"""Figures of a split against their plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model import counts, metrics
from model.curves import area_under_roc, average_precision, curve
from model.thresholds import logit
from tests.tables import count

TRUTHS = hnp.arrays(np.bool_, (3, 4, 5)).filter(lambda truth: truth.any())
LOGITS = hnp.arrays(np.float32, (3, 4, 5), elements=st.sampled_from([-12.0, -1.0, 0.0, 0.5, 11.0]))


def threshold_free(tables: counts.PixelCounts, kept: np.ndarray) -> dict[str, float]:
    return metrics.without_threshold(tables.at(metrics.SWEPT).blackened(kept), tables.pixel_curve(kept))


@given(TRUTHS, LOGITS)
def test_figures_are_what_their_definitions_say(truth, logits) -> None:
    mask = logits >= 0
    labels = truth.any(axis=(1, 2))
    found = metrics.figures(count(truth, logits).at(0.0), labels, np.array([0.0, 1.0, 2.0]))

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0

    def dice(a: np.ndarray, b: np.ndarray) -> float:
        return 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0

    pairs = list(zip(truth, mask, strict=True))
    positive = [pair for pair in pairs if pair[0].any()]
    wanted = {
        "dice_mean": np.mean([dice(*pair) for pair in pairs]),
        "dice_std": np.std([dice(*pair) for pair in pairs]),
        "dice_positive_mean": np.mean([dice(*pair) for pair in positive]),
        "iou_mean": np.mean([iou(*pair) for pair in pairs]),
        "iou_positive_mean": np.mean([iou(*pair) for pair in positive]),
        "recall_mean": np.mean([(t & m).sum() / t.sum() if t.any() else 1 for t, m in pairs]),
        "precision_mean": np.mean([(t & m).sum() / m.sum() if m.any() else 1 for t, m in pairs]),
        "recall": (truth & mask).sum() / truth.sum(),
        "f1": dice(truth, mask),
        "f1_positive": dice(truth[labels], mask[labels]),
        "iou_pooled": iou(truth, mask),
        "iou_pooled_positive": iou(truth[labels], mask[labels]),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    if (~truth | ~mask).any():
        assert found["iou_two_class"] == pytest.approx((iou(truth, mask) + iou(~truth, ~mask)) / 2)


def test_background_flatters_the_two_class_iou() -> None:
    """A crack of 1 % of the pixels, half of it missed."""
    truth, mask = np.zeros((2, 1, 10, 100), bool)
    truth[0, 5, :10], mask[0, 5, :5] = True, True
    found = metrics.figures(count(truth, mask * 1.0).at(0.5), np.array([True]), np.zeros(1))
    assert found["iou_pooled"] == 0.5
    assert found["iou_two_class"] == pytest.approx(0.747, abs=1e-3)


@given(TRUTHS, LOGITS, hnp.arrays(np.bool_, 3))
def test_figures_without_a_threshold(truth, logits, kept) -> None:
    scores = np.where(kept[:, None, None], counts.to_half(logits).astype(float), -np.inf)
    np.testing.assert_allclose(metrics.SWEPT, logit(np.arange(1, 100) / 100), atol=1e-12)
    found = threshold_free(count(truth, logits), kept)
    masks = [scores >= t for t in metrics.SWEPT]
    positive = truth.any(axis=(1, 2))

    def f1(t: np.ndarray, m: np.ndarray) -> float:
        return 2 * (t & m).sum() / (t.sum() + m.sum())

    assert found["ods"] == pytest.approx(max(f1(truth, mask) for mask in masks))
    best = [max(f1(truth[n], mask[n]) for mask in masks) for n in np.flatnonzero(positive)]
    assert found["ois"] == pytest.approx(np.mean(best))
    ious = [(truth[n] & m[n]).sum() / (truth[n] | m[n]).sum() for m in masks for n in np.flatnonzero(positive)]
    assert found["aiu"] == pytest.approx(np.mean(ious))
    wanted = average_precision(curve(truth.ravel(), scores.ravel()))
    assert found["pixel_ap"] == pytest.approx(wanted, nan_ok=True)


def test_what_cannot_exist_is_nan() -> None:
    nothing = np.zeros((2, 3, 3))
    found = metrics.figures(count(nothing, nothing - 1).at(0.0), np.zeros(2, bool), np.zeros(2))
    for name in ("dice_positive_mean", "precision", "recall", "f1", "f1_positive", "decision_ap", "decision_auc"):
        assert np.isnan(found[name]), name
    assert found["dice_mean"] == 1.0
    assert np.isnan([*threshold_free(count(nothing, nothing), np.ones(2, bool)).values()]).all()


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_curves_of_one_class_have_no_area(labels: list[bool]) -> None:
    points = curve(np.array(labels), np.array([0.1, 0.9]))
    assert np.isnan(average_precision(points))
    assert np.isnan(area_under_roc(points))


@given(hnp.arrays(np.bool_, 12), hnp.arrays(np.float64, 12, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])))
def test_the_area_under_roc_counts_pairs(labels, scores) -> None:
    if labels.all() or not labels.any():
        return
    above = scores[labels][:, None] - scores[~labels][None]
    assert area_under_roc(curve(labels, scores)) == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())


def test_the_decision_of_the_results_page() -> None:
    """TP 1477, FP 17, FN 6, TN 195 is F1 0.99227, accuracy 0.98643, specificity 0.9198."""
    found = metrics.decision_figures({"tp": 1477, "fp": 17, "fn": 6, "tn": 195})
    assert found["decision_f1"] == pytest.approx(0.99227, abs=5e-6)
    assert found["decision_accuracy"] == pytest.approx(0.98643, abs=5e-6)
    assert found["decision_specificity"] == pytest.approx(0.9198, abs=5e-5)
    assert np.isnan(metrics.decision_figures({"tp": 1, "fp": 0, "fn": 0, "tn": 0})["decision_specificity"])


def test_confusion_counts_images() -> None:
    found = metrics.confusion(np.array([1, 1, 1, 0, 0]), np.array([True, True, False, True, False]))
    assert found == {"tp": 2, "fp": 1, "fn": 1, "tn": 1}


def test_every_figure_has_a_name_and_a_definition() -> None:
    tables = count(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
    named = metrics.figures(tables.at(0.0), np.array([True]), np.zeros(1))
    named |= threshold_free(tables, np.array([True]))
    named |= metrics.decision_figures(metrics.confusion(np.array([1]), np.array([True])))
    assert set(named) | {"cl_dice", "cl_iou"} == set(metrics.METRICS)
