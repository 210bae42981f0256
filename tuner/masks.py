"""What masks are worth: from the records of a search over `num_segmented`, the best configuration that each number of
masks allows, the annotation curve, and what the next masks would bring.

The curve is value = a - b * (n + n0)^-c for n masks: the inverse power law of Hestness et al. (2017, arXiv 1712.00409)
and Mukherjee et al. (2003), with an offset: POW4 in Viering and Loog, The Shape of Learning Curves, TPAMI 2023, one of
those that fitted best. It never falls and is at most 1.

Which trials tell it: a bad configuration is no evidence on masks, so of each number of masks only the best third of the
trainings counts, as its mean. (The best alone would grow with the number of trials; the mean of a third lies below it
by about the same everywhere, which a difference along the curve does not see.) Numbers with fewer than three trainings
are put together with their neighbours.

Its uncertainty is Bayesian, on a grid over the shape (c, n0) and over the luck that all trainings with one number of
masks share (all have one seed, so the same images keep their masks): the prior is even in log c, half-Cauchy in the
luck, flat in the value at the most masks and in the difference to the fewest, which on each point of the grid are
normal and drawn. The luck within a number of masks comes from bootstrap draws of its trainings. Everything is seeded.
It is the luck of other trainings and other masks; the validation images stay the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.arrays import Floats
from tuner import records
from tuner.records import Status
from tuner.space import Labelling

SHARE = 3
"""of the trainings of a number of masks, the best one in so many tell the curve"""
FEWEST_POINTS = 3
STEP = 100
"""masks, of which it is said what they would bring; fewer where fewer are left"""
CLEAR = 0.95
"""how sure it must be that more masks were better, for more to be said than that the data do not tell"""
SMALL = 0.01
"""a gain that does not matter; a curve that surely gains less than that also tells something"""

_EXPONENTS = np.geomspace(0.1, 2.0, 12)
_OFFSETS = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
"""n0, in units of the fewest masks"""
_LUCK = np.geomspace(0.001, 0.1, 10)
"""standard deviation of what all trainings with one number of masks share"""
_LUCK_SCALE = 0.01
_DRAWS = 400
"""of the two values, on each point of the grid"""
_KEPT = 4000
"""of all draws, by their weights"""
_BOOTSTRAPS = 400
_BAND = 41
"""places at which a drawn curve is given"""


Number = float | Floats


@dataclass(frozen=True, slots=True)
class Training:
    """A network and its best value, in whichever way it was judged."""

    trial: str
    masks: int
    value: float


@dataclass(frozen=True, slots=True)
class Point:
    """What the trainings with about one number of masks tell."""

    masks: float
    """mean of those that tell"""
    value: float
    told_by: int
    """how many, the best of..."""
    trainings: int


@dataclass(frozen=True)
class Curve:
    """D equally likely curves."""

    points: list[Point]
    """by their masks"""
    certainty: float
    """that there is a gain at all"""
    top_D: Floats
    """value at the most masks"""
    gain_D: Floats
    """from the fewest to the most, 0 or more"""
    exponent_D: Floats
    offset_D: Floats

    @property
    def tells(self) -> bool:
        """Whether more can be said than that the data do not tell: it is clear that masks were a gain, or that they
        were hardly any."""
        if not len(self.top_D):  # the more masks the worse, by far
            return False
        return self.certainty >= CLEAR or self.gain(self.points[0].masks, self.points[-1].masks)[2] < SMALL

    def value(self, masks: float) -> tuple[float, float, float]:
        """Median and 95 % interval of the value at a number of masks."""
        return _quantiles(self._values(masks))

    def gain(self, start: float, end: float) -> tuple[float, float, float]:
        """Median and 95 % interval of what going from one number of masks to another brings."""
        return _quantiles(self._values(end) - self._values(start))

    def _values(self, masks: float) -> Floats:
        ends = self.points[0].masks, self.points[-1].masks
        return self.top_D + self.gain_D * _rise(masks, *ends, self.exponent_D, self.offset_D)


def _rise(masks: Number, fewest: Number, most: Number, exponent: Number, offset: Number) -> Floats:
    """The shape: -1 at the fewest masks, 0 at the most, and further up beyond."""

    def left(n: Number) -> Floats:
        return np.asarray((n + offset) ** -exponent)

    return (left(most) - left(masks)) / (left(fewest) - left(most))


def _quantiles(values_D: Floats) -> tuple[float, float, float]:
    middle, low, high = np.quantile(values_D, [0.5, 0.025, 0.975]).tolist()
    return middle, low, high


def trainings(found: Iterable[dict[str, Any]], all_masks: int | None = None) -> list[Training]:
    """Of the completed trials that meet the constraints, by their masks. A network that several trials read their
    results off counts once, with the best of them. `all_masks`: how many the word all means, where a record does not
    say."""
    best: dict[str, Training] = {}
    for record in found:
        masks = records.masks_of(record)
        masks = all_masks if masks is None else masks
        if record["status"] != Status.COMPLETED or record["value"] is None or masks is None:
            continue
        network = record["replayed_from"] or record["trial"]
        if records.is_feasible(record) and (network not in best or record["value"] > best[network].value):
            best[network] = Training(record["trial"], masks, record["value"])
    return sorted(best.values(), key=lambda one: one.masks)


def budgets(found: Sequence[Training]) -> list[dict[str, Any]]:
    """For each number of `masks` that was tried: how many `trainings` there were, the `best` of them, and the best
    `within` it, which may have fewer masks: `trial`, `masks`, `value`."""
    rows = []
    within: Training | None = None
    for masks, group in _by_masks(found).items():
        best = max(group, key=lambda one: one.value)
        within = best if within is None or best.value > within.value else within
        rows.append({"masks": masks, "trainings": len(group), "best": asdict(best), "within": asdict(within)})
    return rows


def fit(found: Sequence[Training], seed: int = 0) -> Curve | None:
    """The annotation curve; None with fewer than three points, through which no curve can be told."""
    rng = np.random.default_rng(seed)
    points, variances = [], []
    for group in _groups([one for one in found if one.masks]):  # without any, segmentation is not trained
        group = sorted(group, key=lambda one: -one.value)
        best = group[: math.ceil(len(group) / SHARE)]
        masks, value = np.mean([(one.masks, one.value) for one in best], axis=0).tolist()
        points.append(Point(masks, value, told_by=len(best), trainings=len(group)))
        drawn = rng.choice([one.value for one in group], (_BOOTSTRAPS, len(group)))
        variances.append(np.sort(drawn, axis=1)[:, -len(best) :].mean(axis=1).var() * len(best))
    points.sort(key=lambda point: point.masks)
    if len({point.masks for point in points}) < FEWEST_POINTS:
        return None
    # Of three trainings the luck is known badly, so all numbers of masks share it.
    return through(points, np.mean(variances) / np.array([point.told_by for point in points]), seed)


def _by_masks(found: Iterable[Training]) -> dict[int, list[Training]]:
    groups: dict[int, list[Training]] = defaultdict(list)
    for one in sorted(found, key=lambda one: one.masks):
        groups[one.masks].append(one)
    return groups


def _groups(found: Iterable[Training]) -> list[list[Training]]:
    """By the number of masks; neighbours together until there are enough that a third says something."""
    groups: list[list[Training]] = []
    for group in _by_masks(found).values():
        if groups and len(groups[-1]) < SHARE:
            groups[-1] += group
        else:
            groups.append([*group])
    if len(groups) > 1 and len(groups[-1]) < SHARE:
        last = groups.pop()
        groups[-1] += last
    return groups


def through(points: list[Point], variances_K: Floats, seed: int = 0) -> Curve:
    """The curve through K points, by their masks, each with the variance that luck of its own gives it."""
    rng = np.random.default_rng(seed)
    masks, values = (np.array([getattr(point, name) for point in points]) for name in ("masks", "value"))
    prior = 1 / (1 + (_LUCK / _LUCK_SCALE) ** 2) * _LUCK  # a density, times the width of its step on the grid
    shapes = [(exponent, offset) for exponent in _EXPONENTS for offset in _OFFSETS * masks[0]]
    weights, certain, drawn = [], [], []
    for exponent, offset in shapes:
        rise_K, beyond = (_rise(n, masks[0], masks[-1], exponent, offset) for n in (masks, math.inf))
        design_K2 = np.stack([np.ones_like(rise_K), rise_K], axis=1)
        for luck, likely in zip(_LUCK, prior, strict=True):
            precision_K = 1 / (variances_K + luck**2)
            information = design_K2.T @ (design_K2 * precision_K[:, None])
            covariance = np.linalg.inv(information)
            mean = covariance @ design_K2.T @ (precision_K * values)
            misfit = precision_K @ (values - design_K2 @ mean) ** 2
            evidence = np.log(precision_K).sum() - np.linalg.slogdet(information)[1] - misfit
            weights.append(math.log(likely) + 0.5 * float(evidence))
            top, gain = mean[:, None] + np.linalg.cholesky(covariance) @ rng.standard_normal((2, _DRAWS))
            certain.append(float(np.mean(gain > 0)))
            possible = (gain >= 0) & (top - gain >= 0) & (top + gain * beyond <= 1)
            drawn.append((possible, np.stack([top, gain, np.full(_DRAWS, exponent), np.full(_DRAWS, offset)])))
    share = np.exp(np.array(weights) - max(weights))
    weight_D = np.concatenate([one * possible for one, (possible, _) in zip(share, drawn, strict=True)])
    curves_4D = np.concatenate([curves for _, curves in drawn], axis=1)
    kept = rng.choice(len(weight_D), _KEPT, p=weight_D / weight_D.sum()) if weight_D.any() else np.zeros(0, int)
    return Curve(points, float(np.average(certain, weights=share)), *curves_4D[:, kept])


def annotation(
    found: Iterable[dict[str, Any]], train: Mapping[str, int], labelling: Labelling | None, figure: str
) -> dict[str, Any]:
    """What the records of a search say of masks, as metrics.json holds it (docs/run-directory.md). `train`: how many
    training images are positive, negative and segmented; `figure`: the objective in words."""
    told = trainings(found, train["segmented"])
    curve = fit(told)
    images = train["positive"] + train["negative"]

    def minutes(masks: int, labels: int = images) -> float | None:
        return labelling.minutes(labels, masks) if labelling else None

    content: dict[str, Any] = {
        "budgets": [row | {"minutes": minutes(row["masks"])} for row in budgets(told)],
        "points": [asdict(point) for point in curve.points] if curve else [],
        "tells": bool(curve and curve.tells),
        "curve": [],
        "next": None,
    }
    if curve is None:
        count = len(_groups([one for one in told if one.masks]))
        why = (
            f"a curve needs {FEWEST_POINTS} numbers of masks with about {SHARE} completed trainings each, and there "
            f"{'is' if count == 1 else 'are'} {count}"
        )
        return content | {"sentence": f"The data do not tell what more masks would bring: {why}."}
    start = round(curve.points[-1].masks)
    if not curve.tells:
        why = f"from {curve.points[0].masks:.0f} to {start} masks the {figure} differs by no more than luck"
        return content | {"sentence": f"The data do not tell what more masks would bring: {why}."}
    masks, where, labels = _next(start, train)
    gain, low, high = curve.gain(start, start + masks)
    spent = minutes(masks, labels)
    places = np.geomspace(curve.points[0].masks, start + masks, _BAND).tolist()
    content["curve"] = [
        {"masks": n, "value": middle, "ci95": bounds} for n in places for middle, *bounds in [curve.value(n)]
    ]
    content["next"] = {
        "from": start, "masks": masks, "images": where, "minutes": spent, "gain": gain, "ci95": [low, high],
    }  # fmt: skip
    costs = "" if spent is None else f" ({spent:,.0f} minutes)"
    return content | {
        "sentence": f"The next {masks} masks{costs} would raise the {figure} by about {gain:.3f} (95 % interval "
        f"{low:.3f} to {high:.3f}). {_WHERE[where]}; this goes beyond the {start} that the curve was measured with."
    }


_WHERE = {
    "masked": "They are in the data set already",
    "labelled": "Their images are in the data set, without masks",
    "new": "Their images are not in the data set yet and must be like those that are",
}


def _next(start: int, train: Mapping[str, int]) -> tuple[int, str, int]:
    """How many masks come next, where their images are, and how many labels these still need. Never more than there
    were: a curve says little beyond twice its length."""
    most = min(STEP, start)
    if (left := train["segmented"] - start) > 0:
        return min(most, left), "masked", 0
    if (left := train["positive"] - start) > 0:
        return min(most, left), "labelled", 0
    return most, "new", most
