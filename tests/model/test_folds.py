"""How a pool is dealt into folds."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import folds, layouts, splits
from model.config import CrossValidation
from model.sample import Supervision
from tests.model.test_splits import HERE, many, sample


def of(rows: list[tuple[int, bool, bool]]) -> list:
    """A pool of (group, positive, without a mask)."""
    return [
        sample(
            f"{n:03}", positive, f"g{group}",
            supervision=Supervision.IMAGE if positive and hidden else Supervision.PIXEL,
        )
        for n, (group, positive, hidden) in enumerate(rows)
    ]  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.sampled_from([False] * 9 + [True])), min_size=30),
    st.integers(2, 6),
    st.integers(0, 9),
    st.booleans(),
)
def test_every_image_that_can_be_judged_is_held_out_once(rows, count, seed, nested) -> None:
    samples = of(rows)
    wanted = CrossValidation(folds=max(count, 3) if nested else count, nested=nested)
    try:
        found = folds.deal(samples, wanted, seed)
    except ValueError:
        return  # too few groups of a kind: see below
    hidden = {s.group for s in samples if s.supervision is Supervision.IMAGE}
    held = sorted(row for fold in found for row in fold.validation)
    assert held == [n for n, s in enumerate(samples) if s.group not in hidden]
    for n, fold in enumerate(found):
        sides = [{samples[row].group for row in part} for part in fold]
        assert not any(a & b for a, b in ((sides[0], sides[1]), (sides[0], sides[2]), (sides[1], sides[2])))
        assert sorted([*fold.train, *fold.validation, *fold.outer]) == list(range(len(samples)))
        assert fold.outer == (found[n - 1].validation if nested else [])
        for part in (fold.train, fold.validation, *([fold.outer] if nested else [])):
            kinds = {samples[row].positive for row in part}
            assert kinds == {s.positive for s in samples} or not any(s.positive for s in samples)


@given(st.integers(2, 20), st.integers(0, 9), st.data())
def test_enough_groups_of_each_kind_are_always_dealt(count, seed, data) -> None:
    """Groups of one kind of image each, as many of a kind as there are folds, of whatever sizes."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2 * count, max_size=3 * count))
    rows = [(group, group < count, False) for group, size in enumerate(sizes) for _ in range(size)]
    samples = of(rows)
    for rows_of_fold in folds.held_out(samples, count, seed):
        assert {samples[row].positive for row in rows_of_fold} == {True, False}


@pytest.mark.parametrize("count", [2, 5, 7])
def test_both_kinds_are_spread_evenly(count) -> None:
    rng = np.random.default_rng(0)
    samples = of([(n // 3, bool(rng.random() < 0.6), False) for n in range(300)])
    held = folds.held_out(samples, count, 3)
    for kind in (True, False):
        found = [sum(samples[row].positive is kind for row in rows) for rows in held]
        assert max(found) - min(found) <= 3


def test_a_seed_is_a_deal() -> None:
    assert folds.held_out(many(), 5, 1) == folds.held_out(many(), 5, 1)
    assert folds.held_out(many(), 5, 1) != folds.held_out(many(), 5, 2)


def test_one_file_under_two_groups_is_on_one_side() -> None:
    samples = many(60)
    samples[7] = dataclasses.replace(samples[7], digest="same")
    samples[40] = dataclasses.replace(samples[40], digest="same")
    for seed in range(5):
        assert any({7, 40} <= set(rows) for rows in folds.held_out(samples, 5, seed))


def test_what_cannot_be_dealt_is_refused() -> None:
    few = of([(n % 4, True, False) for n in range(20)])
    with pytest.raises(ValueError, match=r"5 folds need at least as many groups with positive images.*found 4.*lower"):
        folds.held_out(few, 5, 0)
    negatives = of([(n, n > 2, False) for n in range(20)])
    with pytest.raises(ValueError, match=r"5 folds need at least as many groups with negative images.*found 3"):
        folds.held_out(negatives, 5, 0)
    unmasked = of([(n, True, n > 3) for n in range(20)])
    with pytest.raises(ValueError, match=r"found 4; a group with an image that has no mask is always trained on"):
        folds.held_out(unmasked, 5, 0)


def test_the_pool_is_training_and_validation() -> None:
    found = splits.assign(many(), HERE, 0.2, 0.2, 1)
    pool = folds.pool(found)
    assert [s.name for s in pool] == sorted(s.name for s in found.train + found.validation)
    assert folds.splits_of_each(found, None, 0) == [found]
    each = folds.splits_of_each(found, CrossValidation(folds=4), 0)
    assert len(each) == 4
    assert all(one.test == found.test for one in each)
    assert sorted(s.name for one in each for s in one.validation) == [s.name for s in pool]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_crops_of_one_photo_are_never_on_two_sides(crackforest: Path, tmp_path: Path) -> None:
    lines = ["name,photo_group"]
    for file in sorted((crackforest / "images").iterdir()):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            pixels = cv2.imread(str(next((crackforest / kind).glob(f"{file.stem}.*"))))
            for n in range(6):  # of 160 x 160 px
                y, x = n // 3 * 160, n % 3 * 160
                cv2.imwrite(str(tmp_path / kind / f"{file.stem}-{n}.png"), pixels[y : y + 160, x : x + 160])
        lines += [f"{file.stem}-{n},{file.stem}" for n in range(6)]
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    found = splits.assign(layouts.read(tmp_path), tmp_path, 0.2, 0.2, 0)
    pool = folds.pool(found)
    assert len({s.group for s in pool}) * 6 == len(pool) > 500
    for nested in (False, True):
        for seed in range(10):
            for fold in folds.deal(pool, CrossValidation(folds=5, nested=nested), seed):
                train, chooses, outer = ({pool[row].name.split("-")[0] for row in part} for part in fold)
                assert chooses
                assert not train & chooses
                assert not (train | chooses) & outer
