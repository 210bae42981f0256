"""What a search as a whole is worth, by nested cross-validation: a pure function of the records.

The mean over folds of a trial is an honest figure of that trial, and too good a one of the best of many: it was chosen
for it. Nested, each fold scores what was chosen without it [1, 2]. For each fold f, the trial that the fold's inner
value puts first is chosen, and its network f, whose epoch and thresholds the inner fold chose too, is scored on f. The
mean of that is what the search gives, its choice included. One thing stays: a sampler draws its proposals, and a
scheduler stops trials, by the means over all folds, so which trials there are is not independent of any fold.

[1] Varma, Simon: Bias in error estimation when using cross-validation for model selection. BMC Bioinformatics 7, 2006.
[2] Cawley, Talbot: On over-fitting in model selection and subsequent selection bias in performance evaluation. JMLR 11,
    2010.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from tuner.records import Status


def score(records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What metrics.json says under `nested`; None where no completed trial has outer values.

    `folds` say by fold which `trial` was chosen, its `inner` value and its `outer` one; `value` is the mean of the
    outer values, `inner` that of the inner ones, `ci95` a t interval over folds. That one is rough: folds share most of
    their training images, so their values are not independent, and no estimate of their variance is unbiased (Bengio,
    Grandvalet: No unbiased estimator of the variance of k-fold cross-validation. JMLR 5, 2004).
    """
    there = [
        record for record in records if record["status"] == Status.COMPLETED and _is_nested(record.get("folds") or [])
    ]
    if not there:
        return None
    chosen = []
    for n in range(len(there[0]["folds"])):
        best = max(there, key=lambda record: record["folds"][n]["value"])  # of equals the earlier one
        own = best["folds"][n]
        chosen.append({"fold": n + 1, "trial": best["trial"], "inner": own["value"], "outer": own["outer"]})
    outer = [fold["outer"] for fold in chosen]
    value = fmean(outer)
    half = float(stats.t.ppf(0.975, len(outer) - 1)) * stdev(outer) / math.sqrt(len(outer))
    return {
        "value": value,
        "ci95": [value - half, value + half],
        "inner": fmean(fold["inner"] for fold in chosen),
        "trials": len(there),
        "folds": chosen,
    }


def _is_nested(folds: list[dict[str, Any]]) -> bool:
    return bool(folds) and all("outer" in fold for fold in folds)
