import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import layouts, splits
from model.layouts import DataError
from model.sample import Sample, Supervision

HERE = Path("data")


def sample(name: str, positive: bool = True, group: str | None = None, **more) -> Sample:
    values = {
        "name": name, "image": Path(name), "mask": Path(name), "positive": positive, "group": group or name,
        "supervision": Supervision.PIXEL, "digest": name, "mask_digest": name,
    }  # fmt: skip
    return Sample(**(values | more))


def many(count: int = 60, **more) -> list[Sample]:
    return [sample(f"{n:03}", positive=n % 3 > 0, **more) for n in range(count)]


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=40, max_size=80), st.integers(0, 9))
def test_groups_stay_together_and_nothing_is_lost(rows, seed) -> None:
    samples = [sample(f"{n:03}", positive, f"g{group}") for n, (group, positive) in enumerate(rows)]
    try:
        found = splits.assign(samples, HERE, 0.2, 0.2, seed)
    except DataError:
        return  # too few groups for both classes on each side
    assert sorted(s.name for split in found for s in split) == [s.name for s in samples]
    sides = [{s.group for s in split} for split in found]
    assert len(set.union(*sides)) == sum(len(side) for side in sides)


def test_shares_hold_for_both_classes() -> None:
    found = splits.assign(many(300), HERE, 0.2, 0.1, 0)
    assert [splits.counts(split)["positive"] for split in found] == [140, 40, 20]
    assert [splits.counts(split)["negative"] for split in found] == [70, 20, 10]


def test_a_seed_is_a_split() -> None:
    assert splits.assign(many(), HERE, 0.2, 0.2, 1) == splits.assign(many()[::-1], HERE, 0.2, 0.2, 1)
    assert splits.assign(many(), HERE, 0.2, 0.2, 1) != splits.assign(many(), HERE, 0.2, 0.2, 2)


def test_images_without_a_mask_are_for_training() -> None:
    hidden = [sample(f"h{n}", mask=None, supervision=Supervision.IMAGE) for n in range(20)]
    found = splits.assign(many() + hidden, HERE, 0.2, 0.2, 0)
    assert {s.name for s in hidden} <= {s.name for s in found.train}


def test_a_split_that_lacks_a_class_is_refused() -> None:
    fixed = [dataclasses.replace(s, split="train" if not s.positive else "validation") for s in many()]
    with pytest.raises(DataError, match=r"the train split needs positive images.*found none among 20"):
        splits.assign(fixed, HERE, 0.2, 0.2, 0)
    with pytest.raises(DataError, match=r"the validation split needs negative images"):
        splits.assign(fixed, HERE, 0.2, 0.2, 0)


def test_a_set_without_negatives_needs_none() -> None:
    found = splits.assign([s for s in many() if s.positive], HERE, 0.2, 0.2, 0)
    assert not found.has_negatives


def test_leaks_between_given_splits_are_refused() -> None:
    sides = ["train", "validation", "test"]
    fixed = [dataclasses.replace(s, split=sides[n // 3 % 3]) for n, s in enumerate(many())]
    splits.assign(fixed, HERE, 0.2, 0.2, 0)
    one_group = [dataclasses.replace(s, group="all") if n in (0, 3) else s for n, s in enumerate(fixed)]
    with pytest.raises(
        DataError, match=r"one group must not lie in two splits, found '000' in train and '003' in validation"
    ):
        splits.assign(one_group, HERE, 0.2, 0.2, 0)
    copies = [dataclasses.replace(s, digest="same") if n in (0, 6) else s for n, s in enumerate(fixed)]
    with pytest.raises(DataError, match=r"one image file must not lie in two splits"):
        splits.assign(copies, HERE, 0.2, 0.2, 0)
    with pytest.raises(DataError, match=r"a split for all images or none, found 59"):
        splits.assign([many()[0], *fixed[1:]], HERE, 0.2, 0.2, 0)


def test_a_test_split_that_is_given_stays_as_it_is() -> None:
    given = [dataclasses.replace(s, split="test") if n < 12 else s for n, s in enumerate(many())]
    for seed in range(5):
        found = splits.assign(given, HERE, 0.25, 0.25, seed)
        assert found.test == given[:12]
        assert [splits.counts(split)["positive"] for split in found[:2]] == [24, 8]
        assert [splits.counts(split)["negative"] for split in found[:2]] == [12, 4]


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=40, max_size=80), st.integers(0, 9))
def test_what_is_not_given_never_comes_into_the_test_split(rows, seed) -> None:
    """Whatever the sizes of the groups, which may overfill both other sides."""
    samples = [sample(f"{n:03}", positive, f"g{group}") for n, (group, positive) in enumerate(rows)]
    test = [sample(f"t{n}", n > 0, split="test") for n in range(2)]
    try:
        found = splits.assign(samples + test, HERE, 0.3, 0.3, seed)
    except DataError:
        return  # too few groups for both classes on each side
    assert found.test == test


def test_a_split_for_some_is_for_the_test_images_alone() -> None:
    mixed = [dataclasses.replace(s, split=("test", "train", None)[n % 3]) for n, s in enumerate(many())]
    with pytest.raises(
        DataError, match=r"for all images or none, found 40 of 60; .* or say test in it and nothing else"
    ):
        splits.assign(mixed, HERE, 0.2, 0.2, 0)


def test_leaks_into_a_given_split_can_be_left_out() -> None:
    given = [dataclasses.replace(s, split="test") if n < 12 else s for n, s in enumerate(many())]
    given[20] = dataclasses.replace(given[20], group="000")  # a crop of a test photo
    given[30] = dataclasses.replace(given[30], digest="001")  # a copy of a test file
    with pytest.raises(
        DataError, match=r"where the splits are given, leave one side out: tuner data convert --drop-leaks"
    ):
        splits.assign(given, HERE, 0.25, 0.25, 0)
    kept = splits.without_leaks(given)
    assert [s.name for s in given if s not in kept] == ["020", "030"]
    assert splits.assign(kept, HERE, 0.25, 0.25, 0).test == given[:12]
    assert splits.without_leaks(many()) == many()


def test_fewer_masks_are_a_part_of_more() -> None:
    train = many()
    kept = [
        {s.name for s in splits.keep_masks(train, n) if s.positive and s.supervision is Supervision.PIXEL}
        for n in (0, 5, 17, 40)
    ]
    assert [len(names) for names in kept] == [0, 5, 17, 40]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert splits.keep_masks(train, "all") == train
    assert splits.counts(splits.keep_masks(train, 5))["negative"] == 20
    with pytest.raises(ValueError, match=r"num_segmented must be at most .* 40, found 41"):
        splits.keep_masks(train, 41)


def test_the_fingerprint_sees_files_labels_and_sides() -> None:
    base = splits.assign(many(), HERE, 0.2, 0.2, 0)
    moved = splits.Splits(base.train[1:], [base.train[0], *base.validation], base.test)
    altered = base._replace(test=[dataclasses.replace(base.test[0], mask_digest="new"), *base.test[1:]])
    assert len({splits.fingerprint(s) for s in (base, moved, altered)}) == 3


def test_photo_groups_of_real_crops_stay_on_one_side(crackseg448: Path) -> None:
    found = splits.assign(layouts.read(crackseg448), crackseg448, 0.2, 0.2, 0)
    sides = [{s.group for s in split} for split in found]
    assert not sides[0] & (sides[1] | sides[2])
    assert [splits.counts(split)["negative"] for split in found] == [48, 16, 16]
