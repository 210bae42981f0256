"""The statistics of which configuration is best: against the same model in one dense matrix, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.race import SEPARATED, Belief


def dense(belief: Belief, trainings: list[dict[int, float]]) -> np.ndarray:
    """Means over seeds, from the covariance of all trainings at each point of the grid, as the posterior weighs it."""
    places = [(a, seed) for a, own in enumerate(trainings) for seed in sorted(own)]
    values = np.array([trainings[a][seed] for a, seed in places])
    same = np.array([[a == b for b, _ in places] for a, _ in places], float)
    alone = np.eye(len(places))
    later = np.array([float(seed > 0) for _, seed in places])
    both = np.array([[seed > 0 and seed == other for _, other in places] for _, seed in places], float)
    logs, means = [], []
    grid = zip(belief._mu_H, belief._tau_H**2, belief._sigma_H**2, belief._omega_H**2, strict=True)
    for mu, tau2, sigma2, omega2 in grid:
        covariance = tau2 * same + sigma2 * alone + omega2 * (both + np.outer(later, later))
        solved = np.linalg.solve(covariance, values - mu)
        logs.append(-0.5 * ((values - mu) @ solved + np.linalg.slogdet(covariance)[1]))
        of_one = np.array([[float(a == b) for b, _ in places] for a in range(len(trainings))])
        means.append(mu + (tau2 * of_one + omega2 * later) @ solved)
    shared = belief._omega_H / belief._sigma_H
    prior = np.log(belief._tau_H) + np.log(shared / (1 + 4 * shared**2))
    prior -= 0.5 * (np.log(belief._sigma_H / 0.006) / np.log(2.5)) ** 2
    weights = np.exp(np.array(logs) + prior - (np.array(logs) + prior).max())
    return weights / weights.sum() @ np.array(means)


@pytest.mark.parametrize("seeds", [[(0,)] * 5, [(0, 1), (0,), (0, 1, 2), (0, 1), (0,)], [(0, 2), (0, 1), (0,)]])
def test_means_are_those_of_the_whole_covariance(seeds: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(len(seeds))
    effects = rng.normal(0, 0.02, 3)
    trainings = [
        {seed: float(mean + effects[seed] + rng.normal(0, 0.006)) for seed in own}
        for own, mean in zip(seeds, rng.normal(0.7, 0.02, len(seeds)), strict=True)
    ]
    belief = Belief(trainings)
    assert belief.means == pytest.approx(dense(belief, trainings), abs=1e-9)
    error = belief.draws.std(axis=0).max() / np.sqrt(len(belief.draws))
    assert belief.draws.mean(axis=0) == pytest.approx(belief.means, abs=5 * error)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=30), st.floats(-0.04, 0.04))
def test_single_trainings_keep_their_order_and_come_closer(values: list[float], shift: float) -> None:
    """And all of them better by as much are worth as much more."""
    belief = Belief([{0: value} for value in values])
    order = np.argsort(values, kind="stable")
    assert (np.diff(belief.means[order]) >= -1e-9).all()
    assert np.ptp(belief.means) <= np.ptp(values) + 1e-9
    assert belief.best.sum() == pytest.approx(1)
    moved = Belief([{0: value + shift} for value in values])
    assert moved.means == pytest.approx(belief.means + shift, abs=1e-6)


def test_luck_is_told_from_what_a_seed_does_to_all() -> None:
    """Differences between seeds that all configurations share say nothing against their order."""
    means = [0.70, 0.69, 0.68, 0.67, 0.60, 0.61]
    alike = Belief([{0: mean, 1: mean + 0.03, 2: mean - 0.01} for mean in means])
    unlike = Belief([{0: m, 1: m + 0.03 * (-1) ** n, 2: m - 0.01 * (-1) ** n} for n, m in enumerate(means)])
    assert alike.best[0] > 0.95 > unlike.best[0]
    # One that has not had the lucky seed is not behind for it.
    late = Belief([{0: 0.70}, *({0: mean, 1: mean + 0.03, 2: mean - 0.01} for mean in means[1:])])
    assert late.winner() == 0


def test_a_race_ends_where_one_is_separated_and_asks_for_those_that_may_be_best() -> None:
    clear = [{0: 0.80, 1: 0.801, 2: 0.799}, {0: 0.70, 1: 0.701}, {0: 0.69, 1: 0.689}, {0: 0.5}]
    assert Belief(clear).best[0] >= SEPARATED
    assert Belief(clear).next(9) is None
    close = [{0: 0.700}, {0: 0.702}, {0: 0.64}, {0: 0.50}, {0: 0.66}]
    asked = Belief(close).next(5)
    assert asked in (0, 1)
    other = Belief(close).next(5, [int(n == asked) * 4 for n in range(5)])
    assert other == 1 - asked
    assert Belief(close).next(1) is None
    assert Belief([{0: 0.7}]).next(5) is None


def test_trainings_that_run_count_as_if_they_came_out_as_expected() -> None:
    close = Belief([{0: 0.700}, {0: 0.701}, {0: 0.702}, {0: 0.65}])
    under_way = [0] * 4
    for _ in range(6):
        chosen = close.next(3, under_way)
        assert chosen is not None
        under_way[chosen] += 1
    assert max(under_way[:3]) <= 2  # three with the search's own
    assert min(under_way[:3]) >= 1


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_the_chosen_one_is_no_luckier_than_it_says(shared: float) -> None:
    """In sixty small searches; bench/selection.py has thousands."""
    rng = np.random.default_rng(7)
    excess, corrected, covered = [], [], []
    for _ in range(60):
        truth, effects = rng.normal(0.7, 0.008, 24), rng.normal(0, shared * 0.006, 5)
        trainings = [{0: float(mean + effects[0] + rng.normal(0, 0.006))} for mean in truth]
        belief = Belief(trainings)
        excess.append(belief.measured_A.max() - effects[0] - truth[belief.measured_A.argmax()])
        for _ in range(6):
            if (one := belief.next(5)) is None:
                break
            number = len(trainings[one])
            trainings[one][number] = float(truth[one] + effects[number] + rng.normal(0, 0.006))
            belief = Belief(trainings)
        standing, mean = belief.standing(belief.winner()), truth[belief.winner()]
        corrected.append(standing.mean - mean)
        covered.append(standing.interval[0] <= mean <= standing.interval[1])
    assert np.mean(excess) > 0.004
    assert abs(np.mean(corrected)) < np.mean(excess) / 3
    assert np.mean(covered) > 0.85


def test_the_best_of_more_draws_is_better_and_less_than_the_luckiest() -> None:
    rng = np.random.default_rng(3)
    belief = Belief([{0: float(value)} for value in rng.normal(0.6, 0.02, 30)])
    few, many = belief.best_of(3).mean(), belief.best_of(100).mean()
    assert 0.6 < few < many < 0.6 + 4 * 0.02
    # Others that are known only to be worse make the same draws rarer.
    assert Belief([{0: float(v)} for v in rng.normal(0.6, 0.02, 8)], worse=40).best_of(5).mean() < few


def test_ranks_hold_what_is_known() -> None:
    belief = Belief([{0: 0.8, 1: 0.801}, {0: 0.7, 1: 0.7}, {0: 0.6, 1: 0.601}])
    assert [belief.standing(n).ranks for n in range(3)] == [(1, 1), (2, 2), (3, 3)]
    assert belief.alike(0).tolist() == [True, False, False]
    value, (low, high) = belief.difference(0, 1)
    assert low < value < high
    assert value == pytest.approx(0.1, abs=0.02)
