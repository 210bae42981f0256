"""The strategies of bench/strategies.py on real training: a small network on real images, a virtual clock all the same.

    python -m bench.strategies_real --data PATH [--searches 8] [--budget 6] [--workers 2]

Each search has a seed of its own, which also splits the images, as in a run. Curves are validation Dice as a trial
computes it. A configuration is trained no further than some strategy asks for, and never twice on one split: so all
strategies see the same curves, and what one search costs is paid once for all.

The baseline (learning rate 1.0) is in the space, comes first, and may be picked. The score of a strategy is the
validation Dice of its pick and, since a pick is lucky on what it was picked on, the Dice of its weights, at its
threshold, on the test split. This is a bench: it opens test splits of its own, and none of a run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.strategies import ROWS as ALL_ROWS
from bench.strategies import searched, standard_error, table
from bench.testbed import Curve
from model import layouts, splits, train
from model.arrays import Floats
from model.config import JUDGING_FIELDS, RunConfig
from model.data import Cache, open_cache
from model.evaluate import score
from tuner import space_file
from tuner.space import Space

SPACE = space_file.parse(
    {
        "name": "real",
        "data": {"height": 80, "width": 128, "validation_share": 0.2, "test_share": 0.5},
        "train": {"width": 0.1, "epochs": 9, "batch_size": 1},
        "search": {
            "learning_rate": {"type": "float", "low": 0.01, "high": 10.0, "log": True},
            "pixel_positive_weight": {"type": "float", "low": 1.0, "high": 10.0, "log": True},
            "dilate": {"type": "int", "low": 1, "high": 5, "step": 2},
            "augment_brightness": {"type": "float", "low": 0.0, "high": 0.4},
        },
        "scheduler": {"name": "asha"},
        "budget": {"trials": 6},
    }
)
ROWS = tuple(row for row in ALL_ROWS if "Hyperband" not in row.name and "median" not in row.name)
CPU = torch.device("cpu")


class Trained:
    """The values of a curve: a configuration that is trained as far as anybody has looked, and goes on from there."""

    def __init__(self, config: RunConfig, images: Cache, validation: Cache) -> None:
        self.config = config
        self.values: list[float] = []
        """after each epoch so far; from the one that diverged on they are not finite"""
        self._more = self._train(images, validation)

    def __len__(self) -> int:
        return self.config.epochs

    def __getitem__(self, key: int | slice, /) -> Any:
        wanted = range(len(self))[key]
        last = wanted if isinstance(wanted, int) else max(wanted, default=-1)
        self.values.extend(itertools.islice(self._more, max(0, last + 1 - len(self.values))))
        return np.array(self.values)[wanted]

    def _train(self, images: Cache, validation: Cache) -> Iterator[float]:
        """As tuner/trial.py: the objective of each epoch; keeps the best one's weights."""
        training = train.start(self.config, CPU)
        highest = -math.inf
        try:
            for _ in train.fit(training, images):
                scores = score(training.network, validation, self.config, CPU)
                thresholds = scores.choose(self.config.judgement())
                value = scores.figures([thresholds])[0][SPACE.objective.metric] or 0.0
                if value > highest:
                    highest = value
                    self.best_network, self.thresholds = copy.deepcopy(training.network), thresholds
                yield value
        except (train.TrainingDiverged, FloatingPointError):
            yield from itertools.repeat(math.nan)

    def dice_on(self, split: Cache) -> float:
        """The mean Dice of the best epoch so far, at its threshold."""
        return score(self.best_network, split, self.config, CPU).figures([self.thresholds])[0]["dice_mean"] or 0.0


class RealCurves:
    """The curves of a space on one split."""

    def __init__(self, space: Space, found: splits.Splits) -> None:
        assert not set(space.search) & set(JUDGING_FIELDS)  # they would need replays
        self.space = space
        size = space.data.height, space.data.width
        self.images, self.validation = open_cache(found.train, *size), open_cache(found.validation, *size)
        self.trained: dict[str, Trained] = {}
        """by training fields"""

    def of(self, params: Mapping[str, Any]) -> Trained:
        config = self.space.config(params, self.space.seed)
        key = json.dumps(config.training_fields(), sort_keys=True)
        if key not in self.trained:
            self.trained[key] = Trained(config, self.images, self.validation)
        return self.trained[key]

    def __call__(self, params: Mapping[str, Any]) -> Curve:
        return Curve(self.of(params))


@dataclass(frozen=True)
class Outcome:
    """What all strategies did on one split."""

    seed: int
    scores_RC: Floats
    """of each row's pick: validation and test Dice"""
    trials_R: list[int]
    picks_R: list[dict[str, Any]]
    trainings: int
    """configurations that were trained"""
    epochs: int
    """that were really trained"""
    top: float
    """the highest validation Dice that any of these had after any epoch"""


def outcome(job: tuple[Path, int, int, int]) -> Outcome:
    """Of all rows on the split of a seed, with a budget in full trainings and so many virtual workers."""
    data, seed, budget, workers = job
    torch.set_num_threads(1)
    space = replace(SPACE, seed=seed)
    found = splits.assign(layouts.read(data), data, space.data.validation_share, space.data.test_share, seed)
    curves = RealCurves(space, found)
    test = open_cache(found.test, space.data.height, space.data.width)
    scores, trials, picks = [], [], []
    for row in ROWS:
        search, (pick,) = searched(row, space, curves, (budget,), workers)
        assert pick is not None, row.name  # the baseline at least
        scores.append((pick.value, curves.of(pick.params).dice_on(test)))
        trials.append(len({json.dumps(dict(trial.params), sort_keys=True) for trial in search.trials}))
        picks.append(dict(pick.params))
    values = [one.values for one in curves.trained.values()]
    top = float(np.nanmax(np.concatenate(values)))
    return Outcome(seed, np.array(scores), trials, picks, len(values), sum(map(len, values)), top)


def differences(scores_RS: Floats) -> Iterator[str]:
    """Lines of Markdown: each row's paired difference to the first."""
    for row, scores_S in zip(ROWS[1:], scores_RS[1:], strict=True):
        difference_S = scores_S - scores_RS[0]
        better, worse = int((difference_S > 0).sum()), int((difference_S < 0).sum())
        yield (
            f"| {row.name} | {difference_S.mean():+.4f} ± {standard_error(difference_S):.4f} | "
            f"{better}, {len(difference_S) - better - worse}, {worse} |"
        )


def main() -> None:
    """Prints the tables of bench/strategies.py, and each search to stderr as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--searches", type=int, default=8, help="seeds, each a split of its own")
    parser.add_argument("--budget", type=int, default=6, help="full trainings, the baseline's included")
    parser.add_argument("--workers", type=int, default=2, help="virtual ones")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    jobs = [(options.data, seed, options.budget, options.workers) for seed in range(options.searches)]
    found = []
    with multiprocessing.Pool(options.processes) as pool:
        for one in pool.imap_unordered(outcome, jobs):
            found.append(one)
            print(f"{time.perf_counter() - began:.0f} s: {one}", file=sys.stderr, flush=True)
    found.sort(key=lambda one: one.seed)
    scores_RSC = np.array([one.scores_RC for one in found]).swapaxes(0, 1)
    print(
        f"`python -m bench.strategies_real {' '.join(sys.argv[1:])}`: {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    columns = [f"validation Dice, {options.budget} trainings", "test Dice of the pick"]
    print("\n".join(table(ROWS, columns, scores_RSC)))
    print("\n| strategy | test Dice minus the default's | searches better, equal, worse |\n| --- | --- | --- |")
    print("\n".join(differences(scores_RSC[..., 1])))
    print("\n| strategy | trials a search | picks the baseline |\n| --- | --- | --- |")
    for number, row in enumerate(ROWS):
        trials = np.mean([one.trials_R[number] for one in found])
        baselines = sum(one.picks_R[number] == SPACE.baseline_params() for one in found)
        print(f"| {row.name} | {trials:.1f} | {baselines} of {len(found)} |")
    print(
        f"\n{len(found)} searches a cell; {sum(one.trainings for one in found)} configurations, "
        f"{sum(one.epochs for one in found)} epochs trained in all; {time.perf_counter() - began:.0f} s in "
        f"{options.processes} processes. The best of these: {np.mean([one.top for one in found]):.3f}"
    )


if __name__ == "__main__":
    main()
