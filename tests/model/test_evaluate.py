"""A pass over a split: however it is counted and however often it is asked, the answers are the same."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from model import evaluate, layouts, synthetic, train
from model.config import Judgement, RunConfig
from model.data import Cache, open_cache
from model.evaluate import Scores, score

CPU = torch.device("cpu")
CONFIG = RunConfig(width=0.1, input_height=64, input_width=128, precision="float32")
FACTORS = (1, 7, 10)
JUDGEMENTS = [
    Judgement(*rule, blacken, lower, best_by)
    for rule, blacken, lower, best_by in itertools.product(
        [("min_of_max", 1), ("grid", 1), *(("pr_curve", factor) for factor in FACTORS)],
        [False, True],
        [1.0, 0.9],
        ["objective", "decision"],
    )
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder: Path = tmp_path_factory.mktemp("evaluate")
    synthetic.write(folder / "set", count=19, height=64, width=128)
    return open_cache(layouts.read(folder / "set"), 64, 128, folder / "cache")


@pytest.fixture(scope="module")
def network(cache: Cache) -> torch.nn.Module:
    training = train.start(dataclasses.replace(CONFIG, epochs=1, learning_rate=0.5), CPU)
    train.train_epoch(training, cache)
    return training.network


@pytest.fixture(scope="module")
def scores(cache: Cache, network) -> Scores:
    return score(network, cache, CONFIG, CPU, FACTORS)


def test_a_device_counts_a_split_as_a_processor_does(cache: Cache, network, scores: Scores, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "_count_images", evaluate._count_batch)
    batched = score(network, cache, CONFIG, CPU, FACTORS)
    for ours, theirs in zip(
        [scores.counts, *scores.strided.values()], [batched.counts, *batched.strided.values()], strict=True
    ):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.offsets, theirs.offsets)
    assert scores.strided.keys() == batched.strided.keys() == {7, 10}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_and_a_processor_score_alike(cache: Cache, network, scores: Scores) -> None:
    """Within rounding: the maps are not the same to the bit. Batches come in their order."""
    device = torch.device("cuda", 0)
    there = score(network.to(device), cache, CONFIG, device, FACTORS)
    network.to(CPU)
    np.testing.assert_allclose(there.decision_logits, scores.decision_logits, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(there.counts.at(0.0).predicted, scores.counts.at(0.0).predicted, atol=20)
    np.testing.assert_array_equal(there.counts.truth(), scores.counts.truth())


def test_what_is_asked_together_and_again_is_what_each_would_be_alone(scores: Scores) -> None:
    found = [scores.choose(judgement) for judgement in JUDGEMENTS]
    figures = scores.figures(found)
    assert scores.figures(found[:3]) == figures[:3]
    for judgement, thresholds, row in zip(JUDGEMENTS, found, figures, strict=True):
        alone = dataclasses.replace(scores)  # has not kept its answers
        assert alone.choose(judgement) == thresholds
        assert alone.figures([thresholds]) == [row]
    figures[0]["dice_mean"] = None  # an answer is the asker's own
    assert scores.figures(found[:1])[0]["dice_mean"] is not None


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("part", ["decision.linear", "segment.norm"])
def test_a_network_that_returns_no_numbers_is_refused(cache: Cache, device: str, part: str) -> None:
    broken = train.start(CONFIG, torch.device(device)).network
    with torch.no_grad():
        next(broken.get_submodule(part).parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the network returned a number that is not finite"):
        score(broken, cache, CONFIG, torch.device(device), FACTORS)
