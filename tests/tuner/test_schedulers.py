"""Which trials are stopped, from curves alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.schedulers import compares, is_cut, rungs, stops
from tuner.space import Scheduler

ASHA = Scheduler(name="asha", min_epochs=2, reduction=3)
HYPERBAND = Scheduler(name="hyperband", min_epochs=1, reduction=3)
MEDIAN = Scheduler(name="median", min_epochs=2)


def test_rungs_are_epochs_before_the_last() -> None:
    assert rungs(ASHA, 50) == [2, 6, 18]
    assert rungs(ASHA, 18) == [2, 6]
    assert rungs(ASHA, 2) == []
    assert rungs(Scheduler(), 50) == rungs(MEDIAN, 50) == []


def test_hyperband_deals_trials_to_brackets_that_begin_later() -> None:
    dealt = [tuple(rungs(HYPERBAND, 20, number)) for number in range(7)]
    assert sorted(dealt) == [(1, 3, 9)] * 4 + [(3, 9)] * 2 + [(9,)]
    assert dealt == [tuple(rungs(HYPERBAND, 20, number)) for number in range(7, 14)]


@pytest.mark.parametrize(
    ("value", "others", "cut"),
    [
        (0.1, [], False),
        (0.1, [0.2], True),
        (0.3, [0.2], False),
        (0.2, [0.2], False),
        (0.5, [0.6, 0.1, 0.2, 0.3, 0.4], False),
        (0.4, [0.6, 0.5, 0.1, 0.2, 0.3], True),
    ],
)
def test_a_rung_keeps_its_best_third(value: float, others: list[float], cut: bool) -> None:
    assert is_cut(value, others, reduction=3) is cut


def test_only_those_that_reached_the_rung_are_compared() -> None:
    curves = {0: {1: 0.9}, 1: {1: 0.5, 2: 0.5}, 2: {1: 0.1, 2: 0.2}}
    assert stops(ASHA, 50, 2, 0, curves) == "not among the best at epoch 2"
    assert stops(ASHA, 50, 1, 0, curves) is None
    assert stops(ASHA, 50, 0, 0, curves) is None


def test_brackets_compare_among_themselves() -> None:
    skips_one = next(n for n in range(7) if rungs(HYPERBAND, 20, n) == [3, 9])
    first = [n for n in range(14) if rungs(HYPERBAND, 20, n) == [1, 3, 9]]
    curves = {n: {1: 0.9, 2: 0.9, 3: 0.9} for n in first} | {skips_one: {1: 0.1, 2: 0.1, 3: 0.1}}
    assert stops(HYPERBAND, 20, skips_one, 0, curves) is None
    assert stops(HYPERBAND, 20, first[0], 0, curves | {first[0]: {1: 0.1}}) == "not among the best at epoch 1"


def test_a_rung_that_was_passed_in_a_lost_moment_is_compared_after_all() -> None:
    curves = {1: {1: 0.5, 2: 0.5, 3: 0.5}, 2: {1: 0.1, 2: 0.2, 3: 0.9}}
    assert stops(ASHA, 50, 2, 0, curves) == "not among the best at epoch 2"
    assert stops(ASHA, 50, 2, 2, curves) is None


def test_the_median_rule() -> None:
    others = {n: {1: 0.4, 2: 0.6, 3: 0.8} for n in range(3)}
    assert stops(MEDIAN, 50, 9, 0, others | {9: {1: 0.45}}) is None  # too early
    assert stops(MEDIAN, 50, 9, 0, others | {9: {1: 0.45, 2: 0.3}}) is not None  # its best, 0.45, against means of 0.5
    assert stops(MEDIAN, 50, 9, 0, others | {9: {1: 0.55, 2: 0.3}}) is None
    two = {n: curve for n, curve in others.items() if n < 2}
    assert stops(MEDIAN, 50, 9, 0, two | {9: {1: 0.1, 2: 0.1}}) is None  # too few to compare with


@given(
    st.sampled_from([ASHA, HYPERBAND, MEDIAN, Scheduler()]),
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), min_size=1, max_size=12),
)
def test_the_best_at_every_epoch_is_never_stopped(scheduler, values) -> None:
    curves = {n: dict(enumerate(row, start=1)) for n, row in enumerate(values)}
    longest = max(map(len, values))
    curves[99] = dict.fromkeys(range(1, longest + 1), 1.0)
    for reached in range(1, longest + 1):
        seen = curves | {99: dict.fromkeys(range(1, reached + 1), 1.0)}
        assert stops(scheduler, 20, 99, 0, seen) is None
        if not compares(scheduler, 20, 99, 0, reached):
            assert stops(scheduler, 20, 99, 0, curves | {99: {reached: 0.0}}) is None
