"""Which configuration is the best, of trainings that luck has a part in: what to train next, who may be the best, and
what the chosen one is worth.

The model: what a training comes to is its configuration's mean over seeds, drawn from a normal distribution; plus what
its seed does to all configurations alike (the same initial weights, the same order of images), normal too; plus what
luck is left, normal with a spread that all share. The numbers of these distributions are integrated over a grid (a full
Bayesian treatment), so that intervals know how little a few trainings say of them.

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

Shapes: A configurations, H points of the grid, D draws, S seeds beside the search's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
_SHARED = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
"""what a seed does to all configurations alike, as a multiple of the luck that is left; half-Cauchy with scale 1/2"""
_CENSORED_FROM = 8
"""with fewer configurations all values count"""
_MU_POINTS = 15
_NEGLIGIBLE = 12.0
"""so far below the best point of the grid, by the logarithm of its probability, a point says nothing"""


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
    """What trainings say of the means of A configurations. `trainings`: of each, its values by seed, finite; all have
    one of the seed `first`, the search's. `worse`: how many further configurations are known only to lie below the
    median of these there."""

    def __init__(self, trainings: Sequence[Mapping[int, float]], first: int = 0, worse: int = 0) -> None:
        assert trainings
        assert all(first in own and all(map(math.isfinite, own.values())) for own in trainings)
        seeds = sorted({seed for own in trainings for seed in own} - {first})
        self._values_AS: Floats = np.array([[own.get(seed, math.nan) for seed in (first, *seeds)] for own in trainings])
        self.count_A: Ints = np.array([len(own) for own in trainings])
        self.measured_A: Floats = np.nanmean(self._values_AS, axis=1)
        is_cut = worse or len(trainings) >= _CENSORED_FROM
        floor = float(np.median(self._values_AS[:, 0])) if is_cut else -math.inf
        self._counted_A: Bools = (self.count_A > 1) | (self._values_AS[:, 0] >= floor)
        self._mu_H, self._tau_H, self._sigma_H, self._omega_H = self._grid(floor)
        log_H = self._log_posterior(floor, worse)
        kept = log_H > log_H.max() - _NEGLIGIBLE
        self._keep(kept, np.exp(log_H[kept] - log_H.max()))

    def _keep(self, kept_H: Bools, weight_H: Floats) -> None:
        """Leaves out the points of the grid that nothing speaks for."""
        self._weight_H: Floats = weight_H / weight_H.sum()
        for name in ("_mu_H", "_tau_H", "_sigma_H", "_omega_H", "_shift_HS", "_spread_HSS"):
            setattr(self, name, getattr(self, name)[kept_H])

    def _grid(self, floor: float) -> tuple[Floats, ...]:
        """Points (mu, tau, sigma, omega) that cover what the trainings leave open: mean and spread of configurations
        with the search's seed, the spread of a training and that of what a seed does to all."""
        found = self._values_AS[self._counted_A, 0]
        low = floor if math.isfinite(floor) else float(np.median(found))
        reach = max(float(found.max()) - low, float(np.ptp(found)) / 2, 1e-4)
        mu = low + reach * np.linspace(-1.5, 1.0, _MU_POINTS)
        tau = reach * np.geomspace(1 / 12, 2, 9)
        # Differences of a configuration's trainings, less what their seeds have in common.
        again = self._values_AS[self.count_A > 1]
        left = again - np.nanmean(again, axis=1, keepdims=True)
        left = left - np.nanmean(left, axis=0) if len(again) > 1 else left
        freedom = max(0, int(self.count_A.sum()) - len(self.count_A) - self._values_AS.shape[1] + 1)
        of_prior, of_data = math.log(_SIGMA_FACTOR) ** -2, 2.0 * freedom
        centre = math.log(_SIGMA) * of_prior
        if freedom:
            centre += math.log(max(float(np.nansum(left**2)) / freedom, 1e-12)) / 2 * of_data
        centre /= of_prior + of_data
        sigma = np.exp(centre + np.linspace(-2.5, 2.5, 9) / math.sqrt(of_prior + of_data))
        points = np.meshgrid(mu, tau, sigma, np.array(_SHARED), indexing="ij")
        mu, tau, sigma, shared = (axis.ravel() for axis in points)
        return mu, tau, sigma, shared * sigma

    def _log_posterior(self, floor: float, worse: int) -> Floats:
        """Of the points of the grid; leaves at each the mean (H, S) and the covariance (H, S, S) of what the other
        seeds do more than the search's."""
        mu, tau2, sigma2, omega2 = self._mu_H, self._tau_H**2, self._sigma_H**2, self._omega_H**2
        # mu and tau are even over their range, omega / sigma half-Cauchy (Gelman, Bayesian Analysis 2006); steps in tau
        # and in that ratio grow.
        shared = self._omega_H / self._sigma_H
        log_H = np.log(self._tau_H) + np.log(shared / (1 + 4 * shared**2))
        log_H = log_H - 0.5 * (np.log(self._sigma_H / _SIGMA) / math.log(_SIGMA_FACTOR)) ** 2
        others = self._values_AS.shape[1] - 1
        # What is known of seeds does not hang on mu, along which the grid repeats itself.
        once = slice(len(mu) // _MU_POINTS)
        precision = (np.eye(others) - 1 / (others + 1)) / omega2[once, None, None]
        pull = np.zeros((len(mu), others))
        log_H = log_H - 0.5 * (others * np.log(omega2) + math.log(others + 1))
        is_there_AS = np.isfinite(self._values_AS)
        for seeds_S in np.unique(is_there_AS[self._counted_A], axis=0):
            own = self._values_AS[self._counted_A & (is_there_AS == seeds_S).all(axis=1)]
            own = own[:, seeds_S]
            count, each = own.shape
            rho = tau2 / (sigma2 + each * tau2)
            sums = own.sum(axis=1)
            squares = (own**2).sum() - 2 * mu * own.sum() + count * each * mu**2
            squares_of_sums = (sums**2).sum() - 2 * each * mu * sums.sum() + count * (each * mu) ** 2
            log_H = log_H - 0.5 * count * ((each - 1) * np.log(sigma2) + np.log(sigma2 + each * tau2))
            log_H = log_H - 0.5 * (squares - rho * squares_of_sums) / sigma2
            again = seeds_S[1:].astype(float)
            precision = precision + count * (
                (np.diag(again) - rho[once, None, None] * np.outer(again, again)) / sigma2[once, None, None]
            )
            by_seed = np.zeros(others)
            by_seed[seeds_S[1:]] = own[:, 1:].sum(axis=0)
            total = (rho * sums.sum() + mu * count * (1 - rho * each))[:, None]
            pull = pull + (by_seed - total * again) / sigma2[:, None]
        if below := int((~self._counted_A).sum()) + worse:
            log_H = log_H + below * log_ndtr((floor - mu) / np.sqrt(tau2 + sigma2))
        self._spread_HSS: Floats = np.tile(np.linalg.inv(precision), (_MU_POINTS, 1, 1))
        self._shift_HS: Floats = (self._spread_HSS @ pull[..., None])[..., 0]
        found: Floats = log_H - 0.5 * (
            np.tile(np.linalg.slogdet(precision)[1], _MU_POINTS) - (pull * self._shift_HS).sum(axis=1)
        )
        return found

    @cached_property
    def _given_seeds(self) -> tuple[Floats, Floats, Floats]:
        """At each point of the grid, of the configurations' means with the search's seed, if it were known what seeds
        do: (H, A) means, were they to do nothing, (H, A) variances, and (H, A) how much a mean falls with the sum of
        what its seeds do."""
        precision = self._tau_H[:, None] ** -2 + self.count_A / self._sigma_H[:, None] ** 2
        weighed = self._mu_H[:, None] / self._tau_H[:, None] ** 2
        weighed = weighed + np.nansum(self._values_AS, axis=1) / self._sigma_H[:, None] ** 2
        return weighed / precision, 1 / precision, 1 / (precision * self._sigma_H[:, None] ** 2)

    @cached_property
    def _mean_over_seeds(self) -> Floats:
        """(H, A) at each point of the grid."""
        plain, _, falls = self._given_seeds
        is_there_AS = np.isfinite(self._values_AS[:, 1:])
        # The search's seed is one of all: what it does less than the others is what these do more, in the mean.
        level = self._shift_HS.sum(axis=1) / self._values_AS.shape[1]
        found: Floats = plain - falls * (self._shift_HS @ is_there_AS.T) + level[:, None]
        return found

    @cached_property
    def means(self) -> Floats:
        """(A,) of each configuration's mean over seeds."""
        found: Floats = self._weight_H @ self._mean_over_seeds
        return found

    @cached_property
    def _own_variances(self) -> Floats:
        """(A,) of each configuration's mean, but for what seeds do to all."""
        relative = self._mean_over_seeds - self._mean_over_seeds.mean(axis=1, keepdims=True)
        found: Floats = self._weight_H @ (self._given_seeds[1] + relative**2) - (self._weight_H @ relative) ** 2
        return found

    @property
    def sigma(self) -> float:
        """Standard deviation of one training around its configuration's mean, what its seed does to all included."""
        return math.sqrt(float(self._weight_H @ (self._sigma_H**2 + self._omega_H**2)))

    @cached_property
    def draws(self) -> Floats:
        """(D, A) means of all configurations, as they may be together. The same trainings give the same draws."""
        rng = np.random.default_rng(0)
        points = rng.choice(len(self._weight_H), size=_DRAWS, p=self._weight_H)
        plain, variances, falls = (found[points] for found in self._given_seeds)
        seeds = self._values_AS.shape[1]
        root = np.linalg.cholesky(self._spread_HSS[points])
        shift = self._shift_HS[points] + (root @ rng.standard_normal((_DRAWS, seeds - 1, 1)))[..., 0]
        # What the search's seed does, given by how much the others do more.
        own = -shift.sum(axis=1) / seeds + self._omega_H[points] / math.sqrt(seeds) * rng.standard_normal(_DRAWS)
        noise = rng.standard_normal((_DRAWS, len(self.count_A)))
        is_there_AS = np.isfinite(self._values_AS[:, 1:])
        found: Floats = plain - falls * (shift @ is_there_AS.T) + np.sqrt(variances) * noise - own[:, None]
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
        noise2 = float(self._weight_H @ self._sigma_H**2)
        variance_A = 1 / (1 / self._own_variances + pending_A / noise2)
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
        own = self._omega_H[points] * rng.standard_normal(_DRAWS)  # of the one seed that all have had
        found: Floats = means[np.arange(_DRAWS), lucky] - own
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
