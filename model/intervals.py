"""95 % confidence intervals of the test figures, over photo groups: images of one group move together.

Which method for which figure, and why not one for all:
- Nearly every figure is a ratio of sums over images (mean Dice = sum of Dice / images, precision = hits / predicted
  pixels). `ratio_interval` and, for two models on the same images, `difference_interval` are studentized bootstraps.
  Plain percentiles cover 92 to 94 % at 24 images, since they know neither Student's t nor skew.
- Rates near 1 have almost no spread to resample; `rate_interval` is Clopper-Pearson with an effective sample size.
  (Wilson's interval covers 87 % at 33 images and a rate of 0.996.)
- `auc_interval` and `ap_interval` take the spread from a model, which also holds where no error was seen, or from the
  data, whichever is larger.
- `jackknife_interval` for the two figures that are areas or optima over all pixels, and
  `jackknife_difference_interval` for differences of two models in these, in AUC and in AP.
`python -m bench.coverage` measures how often each holds the truth.

Shapes: N images, G groups, D draws, K ratios. groups_N are integer codes. Every function gives (low, high) or None;
`why_none` is the sentence for None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from model.arrays import Array, Floats, Ints
from model.curves import area_under_roc, average_precision, curve

Interval = tuple[float, float]

MIN_GROUPS = 20
"""A figure to which fewer groups contribute gets no interval: every method here trusts a variance over groups."""

_LEVEL = 0.95
_TAIL = (1 - _LEVEL) / 2
_DRAWS = 3999
"""(draws + 1) x 0.025 is a whole number, so that both quantiles are draws (Davison & Hinkley 1997, sec. 5.2.3)"""
_ROUNDING = 1e-9
"""Relative size below which a spread or a shift is taken for rounding."""


class Ratio(NamedTuple):
    """A figure: sum of numerators / sum of denominators. Denominators must not be negative."""

    numerator_N: Array
    denominator_N: Array

    def value(self) -> float:
        return float(np.sum(self.numerator_N) / np.sum(self.denominator_N))


def contributing(denominator_N: Array, groups_N: Array) -> int:
    """Groups that contribute to a figure: those with a denominator (for AUC and AP: with an image of the class)."""
    return len(np.unique(np.asarray(groups_N)[np.asarray(denominator_N) > 0]))


def why_none(groups: int) -> str:
    """Why a figure to which so many groups contribute has no interval."""
    if groups < MIN_GROUPS:
        return f"no interval: {groups} group{'' if groups == 1 else 's'}, {MIN_GROUPS} are needed"
    return "no interval: too few groups differ from the rest"


def ratio_interval(ratio: Ratio, groups_N: Array, bounds: Interval = (0.0, 1.0)) -> Interval | None:
    """Studentized bootstrap over groups (Efron & Tibshirani 1993, ch. 12; Hall 1988) of a ratio of sums, with the
    linearized standard error of a ratio (Cochran 1977, sec. 6.3), clipped to `bounds`.

    Groups without a denominator do not contribute. None for fewer than MIN_GROUPS, and where nearly all groups are
    alike (`_bootstrap_t`).
    """
    return _bootstrap_t([ratio], [1], groups_N, bounds)


def difference_interval(
    first: Ratio, second: Ratio, groups_N: Array, bounds: Interval = (-1.0, 1.0)
) -> Interval | None:
    """The same for `first` - `second`, two figures of the same N images; pairs are kept together. MIN_GROUPS must
    contribute to each.

    Coverage is lower where rare images make most of the difference, for a split may hold none of them: seen 83 % at 24
    and 90 % at 60 images where 5 % of the images differ by up to 0.4, 35 % by 0.02 and the rest not at all.
    """
    return _bootstrap_t([first, second], [1, -1], groups_N, bounds)


def mean_interval(ratios: Sequence[Ratio], groups_N: Array, bounds: Interval = (0.0, 1.0)) -> Interval | None:
    """The same for the mean of several ratios of the same images, as the IoU of two classes is."""
    return _bootstrap_t(ratios, [1 / len(ratios)] * len(ratios), groups_N, bounds)


def mean_difference_interval(
    first: Sequence[Ratio], second: Sequence[Ratio], groups_N: Array, bounds: Interval = (-1.0, 1.0)
) -> Interval | None:
    """The same for the difference of two such means of as many ratios; of one ratio it is `difference_interval`."""
    share = 1 / len(first)
    return _bootstrap_t([*first, *second], [share] * len(first) + [-share] * len(second), groups_N, bounds)


def rate_interval(successes_N: Array, trials_N: Array, groups_N: Array) -> Interval | None:
    """Clopper-Pearson interval of a rate with the effective sample size of Korn & Graubard (1998, Survey Methodology
    24:193): trials / design effect, the design effect being the variance of the rate over groups by that of
    independent trials, times their correction for its degrees of freedom (t of G - 1 by t of trials - 1, squared).

    The effective size is at most the number of trials. Where every trial or none succeeds there is no design effect
    to estimate: then each group counts once. With one image a group this is the plain Clopper-Pearson interval (they
    divide by p(1 - p)/n instead of n - 1, which would not be).
    """
    successes_G, trials_G = _sums([successes_N, trials_N], groups_N)
    assert ((successes_G >= 0) & (successes_G <= trials_G)).all()
    groups = int((trials_G > 0).sum())
    if groups < MIN_GROUPS:
        return None
    trials = trials_G.sum()
    rate = successes_G.sum() / trials
    if rate in (0, 1):
        return clopper_pearson(rate, groups)
    variance = _variance(((successes_G - rate * trials_G) / trials)[trials_G > 0])
    design_effect = variance / (rate * (1 - rate) / (trials - 1))
    t_groups, t_trials = stats.t.ppf(1 - _TAIL, [groups - 1, trials - 1])
    return clopper_pearson(rate, trials / max(1.0, design_effect * (t_groups / t_trials) ** 2))


def f1_of_jaccard(jaccard: float) -> float:
    """F1 (Dice) of a Jaccard index (IoU); rising, so it maps the ends of intervals too."""
    return 2 * jaccard / (1 + jaccard)


def decision_f1_interval(truth_N: Array, decided_N: Array, groups_N: Array) -> Interval | None:
    """Interval of the F1 of decisions on images, 2J / (1 + J) with J = TP / (TP + FP + FN): J is a rate among images
    that are no true negatives, and F1 is no rate."""
    truth, decided = np.asarray(truth_N, bool), np.asarray(decided_N, bool)
    interval = rate_interval(truth & decided, truth | decided, groups_N)
    return interval and (f1_of_jaccard(interval[0]), f1_of_jaccard(interval[1]))


def auc_interval(labels_N: Array, scores_N: Array, groups_N: Array) -> Interval | None:
    """Interval of `metrics.area_under_roc` by method 5 of Newcombe (2006, Stat. Med. 25:559), which inverts a score
    test with Hanley & McNeil's variance, so that it also works at 1. Sizes are the numbers of groups that hold
    positives and that hold negatives, MIN_GROUPS at least.

    That variance assumes exponential scores, and is too small where errors are few images far on the wrong side. So
    it is inflated to DeLong's (1988) variance, over groups (Obuchowski 1997), where that is larger.

    Coverage seen, 33 to 220 images a class: 96 to 99.8 % for normal scores of equal variance, AUC 0.9 to 0.998 (up to
    twice as wide as needed near 1). 91 to 99.9 % where the normal spreads differ by a factor of 3, scores have heavy
    tails or 1 to 5 % of a class score as the other; without the inflation 82 % and more. 79 to 99 % where 1 to 5 % of
    the negatives outrank all positives; without it, 71 % and more.
    """
    labels, groups = np.asarray(labels_N, bool), np.asarray(groups_N)
    positives, negatives = contributing(labels, groups), contributing(~labels, groups)
    if min(positives, negatives) < MIN_GROUPS:
        return None
    points = curve(labels, scores_N)
    auc = area_under_roc(points)
    if not 0 < auc < 1:
        inflation = 1.0
    else:
        rank_N = _ranks(points.thresholds, scores_N)
        positive_share = (points.recall - np.diff(points.recall, prepend=0) / 2)[rank_N]
        negative_share = (points.false_positive_rate - np.diff(points.false_positive_rate, prepend=0) / 2)[rank_N]
        count_N = np.where(labels, labels.sum(), (~labels).sum())
        influence_N = (np.where(labels, 1 - negative_share, positive_share) - auc) / count_N
        inflation = _inflation(influence_N, groups, _hanley_mcneil(auc, positives, negatives))
    # The variance is the same at 1 - AUC, so that the upper end is a lower one too.
    low = _newcombe_lower(auc, positives, negatives, inflation)
    return low, 1 - _newcombe_lower(1 - auc, positives, negatives, inflation)


def ap_interval(labels_N: Array, scores_N: Array, groups_N: Array) -> Interval | None:
    """Interval of `metrics.average_precision`: binomial among the positives (Boyd, Eng & Page 2013), by beta quantiles
    as Clopper-Pearson's, so that it also works at 1. The size is the number of groups that hold positives; MIN_GROUPS
    must, and must hold negatives.

    AP is no rate: a single negative on top costs every positive. So the size is reduced where the variance over groups
    of AP's influence function (its derivative by the weight of each image) exceeds the binomial one.

    Coverage seen, 33 to 220 images a class, of the AP of endless data with the same share of positives: 98 to 100 %
    for normal scores of equal variance (1.4 to 3 times as wide as needed). 86 to 99.9 % where the negatives spread 3
    times as wide, scores have heavy tails or 1 to 5 % of a class score as the other; without the reduction 78 % and
    more. 80 to 99 % where 1 to 5 % of the negatives outrank all positives; without it, 73 % and more. The low ones are
    those where a few negatives decide the figure: which of them a split holds is luck, and no method sees the others.
    """
    labels, groups = np.asarray(labels_N, bool), np.asarray(groups_N)
    positives, negatives = contributing(labels, groups), contributing(~labels, groups)
    if min(positives, negatives) < MIN_GROUPS:
        return None
    points = curve(labels, scores_N)
    ap = average_precision(points)
    if not 0 < ap < 1:
        return clopper_pearson(ap, positives)
    rank_N = _ranks(points.thresholds, scores_N)
    precision = points.precision
    # One more image at a score changes the precision at that score and at all below.
    selected = points.true_positives + points.false_positives
    weight = np.diff(points.true_positives, prepend=0) / selected
    gain = np.cumsum((weight * (1 - precision))[::-1])[::-1]
    loss = np.cumsum((weight * precision)[::-1])[::-1]
    mean_precision = (np.diff(points.recall, prepend=0) * precision).sum()
    influence_N = np.where(labels, (precision - mean_precision + gain)[rank_N], -loss[rank_N]) / labels.sum()
    inflation = _inflation(influence_N, groups, ap * (1 - ap) / positives)
    return clopper_pearson(ap, positives / inflation)


def jackknife_interval(value: float, without_G: Array) -> Interval | None:
    """Delete-a-group jackknife (Efron & Tibshirani 1993, ch. 11) of a share that is no ratio of sums, on a logit scale
    with Student's t; `without_G` is the figure without one group after another. None below MIN_GROUPS groups, where one
    of these is 0, 1 or NaN, and where no group makes a difference.
    """
    groups = len(without_G)
    shares = np.append(without_G, value)
    if groups < MIN_GROUPS or not ((shares > 0) & (shares < 1)).all() or np.ptp(without_G) < _ROUNDING:
        return None
    logits = special.logit(without_G)
    error = np.sqrt((groups - 1) * np.var(logits))
    reach = stats.t.ppf(1 - _TAIL, groups - 1) * error
    low, high = special.expit(special.logit(value) + np.array([-reach, reach]))
    return float(low), float(high)


def jackknife_difference_interval(value: float, without_G: Array) -> Interval | None:
    """The same for a difference of two such figures of the same images, AUC and AP among them, as it is: `without_G` is
    the difference without one group after another. Of AUC this is DeLong's (1988) paired variance over groups, but for
    his divisors. None below MIN_GROUPS groups, for NaN, and where no group makes a difference.

    Coverage seen: 94.5 to 95.4 % for pixel AP and ODS at 24 and 60 images; 93 to 98 % for AUC and AP of 33 or 100
    images a class at AUC 0.95 against 0.9, and at 0.99 against 0.97 where 5 % of a class score as the other; without
    these, where few images err, 86 to 88 % at 33 images a class and 92 % at 100.
    """
    groups = len(without_G)
    moved = np.abs(np.asarray(without_G) - np.median(without_G)) > _ROUNDING
    if groups < MIN_GROUPS or not np.isfinite(np.append(without_G, value)).all() or not moved.any():
        return None
    error = np.sqrt((groups - 1) * np.var(without_G))
    reach = float(stats.t.ppf(1 - _TAIL, groups - 1) * error)
    return max(value - reach, -1.0), min(value + reach, 1.0)


def _bootstrap_t(
    ratios: Sequence[Ratio], weights_K: Sequence[float], groups_N: Array, bounds: Interval
) -> Interval | None:
    """Bootstrap-t interval of a weighted sum of ratios.

    A draw t* = (figure* - figure) / standard error*. Where all groups drawn are alike, the error is 0 and t* infinite
    (0 if the figure did not move either): from such a draw nobody would have found the truth at any quantile, and to
    leave it out would hide that. If one draw in 40 is like that (3 groups differ from the rest, or fewer) the quantile
    is infinite, and there is no interval. Draws without a denominator are left out: there, the figure would not exist
    and nobody asks for its interval. With one ratio there are none; with two it happens once in 10^8 draws at most.

    We depart from the book in that no quantile is taken nearer than Student's: draws from few groups with heavy tails,
    as differences of two models have, understate t (92.9 % instead of 96.5 % coverage for 24 differences with 3 degrees
    of freedom). It widens intervals by 2 to 4 %.
    """
    numerator_KG = _sums([ratio.numerator_N for ratio in ratios], groups_N)
    denominator_KG = _sums([ratio.denominator_N for ratio in ratios], groups_N)
    assert (denominator_KG >= 0).all()
    if (denominator_KG > 0).sum(axis=1).min() < MIN_GROUPS:
        return None
    # By their values, so that the draws, and with them the interval, do not depend on codes and order of groups.
    order = np.lexsort(np.concatenate([numerator_KG, denominator_KG]))
    order = order[denominator_KG[:, order].any(axis=0)]
    numerator_KG, denominator_KG = numerator_KG[:, order], denominator_KG[:, order]

    share_K = np.array(weights_K, np.float64)
    total_K = denominator_KG.sum(axis=1)
    figure_K = numerator_KG.sum(axis=1) / total_K
    residual_KG = numerator_KG - figure_K[:, None] * denominator_KG
    error = math.sqrt(_variance((share_K / total_K) @ residual_KG))
    if error <= _ROUNDING * (np.abs(numerator_KG).sum(axis=1) / total_K).sum():
        return None

    t_parts = []
    draws_DG = _draws(len(order))
    # As much at a time as a processor's cache holds: twice as fast, and many groups fit into memory.
    for block_DG in np.array_split(draws_DG, 1 + draws_DG.size // 50_000):
        counts_DG = block_DG.astype(np.float64)
        total_DK = counts_DG @ denominator_KG.T
        exists_D = total_DK.all(axis=1)
        counts_DG, total_DK = counts_DG[exists_D], total_DK[exists_D]
        shift_DK = counts_DG @ residual_KG.T / total_DK
        weight_DK = share_K / total_DK
        influence_DG = weight_DK @ residual_KG - (weight_DK * shift_DK) @ denominator_KG
        square_D = np.einsum("dg,dg,dg->d", counts_DG, influence_DG, influence_DG)
        t_parts.append(_t(shift_DK @ share_K, np.sqrt(square_D * len(order) / (len(order) - 1)), _ROUNDING * error))
    t_D = np.sort(np.concatenate(t_parts))
    tail = round(_TAIL * (len(t_D) + 1))
    t_low, t_high = t_D[tail - 1], t_D[-tail]
    if not np.isfinite([t_low, t_high]).all():
        return None
    student = stats.t.ppf(1 - _TAIL, len(order) - 1)
    t_low, t_high = min(t_low, -student), max(t_high, student)
    figure = figure_K @ share_K
    return max(float(figure - t_high * error), bounds[0]), min(float(figure - t_low * error), bounds[1])


def _t(shift_D: Floats, error_D: Floats, rounding: float) -> Floats:
    """Shift / error of each draw; infinite for a shift without an error, 0 for neither."""
    t_D = np.where(np.abs(shift_D) > rounding, np.copysign(np.inf, shift_D), 0.0)
    return np.divide(shift_D, error_D, out=t_D, where=error_D > rounding)


@lru_cache(maxsize=4)
def _draws(groups: int) -> NDArray[np.uint8]:
    """(D, G) how often each draw takes each group: the same for all figures with so many groups. No group is taken
    256 times of an expected one."""
    counts_DG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=_DRAWS)
    return counts_DG.astype(np.uint8)


def _sums(values_KN: Sequence[Array], groups_N: Array) -> Floats:
    """(K, G) sums over the images of each group."""
    codes, index_N = np.unique(groups_N, return_inverse=True)
    return np.stack([np.bincount(index_N, np.asarray(values_N, np.float64), len(codes)) for values_N in values_KN])


def _variance(influence_G: Floats) -> float:
    """Variance over groups of a figure of which each group moves so much."""
    return float((influence_G**2).sum() * len(influence_G) / (len(influence_G) - 1))


def _inflation(influence_N: Floats, groups_N: Array, variance: float) -> float:
    """By how much the variance over groups exceeds that of a model; 1 where it does not."""
    return max(1.0, _variance(_sums([influence_N], groups_N)[0]) / variance)


def clopper_pearson(rate: float, trials: float) -> Interval:
    """Ends by beta quantiles, which also take fractions of trials."""
    successes, failures = rate * trials, (1 - rate) * trials
    low = stats.beta.ppf(_TAIL, successes, failures + 1) if successes else 0.0
    high = stats.beta.ppf(1 - _TAIL, successes + 1, failures) if failures else 1.0
    return float(low), float(high)


def _hanley_mcneil(auc: float, positives: int, negatives: int) -> float:
    """Variance of an AUC in the form of Newcombe's methods 4 and 5, with both sizes less one replaced by their mean."""
    others = (positives + negatives) / 2 - 1
    spread = 1 + others * (1 - auc) / (2 - auc) + others * auc / (1 + auc)
    return auc * (1 - auc) * spread / (positives * negatives)


def _newcombe_lower(auc: float, positives: int, negatives: int, inflation: float) -> float:
    """The lower AUC for which the given one lies 1.96 standard errors above."""
    if auc <= 0:
        return 0.0
    z = stats.norm.ppf(1 - _TAIL)

    def above(lower: float) -> float:
        return auc - lower - z * math.sqrt(inflation * _hanley_mcneil(lower, positives, negatives))

    # Not from 1 itself, which is a root where AUC is 1.
    return float(optimize.brentq(above, 0, min(auc, 1 - 1e-12)))


def _ranks(thresholds: Floats, scores_N: Array) -> Ints:
    """(N,) the point of a curve at which each image is selected."""
    return np.searchsorted(-thresholds, -np.asarray(scores_N, np.float64))
