"""Whether the score of the decision can be read as a probability, on test images."""

from __future__ import annotations

import numpy as np

from model.intervals import Ratio, clopper_pearson, contributing, ratio_interval
from model.thresholds import sigmoid
from tuner.report import charts, words
from tuner.report.breakdown import equal_parts
from tuner.report.gallery import Block, Gallery, Pictures, Table, Text
from tuner.report.inputs import Json
from tuner.report.tables import Judged

_A_PART = 10
"""images that a part of the diagram has at least"""
_PARTS = (4, 10)
"""least and most parts"""

WHAT_A_SCORE_IS = (
    "The score is the sigmoid of the decision's logit. How many defects training shows and how much the decision's "
    "loss weighs are set by the method and change by epoch, not by how often defects occur: the score ranks images, "
    "and is no probability unless the diagram says so."
)


def figures(test: Judged) -> Json | None:
    """For metrics.json: Brier score (1950) and expected calibration error (Naeini et al. 2015) with its parts. None
    without a decision or without both classes; `ece` is None and `parts` empty where there are too few images."""
    labels = test.split.labels
    if test.decisions is None or labels.all() or not labels.any():
        return None
    scores, truth = sigmoid(test.split.decision_logits), labels.astype(np.float64)
    parts: list[Json] = []
    if len(labels) >= _A_PART * _PARTS[0]:
        for rows in equal_parts(scores, min(_PARTS[1], len(labels) // _A_PART)):
            share, groups = float(truth[rows].mean()), contributing(rows, test.groups)
            interval = clopper_pearson(share, groups)
            score = float(scores[rows].mean())
            parts.append(
                {"images": int(rows.sum()), "groups": groups, "score": score, "share": share, "ci95": interval}
            )
    parts = parts if len(parts) > 1 else []
    gaps = [part["images"] * abs(part["score"] - part["share"]) for part in parts]
    rate = float(truth.mean())
    square = (scores - truth) ** 2
    return {
        "images": len(labels),
        "base_rate": rate,
        "brier": float(square.mean()),
        "brier_ci95": ratio_interval(Ratio(square, np.ones(len(labels))), test.groups),
        "brier_of_base_rate": rate * (1 - rate),
        "ece": sum(gaps) / len(labels) if parts else None,
        "parts": parts,
    }


def blocks(test: Judged, found: Json | None, gallery: Gallery) -> list[Block]:
    """`found` is what `figures` gave."""
    if found is None:
        if test.decisions is None:
            return []
        which = "no test image has" if not test.split.labels.any() else "all test images have"
        return [Text(f"The calibration of the decision is not judged: {which} a defect.")]
    parts = found["parts"]
    rows = [
        ["Brier score", words.figure(found["brier"]), words.interval(found["brier_ci95"]) or words.NONE],
        ["Brier score of the base rate", words.figure(found["brier_of_base_rate"]), ""],
        ["expected calibration error", words.figure(found["ece"]), ""],
        ["base rate: share of test images with a defect", words.figure(found["base_rate"]), ""],
    ]
    table = Table(["", "test", "95 % interval"], rows, "Calibration of the decision on test images", frozenset({1, 2}))
    pictures = [
        gallery.figure(charts.score_histogram(test), "scores", "Scores of test images by label."),
    ]
    text = (
        f"{WHAT_A_SCORE_IS} Brier score (Brier 1950): mean of (score - label)², 0 is best; always to say the base rate "
        "scores what the second line says. "
    )
    if parts:
        caption = (
            f"Reliability: test images in {len(parts)} parts of about equal size by score; bars are 95 % "
            "Clopper-Pearson intervals that count each group of images once."
        )
        pictures.insert(0, gallery.figure(charts.reliability(parts), "reliability", caption))
        text += (
            "Expected calibration error (Naeini et al. 2015): mean over the parts of |mean score - share with a "
            "defect|, by their images; with few images it is above 0 for a perfect score too."
        )
    else:
        needed = _A_PART * _PARTS[0]
        why = f"{words.plural(found['images'], 'test image')}, {needed} are needed"
        why = why if found["images"] < needed else "nearly all scores are equal"
        text += f"There is no reliability diagram and no expected calibration error: {why}."
    return [table, Text(text), Pictures(pictures)]
