"""Which configuration is the best, of trainings that luck has a part in: what to train next, who may be the best, and
what the chosen one is worth.

The model: a configuration's mean over seeds is drawn from a normal distribution, and what one training comes to from a
normal distribution around that mean, whose spread all configurations share. The three numbers of it are integrated
over a grid (a full Bayesian treatment), so that intervals know how little a few trainings say of them.

- A search leaves a long tail of bad configurations, which says nothing of those at the top. So of the worse half of the
  single trainings only their number counts, as values that lie below the median (a censored likelihood; Tobin 1958).
- The mean of a configuration given all trainings is drawn toward those of the others, the more the fewer trainings it
  has: that takes back what it owes to having been chosen for its luck (Efron, "Tweedie's formula and selection bias",
  JASA 2011), however it was chosen and whatever was trained more often (Dawid, "Selection paradoxes of Bayesian
  inference", 1994).
- The next training goes where it is expected to raise the mean of the configuration that will be chosen most: the
  knowledge gradient (Frazier, Powell and Dayanik, SIAM J. Control Optim. 2008), LL(1) of Chick, Branke and Schmidt
  (INFORMS J. Comput. 2010). The race is over when one is the best with probability SEPARATED (Branke, Chick and
  Schmidt, "Selecting a selection procedure", Management Science 2007).

Shapes: A configurations, H points of the grid, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_ndtr, ndtr

from model.arrays import Array, Bools, Floats, Ints

SEPARATED = 0.95
"""a configuration that is the best with this probability has won"""

_LEVEL = 0.95
_DRAWS = 2000
_SIGMA, _SIGMA_FACTOR = 0.006, 2.5
"""What is known of the luck in one training before any is repeated: five seeds of one configuration spread by 0.003 to
0.008 F1 on CRACK500. Log-normal, with room for other data: two times in three within this factor."""
_CENSORED_FROM = 8
"""with fewer configurations all values count"""


@dataclass(frozen=True)
class Standing:
    """What is known of one configuration's mean over seeds."""

    trainings: int
    measured: float
    """mean of its trainings"""
    mean: float
    """the same, corrected for luck"""
    interval: tuple[float, float]
    """95 %, of `mean`"""
    best: float
    """probability that it is the best of all"""
    ranks: tuple[int, int]
    """95 % interval of its rank, from 1"""


class Belief:
    """What trainings say of the means of A configurations. `values`: of each its trainings', at least one, finite.
    `worse`: how many further configurations are known only to lie below the median of these."""

    def __init__(self, values: Sequence[Sequence[float]], worse: int = 0) -> None:
        assert values
        assert all(len(own) and np.isfinite(own).all() for own in values)
        self.count_A: Ints = np.array([len(own) for own in values])
        self.measured_A: Floats = np.array([np.mean(own) for own in values])
        within = sum(float(((np.asarray(own) - np.mean(own)) ** 2).sum()) for own in values)
        singles = self.count_A == 1
        is_cut = worse or len(values) >= _CENSORED_FROM
        floor = np.median([own[0] for own in values]) if is_cut else -math.inf
        self._counted_A: Bools = ~singles | (self.measured_A >= floor)
        mu, tau, sigma = self._grid(within, float(floor))
        self._mu_H, self._tau_H, self._sigma_H = mu, tau, sigma
        log_H = self._log_prior(tau, sigma) + self._log_likelihood(within, float(floor), worse)
        weight = np.exp(log_H - log_H.max())
        self._weight_H: Floats = weight / weight.sum()

    def _grid(self, within: float, floor: float) -> tuple[Floats, Floats, Floats]:
        """Points (mu, tau, sigma) that cover what the trainings leave open."""
        found = self.measured_A[self._counted_A]
        low = floor if math.isfinite(floor) else float(np.median(found))
        reach = max(float(found.max()) - low, float(np.ptp(found)) / 2, 1e-4)
        mu = low + reach * np.linspace(-1.5, 1.0, 19)
        tau = reach * np.geomspace(1 / 15, 2, 13)
        freedom = int(self.count_A.sum()) - len(self.count_A)
        of_prior, of_data = math.log(_SIGMA_FACTOR) ** -2, 2.0 * freedom
        centre = math.log(_SIGMA) * of_prior
        if freedom:
            centre += math.log(max(within / freedom, 1e-12)) / 2 * of_data
        centre /= of_prior + of_data
        sigma = np.exp(centre + np.linspace(-2.5, 2.5, 9) / math.sqrt(of_prior + of_data))
        grid = np.meshgrid(mu, tau, sigma, indexing="ij")
        return grid[0].ravel(), grid[1].ravel(), grid[2].ravel()

    def _log_prior(self, tau_H: Floats, sigma_H: Floats) -> Floats:
        """mu and tau are even over the range of the grid (Gelman, Bayesian Analysis 2006), whose steps in tau grow."""
        found: Floats = np.log(tau_H) - 0.5 * (np.log(sigma_H / _SIGMA) / math.log(_SIGMA_FACTOR)) ** 2
        return found

    def _log_likelihood(self, within: float, floor: float, worse: int) -> Floats:
        mu, tau2, sigma2 = self._mu_H, self._tau_H**2, self._sigma_H**2
        freedom = int(self.count_A.sum()) - len(self.count_A)
        total = -0.5 * (freedom * np.log(sigma2) + within / sigma2)
        for count in np.unique(self.count_A[self._counted_A]):
            own = self.measured_A[self._counted_A & (self.count_A == count)]
            spread2 = tau2 + sigma2 / count
            squares = ((own - own.mean()) ** 2).sum() + len(own) * (own.mean() - mu) ** 2
            total -= 0.5 * (len(own) * np.log(spread2) + squares / spread2)
        if below := int((~self._counted_A).sum()) + worse:
            total += below * log_ndtr((floor - mu) / np.sqrt(tau2 + sigma2))
        found: Floats = total
        return found

    @cached_property
    def _posterior(self) -> tuple[Floats, Floats]:
        """(H, A) means and variances at each point of the grid."""
        precision = self._tau_H[:, None] ** -2 + self.count_A / self._sigma_H[:, None] ** 2
        weighed = self._mu_H[:, None] / self._tau_H[:, None] ** 2
        weighed = weighed + self.count_A * self.measured_A / self._sigma_H[:, None] ** 2
        return weighed / precision, 1 / precision

    @cached_property
    def means(self) -> Floats:
        """(A,) of each configuration's mean over seeds."""
        found: Floats = self._weight_H @ self._posterior[0]
        return found

    @cached_property
    def variances(self) -> Floats:
        """(A,) of each configuration's mean over seeds."""
        means, variances = self._posterior
        found: Floats = self._weight_H @ (variances + means**2) - self.means**2
        return found

    @property
    def sigma(self) -> float:
        """Standard deviation of one training around its configuration's mean."""
        return math.sqrt(float(self._weight_H @ self._sigma_H**2))

    @cached_property
    def draws(self) -> Floats:
        """(D, A) means of all configurations, as they may be together. The same trainings give the same draws."""
        rng = np.random.default_rng(0)
        points = rng.choice(len(self._weight_H), size=_DRAWS, p=self._weight_H)
        means, variances = self._posterior
        noise = rng.standard_normal((_DRAWS, len(self.count_A)))
        found: Floats = means[points] + np.sqrt(variances[points]) * noise
        return found

    @cached_property
    def best(self) -> Floats:
        """(A,) probability of each that it is the best of all."""
        found: Floats = np.bincount(self.draws.argmax(axis=1), minlength=len(self.count_A)) / _DRAWS
        return found

    def winner(self) -> int:
        """The configuration with the largest mean."""
        return int(self.means.argmax())

    def next(self, most: int, under_way: Sequence[int] = ()) -> int | None:
        """The configuration that is to be trained again; None where one is separated, or none can be. `most`: trainings
        of one configuration. `under_way`: how many trainings of each run now, as if they came out as expected."""
        pending_A = np.zeros_like(self.count_A) if not len(under_way) else np.asarray(under_way)
        free_A = self.count_A + pending_A < most
        if not free_A.any() or len(free_A) < 2 or self.best.max() >= SEPARATED:
            return None
        noise2 = self.sigma**2
        variance_A = 1 / (1 / self.variances + pending_A / noise2)
        step_A = np.sqrt(variance_A - 1 / (1 / variance_A + 1 / noise2))
        first, second = np.argsort(-self.means)[:2]
        rival_A = np.where(np.arange(len(self.means)) == first, self.means[second], self.means[first])
        z_A = -np.abs(self.means - rival_A) / step_A
        gain_A = step_A * (z_A * ndtr(z_A) + np.exp(-(z_A**2) / 2) / math.sqrt(2 * math.pi))
        return int(np.where(free_A, gain_A, -math.inf).argmax())

    def alike(self, chosen: int) -> Bools:
        """(A,) which configurations cannot be told from the chosen one: those that are at least as good with
        probability 1 - SEPARATED or more; itself among them."""
        found: Bools = (self.draws >= self.draws[:, [chosen]]).mean(axis=0) > 1 - SEPARATED
        return found

    def standing(self, one: int) -> Standing:
        """What is known of one configuration."""
        # How many are better, in each draw.
        ranks_D = 1 + (self.draws > self.draws[:, [one]]).sum(axis=1)
        low, high = interval(ranks_D)
        return Standing(
            int(self.count_A[one]),
            float(self.measured_A[one]),
            float(self.means[one]),
            interval(self.draws[:, one]),
            float(self.best[one]),
            (int(low), int(high)),
        )

    def best_of(self, count: int) -> Floats:
        """(D,) what the best of `count` new configurations is worth: drawn like these, chosen by single trainings."""
        rng = np.random.default_rng(1)
        points = rng.choice(len(self._weight_H), size=_DRAWS, p=self._weight_H)
        mu, tau, sigma = (found[points, None] for found in (self._mu_H, self._tau_H, self._sigma_H))
        means = mu + tau * rng.standard_normal((_DRAWS, count))
        lucky = (means + sigma * rng.standard_normal((_DRAWS, count))).argmax(axis=1)
        found: Floats = means[np.arange(_DRAWS), lucky]
        return found

    def difference(self, one: int, other: int) -> tuple[float, tuple[float, float]]:
        """By how much the first mean is larger than the second, with its 95 % interval."""
        found = interval(self.draws[:, one] - self.draws[:, other])
        return float(self.means[one] - self.means[other]), found


def interval(draws_D: Array) -> tuple[float, float]:
    """Of 95 % of draws."""
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(draws_D, [tail, 1 - tail])
    return float(low), float(high)
