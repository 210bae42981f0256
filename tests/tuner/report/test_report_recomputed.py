"""metrics.json against figures made anew from predictions.csv and the count tables, with nothing of ours but the files."""

import csv
import json

import numpy as np
import pytest

CODES = 1 << 16


def half_of(codes: np.ndarray) -> np.ndarray:
    """The numbers behind the codes: as they are from 0 up, counted down from -0 below."""
    bits = np.where(codes >= 0, codes, 0x8000 + (-1 - codes.astype(np.int64)))
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


class Files:
    """One split of one role."""

    def __init__(self, written, role: str, split: str) -> None:
        with np.load(written.directory / f"evaluation/{role}-{split}.npz") as arrays:
            self.arrays = dict(arrays)
        self.thresholds = json.loads(str(self.arrays["thresholds"]))
        self.labels = self.arrays["labels"].astype(bool)
        self.logits = self.arrays["decision_logits"].astype(np.float16).astype(np.float64)
        self.scores = half_of(self.arrays["counts_code"])
        starts = self.arrays["counts_offsets"]
        self.image = np.repeat(np.arange(len(self.labels)), np.diff(starts))

    def sums(self, *kinds: str, at: float = -np.inf) -> np.ndarray:
        """(N,) pixels of these kinds with a score of at least this"""
        pixels = sum(self.arrays[f"counts_{kind}"].astype(np.int64) for kind in kinds)
        return np.bincount(self.image, pixels * (self.scores >= at), len(self.labels))

    @property
    def masks(self) -> dict[str, np.ndarray]:
        at = self.thresholds["segmentation_logit"]
        return {
            "predicted": self.sums("background", "margin", "truth", at=at),
            "hits": self.sums("truth", at=at),
            "near": self.sums("margin", "truth", at=at),
            "found": self.sums("reached", at=at),
            "truth": self.sums("truth"),
            "pixels": self.sums("background", "margin", "truth"),
        }

    def pixel_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each distinct score, highest first: pixels of the truth, and others"""
        order = np.unique(-self.scores)
        row = np.searchsorted(order, -self.scores)
        inside = self.arrays["counts_truth"].astype(np.int64)
        outside = self.arrays["counts_background"].astype(np.int64) + self.arrays["counts_margin"]
        return np.bincount(row, inside, len(order)), np.bincount(row, outside, len(order))


def ratio(above, below):
    """Of images: nothing over nothing is 1."""
    return np.where(below == 0, 1.0, above / np.maximum(below, 1))


def mask_figures(files: Files) -> dict[str, float]:
    m, positive = files.masks, files.labels
    predicted, hits, truth = m["predicted"], m["hits"], m["truth"]
    either = predicted + truth - hits
    dice, iou = ratio(2 * hits, predicted + truth), ratio(hits, either)
    forgiving = ratio(m["near"], predicted), ratio(m["found"], truth)
    public = m["near"] / np.maximum(predicted, 1), m["near"] / np.maximum(m["near"] + truth - hits, 1)

    def harmonic(pair):
        return 2 * pair[0] * pair[1] / np.where(pair[0] + pair[1] == 0, 1, pair[0] + pair[1])

    background = m["pixels"] - either
    return {
        "dice_mean": dice.mean(),
        "dice_std": dice.std(),
        "dice_positive_mean": dice[positive].mean(),
        "iou_mean": iou.mean(),
        "iou_std": iou.std(),
        "iou_positive_mean": iou[positive].mean(),
        "precision_mean": ratio(hits, predicted).mean(),
        "recall_mean": ratio(hits, truth).mean(),
        "precision": hits.sum() / predicted.sum(),
        "recall": hits.sum() / truth.sum(),
        "f1": 2 * hits.sum() / (predicted.sum() + truth.sum()),
        "f1_positive": 2 * hits[positive].sum() / (predicted[positive].sum() + truth[positive].sum()),
        "iou_pooled": hits.sum() / either.sum(),
        "iou_pooled_positive": hits[positive].sum() / either[positive].sum(),
        "iou_two_class": (hits.sum() / either.sum() + background.sum() / (background + either - hits).sum()) / 2,
        "two_pixel_f1": harmonic(public).mean(),
        "tolerance_f1": harmonic(forgiving).mean(),
    }


def line_figures(files: Files) -> dict[str, float]:
    predicted, inside, near, truth, truth_inside, truth_near = files.arrays["centre_lines"].T
    dice = []
    for p, a, t, b in zip(predicted, inside, truth, truth_inside, strict=True):
        shares = a / max(p, 1), b / max(t, 1)
        dice.append(1.0 if p == t == 0 else 2 * shares[0] * shares[1] / (sum(shares) or 1))
    return {"cl_dice": np.mean(dice), "cl_iou": ratio(near, predicted + truth - truth_near).mean()}


def swept_figures(files: Files) -> dict[str, float]:
    truth, some = files.sums("truth"), files.sums("truth") > 0
    f1, pooled, iou = [], [], []
    for percent in range(1, 100):
        at = np.log(percent / (100 - percent))
        predicted, hits = files.sums("background", "margin", "truth", at=at), files.sums("truth", at=at)
        f1.append(2 * hits / np.maximum(predicted + truth, 1))
        iou.append(hits / np.maximum(predicted + truth - hits, 1))
        pooled.append(2 * hits.sum() / (predicted.sum() + truth.sum()))
    return {
        "ods": max(pooled),
        "ois": np.max(f1, axis=0)[some].mean(),
        "aiu": np.mean(iou, axis=0)[some].mean(),
        "pixel_ap": area(*files.pixel_scores()),
    }


def area(positives, others) -> float:
    """Under the precision-recall curve by trapezoids from (0, 1), of counts by score, the highest first."""
    total, before, found, alarms, last = positives.sum(), 0.0, 0.0, 0.0, 1.0
    out = 0.0
    for more, wrong in zip(positives, others, strict=True):
        found, alarms = found + more, alarms + wrong
        precision = found / (found + alarms)
        out += (found / total - before) * (precision + last) / 2
        before, last = found / total, precision
    return out


def decision_figures(files: Files) -> dict[str, float]:
    threshold = np.float16(files.thresholds["decision_logit"])
    yes, labels, logits = files.logits >= threshold, files.labels, files.logits
    tp, fp, fn, tn = ((yes & labels).sum(), (yes & ~labels).sum(), (~yes & labels).sum(), (~yes & ~labels).sum())
    pairs = logits[labels][:, None] - logits[~labels][None]
    levels = np.unique(logits)[::-1]
    counted = [[(logits[side] == level).sum() for level in levels] for side in (labels, ~labels)]
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "decision_auc": ((pairs > 0) + (pairs == 0) / 2).mean(),
        "decision_ap": area(*map(np.array, counted)),
        "decision_accuracy": (tp + tn) / len(labels),
        "decision_precision": tp / (tp + fp),
        "decision_recall": tp / (tp + fn),
        "decision_specificity": tn / (tn + fp),
        "decision_f1": 2 * tp / (2 * tp + fp + fn),
    }


@pytest.mark.parametrize(("role", "key"), [("winner", "test"), ("baseline", "baseline")])
def test_every_test_figure_follows_from_the_count_tables(usual, role, key) -> None:
    files, found = Files(usual, role, "test"), usual.metrics[key]
    expected = mask_figures(files) | line_figures(files) | swept_figures(files) | decision_figures(files)
    expected["threshold"] = 1 / (1 + np.exp(-files.thresholds["segmentation_logit"]))
    assert set(expected) == set(found) - {"ci95"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-9), name


def test_validation_figures_follow_from_the_count_tables(usual) -> None:
    files, found = Files(usual, "winner", "validation"), usual.metrics["validation"]
    expected = mask_figures(files)
    for name in ("dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name
    assert found["decision_ap"] == pytest.approx(decision_figures(files)["decision_ap"], abs=1e-9)
    assert found["decision_threshold"] == pytest.approx(1 / (1 + np.exp(-files.thresholds["decision_logit"])))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_means_follow_from_the_lines_of_predictions(usual, split) -> None:
    with (usual.report / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    found, label = usual.metrics[split], np.array([row["label"] == "1" for row in rows])
    dice, iou, precision, recall = (
        np.array([float(row[name]) for row in rows]) for name in ("dice", "iou", "precision", "recall")
    )
    expected = {
        "dice_mean": dice.mean(),
        "dice_std": dice.std(),
        "dice_positive_mean": dice[label].mean(),
        "iou_mean": iou.mean(),
        "iou_std": iou.std(),
    }
    if split == "test":
        decided = np.array([row["decision"] == "1" for row in rows])
        expected |= {"precision_mean": precision.mean(), "recall_mean": recall.mean()}
        expected |= {"iou_positive_mean": iou[label].mean()}
        expected |= {"tp": (label & decided).sum(), "fp": (~label & decided).sum()}
        expected |= {"fn": (label & ~decided).sum(), "tn": (~label & ~decided).sum()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=2e-6), name


def test_rules_pick_what_their_definitions_say(usual) -> None:
    """Thresholds of the replayed rules from validation's tables, by brute force."""
    files = Files(usual, "winner", "validation")
    rows = {(r["rule"], r["factor"]): r for r in usual.metrics["rules"] if not r["blacken"]}
    probability = {key: row["threshold"] for key, row in rows.items()}
    defect = np.flatnonzero(files.sums("truth") > 0)
    largest = min(files.scores[files.image == n].max() for n in defect)
    assert probability["min_of_max", 1] == pytest.approx(1 / (1 + np.exp(-largest)))
    truth = files.sums("truth").sum()
    levels = np.unique(files.scores)
    predicted, hits = np.cumsum([[p + o, p] for p, o in zip(*files.pixel_scores(), strict=True)], axis=0).T
    f1 = 2 * hits / (predicted + truth)
    assert probability["pr_curve", 1] == pytest.approx(1 / (1 + np.exp(-levels[::-1][f1.argmax()])), rel=1e-3)
    dice = []
    for p in np.arange(0.01, 1, 0.005):
        at = np.log(p / (1 - p))
        chosen, right = files.sums("background", "margin", "truth", at=at), files.sums("truth", at=at)
        dice.append(ratio(2 * right, chosen + files.sums("truth")).mean())
    assert probability["grid", 1] == pytest.approx(np.arange(0.01, 1, 0.005)[np.argmax(dice)])
    assert rows["grid", 1]["validation"]["dice_mean"] == pytest.approx(max(dice))
