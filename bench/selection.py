"""What repeating the top of a search is worth, on simulated searches whose truth is known.

    python -m bench.selection [--trainings 40] [--repetitions 1000] [--shared 0] [--processes 2]

A search sees configurations whose means over seeds are normal with a spread, in trainings that add normal noise; the
settings are those seen on CRACK500. Three ways to choose, with the code that runs after a real search (tuner/race.py):

- single: every training is of a new configuration, and the largest value wins
- same cost: 15 % of the trainings repeat the top of the others
- half as much again: all of them are of new configurations, and half as many repeat the top

Regret is how much worse the chosen configuration is than the best of those that `single` saw. Bias is by how much the
winner's validation value is too high: as measured by single choice, and as corrected after repeats. Coverage is how
often the 95 % interval of the corrected value holds the truth. ± is one standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from model.arrays import Floats
from tuner.race import Belief

SETTINGS = ((0.012, 0.005), (0.008, 0.005), (0.005, 0.006), (0.015, 0.008))
"""spread of configurations, noise of a training"""
REPEATED = 0.15
"""share of the trainings that are repeats, at the same cost"""
MOST = 5
"""trainings of one configuration, as in a space unless it says otherwise"""


class Choice(NamedTuple):
    """What one way of choosing came to in one simulated search."""

    regret: float
    bias: float
    is_covered: float
    repeats: int


def chosen(truth_A: Floats, single_A: Floats, repeats: int, train: Callable[[int, int], float], best: float) -> Choice:
    """Repeats the top of a search of which `single_A` are the values, then chooses."""
    values = [{0: float(value)} for value in single_A]
    belief, used = Belief(values), 0
    while used < repeats and (one := belief.next(MOST)) is not None:
        values[one][len(values[one])] = train(one, len(values[one]))
        belief, used = Belief(values), used + 1
    winner = belief.winner()
    standing = belief.standing(winner)
    low, high = standing.interval
    truth = float(truth_A[winner])
    return Choice(best - truth, standing.mean - truth, float(low <= truth <= high), used)


def simulate(spread: float, noise: float, shared: float, trainings: int, seed: int) -> Floats:
    """(3, 4): for each way of choosing, what it came to. The ways share the search."""
    rng = np.random.default_rng(seed)
    truth_A = rng.normal(0.75, spread, trainings)
    of_seed = rng.normal(0, shared * noise, MOST)
    single_A = truth_A + of_seed[0] + rng.normal(0, noise, trainings)
    best, lucky = float(truth_A.max()), int(single_A.argmax())

    def train(one: int, number: int) -> float:
        return float(truth_A[one] + of_seed[number] + rng.normal(0, noise))

    repeats = round(REPEATED * trainings)
    fewer = trainings - repeats
    return np.array(
        [
            Choice(best - truth_A[lucky], single_A[lucky] - truth_A[lucky], np.nan, 0),
            chosen(truth_A[:fewer], single_A[:fewer], repeats, train, best),
            chosen(truth_A, single_A, trainings // 2, train, best),
        ]
    )


def main() -> None:
    """Prints a Markdown table, a row a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=40, help="of the search with single trainings")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--shared", type=float, default=0.0, help="what a seed does to all alike, in units of noise")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    print(
        "| spread, noise | regret, single | same cost | half as much again | bias, single | left, same cost "
        "| left, half as much again | coverage | repeats |\n" + "| --- " * 9 + "|"
    )
    regrets = []
    with get_context("spawn").Pool(options.processes) as pool:
        for spread, noise in SETTINGS:
            jobs = [(spread, noise, options.shared, options.trainings, seed) for seed in range(options.repetitions)]
            found_RWC = np.stack(pool.starmap(simulate, jobs, chunksize=20))
            print(_row(f"{spread}, {noise}", found_RWC), flush=True)
            regrets.append(found_RWC[:, :, 0].mean(axis=0))
    single, same, more = np.mean(regrets, axis=0)
    print(f"\nAll settings: regret {same / single:.2f} at the same cost, {more / single:.2f} with half as much again.")


def _row(name: str, found_RWC: Floats) -> str:
    """Regrets and biases after repeats as shares of those of the single choice."""
    count = len(found_RWC)
    (regret, bias, *_), same, more = found_RWC.mean(axis=0)
    errors = found_RWC.std(axis=0, ddof=1) / np.sqrt(count)
    ratio_errors = [_ratio_error(found_RWC[:, way, 0], found_RWC[:, 0, 0]) for way in (1, 2)]
    cells = [
        f"{name}",
        f"{regret:.5f} ± {errors[0, 0]:.5f}",
        f"{same[0] / regret:.2f} ± {ratio_errors[0]:.2f}",
        f"{more[0] / regret:.2f} ± {ratio_errors[1]:.2f}",
        f"{bias:.5f}",
        f"{same[1] / bias:+.2f} ± {errors[1, 1] / bias:.2f}",
        f"{more[1] / bias:+.2f} ± {errors[2, 1] / bias:.2f}",
        f"{same[2]:.3f}, {more[2]:.3f}",
        f"{same[3]:.1f}, {more[3]:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _ratio_error(of_R: Floats, to_R: Floats) -> float:
    """Standard error of a ratio of means over the same searches (delta method)."""
    ratio = of_R.mean() / to_R.mean()
    return float((of_R - ratio * to_R).std(ddof=1) / to_R.mean() / np.sqrt(len(of_R)))


if __name__ == "__main__":
    main()
