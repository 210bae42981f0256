"""Count tables against the plain definition, with numpy and with torch, at saturated scores, ties and empty masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from model import counts, metrics, thresholds
from model.batch_counts import tally_batch, tally_every
from model.counts import CountsBuilder, PixelCounts
from tests.tables import count

TRUTHS = hnp.arrays(np.bool_, (2, 5, 6))
HALVES = st.sampled_from([-65504.0, -11.0, -1.0, -6e-8, -0.0, 0.0, 6e-8, 0.5, 10.99, 11.0, 65504.0])
LOGITS = hnp.arrays(np.float32, (2, 5, 6), elements=HALVES | st.floats(-20, 20, width=32))
THRESHOLDS = st.floats(-25, 25) | HALVES | st.sampled_from([-np.inf, np.inf, 65520.0, -1e-9, 1e-9])
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CROSS = np.array([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]], bool)


@given(TRUTHS, LOGITS, st.lists(THRESHOLDS, min_size=1, max_size=4))
def test_tables_select_what_masks_select(truth, logits, limits) -> None:
    selected = count(truth, logits).at(limits)
    scores = np.clip(logits, -65504, 65504).astype(np.float16).astype(float)
    for n in range(2):
        grown = ndimage.binary_dilation(truth[n], CROSS)
        for k, threshold in enumerate(limits):
            mask = scores[n] >= threshold
            assert selected.predicted[n, k] == mask.sum()
            assert selected.hits[n, k] == (mask & truth[n]).sum()
            assert selected.grown_hits[n, k] == (mask & grown).sum()
            assert selected.found[n, k] == (ndimage.binary_dilation(mask, CROSS) & truth[n]).sum()
        assert (selected.truth[n, 0], selected.pixels[n, 0]) == (truth[n].sum(), 30)


@pytest.mark.parametrize("device", DEVICES)
@given(TRUTHS, LOGITS, st.integers(0, 3))
def test_torch_and_numpy_count_alike(device, truth, logits, tolerance) -> None:
    for n in range(2):
        mask = truth[n].astype(np.uint8)
        ours = counts.tally(np, counts.to_half(logits[n]), mask, tolerance)
        there = torch.from_numpy(logits[n]).to(device), torch.from_numpy(mask).to(device)
        theirs = counts.tally(torch, counts.to_half(there[0]), there[1], tolerance)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b.cpu().numpy())


@pytest.mark.parametrize("device", DEVICES)
@given(TRUTHS, LOGITS, st.integers(0, 3), st.integers(2, 40), st.integers(0, 5))
def test_a_batch_is_counted_as_its_images_are(device, truth, logits, tolerance, factor, first_row) -> None:
    """The bytes themselves, of all pixels and of every n-th one of a split in which the batch begins at some row."""
    masks, halves = truth.astype(np.uint8), counts.to_half(logits)
    there = torch.from_numpy(halves).to(device), torch.from_numpy(masks).to(device)
    whole, strided, theirs = CountsBuilder(), CountsBuilder(), CountsBuilder()
    theirs_strided = CountsBuilder()
    for row, (half_HW, mask_HW) in enumerate(zip(halves, masks, strict=True), start=first_row):
        whole.add(counts.tally(np, half_HW, mask_HW, tolerance))
        every = slice(-row * mask_HW.size % factor, None, factor)
        strided.add(counts.tally(np, half_HW.ravel()[None, every], mask_HW.ravel()[None, every], tolerance=0))
    theirs.extend(*tally_batch(*there, tolerance).on_host())
    theirs_strided.extend(*tally_every(*there, factor, first_row).on_host())
    for ours, other in ((whole.build(), theirs.build()), (strided.build(), theirs_strided.build())):
        np.testing.assert_array_equal(ours.rows, other.rows)
        np.testing.assert_array_equal(ours.offsets, other.offsets)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_may_hold_every_code(device) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.stack([np.where(np.isfinite(every), every, 0), np.zeros(1 << 16)]).astype(np.float16)
    halves, masks = halves.reshape(2, 256, 256), np.eye(256, dtype=np.uint8)[None].repeat(2, axis=0)
    ours, theirs = CountsBuilder(), CountsBuilder()
    for half_HW, mask_HW in zip(halves, masks, strict=True):
        ours.add(counts.tally(np, half_HW, mask_HW))
    theirs.extend(*tally_batch(torch.from_numpy(halves).to(device), torch.from_numpy(masks).to(device)).on_host())
    np.testing.assert_array_equal(ours.build().rows, theirs.build().rows)


def _at_image_by_image(tables: PixelCounts, limits: list[float]) -> list[np.ndarray]:
    """What thresholds select, an image at a time from its rows."""
    each: list[list[list[int]]] = []
    for n in range(len(tables)):
        rows = tables.of(n)
        kinds = [[int(rows[kind][counts.scores_of(rows["code"]) >= limit].sum()) for limit in limits]
                 for kind in ("background", "margin", "truth", "reached")]  # fmt: skip
        each.append(kinds)
    background, margin, truth, reached = np.array(each).transpose(1, 0, 2)
    return [background + margin + truth, truth, margin + truth, reached]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(THRESHOLDS, min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from([1, 5, 10_000]),
)
def test_however_many_rows_are_summed_at_a_time_the_sums_are_those_of_each_image(lengths, limits, seed, chunk) -> None:
    rng = np.random.default_rng(seed)
    rows = np.zeros(sum(lengths), counts.ROW)
    offsets = np.cumsum([0, *lengths])
    for name in ("background", "margin", "truth", "reached"):
        rows[name] = rng.integers(0, 3, len(rows)) * rng.integers(0, 1 << 20, len(rows))
    for first, last in itertools.pairwise(offsets):
        levels = counts.codes(np, counts.to_half(rng.normal(0, 8, 100)))
        rows["code"][first:last] = np.sort(rng.choice(np.unique(levels), last - first, replace=False))
    tables, kept = PixelCounts(rows, offsets), rng.random(len(lengths)) > 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_ROWS_AT_ONCE", chunk)
        selected, points = tables.at(limits), tables.pixel_curve(kept)
        truth = tables.truth()
    for ours, theirs in zip(selected.tables, _at_image_by_image(tables, limits), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(truth, [tables.of(n)["truth"].sum() for n in range(len(tables))])
    scores = np.where(np.repeat(kept, lengths), counts.scores_of(rows["code"]), -np.inf)
    assert points.thresholds.tolist() == sorted(set(scores[rows_hold_pixels(rows)].tolist()), reverse=True)
    for k, threshold in enumerate(points.thresholds):
        assert points.true_positives[k] == rows["truth"][scores >= threshold].sum()


def rows_hold_pixels(rows: np.ndarray) -> np.ndarray:
    return rows["background"] + rows["margin"] + rows["truth"] > 0


def test_codes_keep_the_order_of_all_numbers() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.unique(every[np.isfinite(every)].astype(float)).astype(np.float16)
    found = counts.codes(np, finite)
    assert (np.diff(found.astype(int)) >= 1).all()
    np.testing.assert_array_equal(counts.scores_of(found), finite.astype(float))
    assert counts.codes(np, np.array([-0.0], np.float16)) == counts.codes(np, np.array([0.0], np.float16)) == 0


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_one_rounding_for_numpy_and_torch(logits) -> None:
    ours = counts.to_half(logits)
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours, counts.to_half(torch.from_numpy(logits)).numpy())


@given(
    TRUTHS, hnp.arrays(np.float64, (2, 5, 6), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])),
    hnp.arrays(np.float64, 4, elements=st.sampled_from([-1.0, 0.0, 0.1, 0.25, 0.3, 1.0, 2.0])),
    st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 2),
)  # fmt: skip
def test_selecting_without_tables_is_the_same(truth, scores, limits, dtype, tolerance) -> None:
    """Half precision by lookup, everything else by search; thresholds in any order, equal ones too."""
    scores = scores.astype(dtype)
    selected = counts.select(truth, scores, limits, tolerance)
    cross = CROSS[2 - tolerance : 3 + tolerance, 2 - tolerance : 3 + tolerance]
    for n in range(2):
        for k, threshold in enumerate(limits):
            mask = scores[n].astype(float) >= threshold
            assert selected.predicted[n, k] == mask.sum()
            assert selected.hits[n, k] == (mask & truth[n]).sum()
            assert selected.grown_hits[n, k] == (mask & ndimage.binary_dilation(truth[n], cross)).sum()
            assert selected.found[n, k] == (ndimage.binary_dilation(mask, cross) & truth[n]).sum()


def test_half_precision_cannot_hold_every_probability_and_the_search_can() -> None:
    scores = np.array([[[0.123456789, 0.123456780]]])
    assert np.unique(scores.astype(np.float16)).size == 1
    assert counts.select(np.ones((1, 1, 2)), scores, np.array([0.123456785]), 0).predicted == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_nan_is_refused(dtype, nan) -> None:
    scores = np.zeros((1, 3, 3), dtype)
    scores[0, 1, 1] = np.copysign(nan, nan)
    for function in (thresholds.sweep, metrics.two_pixel):
        with pytest.raises(ValueError, match="scores must be numbers, found NaN"):
            function(np.ones((1, 3, 3)), scores, np.array([0.5]))
    for function in (thresholds.pr_curve, thresholds.min_of_max):
        with pytest.raises(ValueError, match="scores must be numbers, found NaN"):
            function(np.ones((1, 3, 3)), scores)


def test_infinities_are_numbers() -> None:
    for dtype in (np.float16, np.float32):
        scores = np.array([[[-np.inf, 0.0, np.inf]]], dtype)
        assert counts.select(np.ones((1, 1, 3)), scores, np.array([-np.inf, 0.0, 1.0]), 0).predicted.tolist() == [
            [3, 2, 1]
        ]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
def test_any_truth_but_nought_is_one(dtype) -> None:
    truth = np.array([[[0, 1]]], dtype)
    for soft in (truth, truth * np.array(0.25, np.float32), truth.astype(np.int64) * 256):
        assert counts.select(soft, np.ones((1, 1, 2)), np.array([0.5]), 0).hits == 1
        assert thresholds.min_of_max(soft, np.ones((1, 1, 2))) == 1
        assert thresholds.pr_curve(soft, np.array([[[0.0, 1.0]]]))[0] == 1


def test_more_thresholds_than_codes_are_refused() -> None:
    many = np.linspace(0, 1, 40_000)
    with pytest.raises(ValueError, match="at most 32,766 thresholds can be tried at a time, found 40,000; pass them"):
        counts.select(np.ones((1, 2, 2)), np.ones((1, 2, 2)), many, 0)
    assert counts.select(np.ones((1, 2, 2)), np.ones((1, 2, 2)), many[:32_766], 0).hits.min() == 4
    assert counts.select(np.ones((1, 2, 2)), np.ones((1, 2, 2), np.float16), many, 0).hits.min() == 4


@given(TRUTHS, LOGITS, hnp.arrays(np.bool_, 2))
def test_the_curve_holds_all_pixels_and_hides_those_that_are_not_kept(truth, logits, kept) -> None:
    points = count(truth, logits).pixel_curve(kept)
    scores = np.where(kept[:, None, None], counts.to_half(logits).astype(float), -np.inf)
    assert points.thresholds.tolist() == sorted(set(scores.ravel().tolist()), reverse=True)
    for k, threshold in enumerate(points.thresholds):
        assert points.true_positives[k] == ((scores >= threshold) & truth).sum()
        assert points.false_positives[k] == ((scores >= threshold) & ~truth).sum()


@given(TRUTHS, LOGITS, hnp.arrays(np.bool_, 2), st.sampled_from([[0, 1], [1, 0], [0, 0]]))
def test_curves_without_a_group_are_those_of_the_others(truth, logits, kept, groups) -> None:
    groups = np.array(groups)
    without = count(truth, logits).curves_without(kept, groups)
    for group, points in zip(np.unique(groups), without, strict=True):
        rest = groups != group
        if rest.any():
            alone = count(truth[rest], logits[rest]).pixel_curve(kept[rest])
            for a, b in zip(points, alone, strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            assert len(points.thresholds) == 0


def test_tables_survive_a_file(tmp_path) -> None:
    found = count(np.eye(4)[None], np.arange(16.0).reshape(1, 4, 4))
    np.savez(tmp_path / "counts.npz", **found.arrays())
    with np.load(tmp_path / "counts.npz", allow_pickle=False) as arrays:
        again = PixelCounts.from_arrays(arrays)
    np.testing.assert_array_equal(again.rows, found.rows)
    np.testing.assert_array_equal(again.at([3.0, 8.0]).hits, found.at([3.0, 8.0]).hits)


def test_a_builder_can_be_read_and_goes_on() -> None:
    builder = CountsBuilder()
    image = counts.tally(np, np.zeros((2, 2), np.float16), np.zeros((2, 2), np.uint8))
    for n in range(1, 4):
        builder.add(image)
        assert len(builder.build()) == n
        assert builder.build().at(0.0).predicted.tolist() == [[4]] * n


def test_growing_by_two_pixels_uses_a_cross() -> None:
    point = np.zeros((7, 7), np.uint8)
    point[3, 3] = 1
    np.testing.assert_array_equal(counts.spread(np, point, 2)[1:6, 1:6], CROSS)


@pytest.mark.parametrize(
    ("truth", "mask", "dice", "two_pixel", "tolerant"),
    [
        ([[0, 0]], [[0, 0]], 1.0, 0.0, 1.0),
        ([[1, 1]], [[0, 0]], 0.0, 0.0, 0.0),
        ([[0, 0]], [[1, 0]], 0.0, 0.0, 0.0),
        ([[1, 0]], [[1, 0]], 1.0, 1.0, 1.0),
        ([[1, 0]], [[0, 1]], 0.0, 2 / 3, 1.0),
        ([[1, 0, 0, 0]], [[0, 0, 0, 1]], 0.0, 0.0, 0.0),
    ],
    ids=["both empty", "missed", "false alarm", "perfect", "one pixel off", "three pixels off"],
)
def test_degenerate_images(truth, mask, dice, two_pixel, tolerant) -> None:
    selected = count(np.array([truth]), np.array([mask], float)).at(0.5)
    assert selected.dice()[0, 0] == pytest.approx(dice)
    assert selected.two_pixel()[2][0, 0] == pytest.approx(two_pixel)
    assert selected.tolerant()[2][0, 0] == pytest.approx(tolerant)
