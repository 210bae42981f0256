"""What masks are worth, told from records that are made from known curves."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner import masks
from tuner.masks import Training
from tuner.space import Labelling

COUNTS = (8, 16, 32, 64, 128)
TRAIN = {"positive": 300, "negative": 100, "segmented": 128}
PRICES = Labelling(minutes_per_label=0.05, minutes_per_mask=2.0)


def true_value(n: float, a: float = 0.7, b: float = 0.8, c: float = 0.6) -> float:
    return a - b * n**-c


def search(
    seed: int, value: Any = true_value, noise: float = 0.006, luck: float = 0.004, counts: Any = COUNTS, each: int = 6
) -> list[Training]:
    """Trainings of configurations that lose between nothing and much, with luck of their own and luck they share."""
    rng = np.random.default_rng(seed)
    found = []
    for n in counts:
        shared = luck * rng.standard_normal()
        for k in range(each):
            own = noise * rng.standard_normal() - 0.03 * rng.exponential()
            found.append(Training(f"{n}-{k}", n, value(n) + shared + own))
    return found


def record(number: int, kept: int | str, value: float | None, **more: Any) -> dict[str, Any]:
    return {
        "trial": f"t-{number}", "status": "completed", "value": value, "replayed_from": None,
        "config": {"num_segmented": kept},
    } | more  # fmt: skip


def records_of(found: list[Training]) -> list[dict[str, Any]]:
    return [record(n, one.masks, one.value) for n, one in enumerate(found)]


def test_a_curve_without_luck_is_found_again() -> None:
    found = [Training(f"{n}-{k}", n, true_value(n)) for n in COUNTS for k in range(3)]
    curve = masks.fit(found)
    assert curve is not None
    assert curve.tells
    assert curve.certainty > 0.999
    for n in (8, 20, 64, 128, 228):
        middle, low, high = curve.value(n)
        assert low <= true_value(n) <= high
        assert middle == pytest.approx(true_value(n), abs=0.01)
    middle, low, high = curve.gain(128, 228)
    assert 0 <= low <= true_value(228) - true_value(128) <= high < 0.03
    assert low < middle < high


@pytest.mark.timeout(120)
def test_the_interval_of_the_next_masks_holds_the_truth_as_often_as_it_says() -> None:
    """Simulated searches on three curves; seeded, so the same each time."""
    held = []
    for seed in range(20):
        for b, c, counts in ((0.8, 0.6, COUNTS), (0.5, 0.35, (10, 20, 40, 80)), (1.0, 0.3, (10, 30, 100))):
            curve = masks.fit(search(seed, lambda n, b=b, c=c: true_value(n, b=b, c=c), counts=counts))
            assert curve is not None
            most = counts[-1]
            _, low, high = curve.gain(most, 2 * most)
            held.append(low <= true_value(2 * most, b=b, c=c) - true_value(most, b=b, c=c) <= high)
    assert len(held) == 60
    assert np.mean(held) >= 0.93


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0.0, 1.0), min_size=4, max_size=6))
def test_more_masks_are_never_predicted_to_hurt(seed: int, values: list[float]) -> None:
    """Whatever was measured; and no value leaves what figures can be."""
    counts = [10 * 2**n for n in range(len(values))]
    by_count = dict(zip(counts, values, strict=True))
    curve = masks.fit(search(seed, by_count.__getitem__, counts=counts, each=3))
    assert curve is not None
    if not len(curve.top_D):
        assert not curve.tells
        return
    places = np.geomspace(counts[0], 4 * counts[-1], 9)
    medians = [curve.value(n)[0] for n in places]
    assert medians == sorted(medians)
    for start, end in itertools.pairwise(places):
        assert curve.gain(start, end)[1] >= 0
    assert curve.value(1e9)[2] <= 1


def test_a_bad_configuration_is_no_evidence() -> None:
    good = search(0)
    bad = [Training(f"bad-{one.trial}", one.masks, 0.05) for one in good if one.masks == 128]
    before, after = masks.fit(good), masks.fit(good + bad)
    assert before is not None
    assert after is not None
    # More of them are the best third; their mean lies a little lower, and nowhere near the bad ones.
    assert after.points[-1].value == pytest.approx(before.points[-1].value, abs=0.03)
    assert after.points[-1].trainings == 12
    assert after.points[:-1] == before.points[:-1]


def test_numbers_of_masks_with_few_trainings_are_put_together() -> None:
    found = [*search(0, counts=range(10, 110, 10), each=2), Training("last", 200, 0.6)]
    curve = masks.fit(found)
    assert curve is not None
    assert [point.trainings for point in curve.points] == [4, 4, 4, 4, 5]
    assert [point.told_by for point in curve.points] == [2] * 5


def test_few_points_tell_nothing_and_say_so() -> None:
    told = masks.annotation(records_of(search(0, counts=(10, 100))), TRAIN, PRICES, "validation Dice")
    assert told["sentence"] == (
        "The data do not tell what more masks would bring: a curve needs 3 numbers of masks with about 3 completed "
        "trainings each, and there are 2."
    )
    assert (told["tells"], told["points"], told["curve"], told["next"]) == (False, [], [], None)
    assert masks.annotation([], TRAIN, None, "f")["sentence"].endswith("and there are 0.")
    assert masks.annotation([record(0, 5, 0.5)], TRAIN, None, "f")["sentence"].endswith("and there is 1.")
    none = [Training(f"none-{k}", 0, 0.0) for k in range(3)]  # what is trained without masks is another method
    assert masks.fit(search(0, counts=(10, 100)) + none) is None


@pytest.mark.parametrize("slope", [0.0, -0.05], ids=["flat", "falling"])
def test_noise_tells_nothing_and_says_so(slope: float) -> None:
    found = search(3, lambda n: 0.5 + slope * np.log2(n / 8), noise=0.04, luck=0.02)
    told = masks.annotation(records_of(found), TRAIN, PRICES, "validation Dice")
    assert told["sentence"] == (
        "The data do not tell what more masks would bring: from 8 to 128 masks the validation Dice differs by no more "
        "than luck."
    )
    assert not told["tells"]
    assert len(told["points"]) == 5


@pytest.mark.parametrize(
    ("train", "expected", "said"),
    [
        ({"segmented": 128}, (100, "labelled", 200.0), "Their images are in the data set, without masks"),
        ({"segmented": 150}, (22, "masked", 44.0), "They are in the data set already"),
        ({"segmented": 128, "positive": 131}, (3, "labelled", 6.0), "Their images are in the data set, without masks"),
        ({"segmented": 128, "positive": 128}, (100, "new", 205.0), "Their images are not in the data set yet"),
    ],
)
def test_the_next_masks_are_those_that_there_are(train: dict[str, int], expected: Any, said: str) -> None:
    told = masks.annotation(records_of(search(0)), TRAIN | train, PRICES, "validation Dice")
    step = told["next"]
    assert (step["masks"], step["images"], step["minutes"]) == expected
    assert step["from"] == 128
    low, high = step["ci95"]
    assert told["sentence"].startswith(
        f"The next {step['masks']} masks ({step['minutes']:.0f} minutes) would raise the validation Dice by about "
        f"{step['gain']:.3f} (95 % interval {low:.3f} to {high:.3f}). {said}"
    )
    assert told["curve"][-1]["masks"] == pytest.approx(128 + step["masks"])
    without = masks.annotation(records_of(search(0)), TRAIN | train, None, "validation Dice")
    assert without["next"] == step | {"minutes": None}
    assert "minutes" not in without["sentence"]


def test_nothing_is_said_beyond_twice_the_curve() -> None:
    found = search(0, lambda n: 0.7 - 0.8 * n**-0.6, counts=(5, 10, 20, 40))
    told = masks.annotation(records_of(found), TRAIN, None, "validation Dice")
    assert (told["next"]["from"], told["next"]["masks"]) == (40, 40)


def test_the_same_records_tell_the_same() -> None:
    found = records_of(search(1))
    assert masks.annotation(found, TRAIN, PRICES, "f") == masks.annotation(found, TRAIN, PRICES, "f")


def test_the_best_within_a_budget() -> None:
    found = [
        record(0, "all", 0.5, num_segmented=40),
        record(1, 10, 0.4),
        record(2, 20, 0.3),
        record(3, 20, 0.45, replayed_from="t-2"),
        record(4, 30, 0.35),
        record(5, 30, 0.9, status="stopped_early"),
        record(6, 30, 0.9, violations={"recall": 0.1}),
        record(7, "all", 0.2),
        record(8, 30, None, status="failed"),
    ]
    told = masks.trainings(found, 41)
    assert [(one.trial, one.masks, one.value) for one in told] == [
        ("t-1", 10, 0.4), ("t-3", 20, 0.45), ("t-4", 30, 0.35), ("t-0", 40, 0.5), ("t-7", 41, 0.2),
    ]  # fmt: skip
    rows = masks.budgets(told)
    assert [(row["masks"], row["trainings"], row["best"]["trial"], row["within"]["trial"]) for row in rows] == [
        (10, 1, "t-1", "t-1"), (20, 1, "t-3", "t-3"), (30, 1, "t-4", "t-3"), (40, 1, "t-0", "t-0"), (41, 1, "t-7", "t-0"),
    ]  # fmt: skip
    assert [one.trial for one in masks.trainings(found)] == ["t-1", "t-3", "t-4", "t-0"]  # all may be any number
    priced = masks.annotation(found, TRAIN, PRICES, "f")["budgets"]
    assert [row["minutes"] for row in priced][:2] == [400 * 0.05 + 20, 400 * 0.05 + 40]
