import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model import metrics


@given(
    hnp.arrays(np.bool_, (2, 5, 6)),
    hnp.arrays(np.float16, (2, 5, 6), elements=st.floats(-20, 20, width=16)),
    st.floats(-20, 20),
)
def test_tables_count_what_masks_count(truth, scores, threshold) -> None:
    counts = metrics.count(truth, scores)
    selected = counts.at(threshold)
    masks = scores.astype(float) >= threshold
    for n in range(2):
        assert selected.predicted[n, 0] == masks[n].sum()
        assert selected.hits[n, 0] == (masks[n] & truth[n]).sum()
        assert selected.grown_hits[n, 0] == (masks[n] & metrics.grow(truth[n], 2)).sum()
    pooled = counts.pooled().at(threshold)
    assert pooled.hits[0, 0] == (masks & truth).sum()
    exact = metrics.count(truth, scores.astype(np.float32))
    for name, column in counts.arrays().items():
        np.testing.assert_array_equal(column, exact.arrays()[name])


def test_tables_survive_a_file(tmp_path) -> None:
    counts = metrics.count(np.eye(4)[None], np.arange(16.0).reshape(1, 4, 4))
    np.savez(tmp_path / "counts.npz", **counts.arrays())
    with np.load(tmp_path / "counts.npz", allow_pickle=False) as arrays:
        again = metrics.PixelCounts.from_arrays(arrays)
    np.testing.assert_array_equal(again.at([3.0, 8.0]).hits, counts.at([3.0, 8.0]).hits)


@pytest.mark.parametrize(
    ("truth", "mask", "dice", "f1"),
    [
        ([[0, 0]], [[0, 0]], 1.0, 0.0),
        ([[1, 1]], [[0, 0]], 0.0, 0.0),
        ([[0, 0]], [[1, 0]], 0.0, 0.0),
        ([[1, 0]], [[1, 0]], 1.0, 1.0),
        ([[1, 0]], [[0, 1]], 0.0, 2 / 3),
    ],
    ids=["both empty", "missed", "false alarm", "perfect", "one pixel off"],
)
def test_degenerate_images(truth, mask, dice, f1) -> None:
    selected = metrics.count(np.array([truth]), np.array([mask], float)).at(0.5)
    assert selected.dice()[0, 0] == pytest.approx(dice)
    assert selected.two_pixel()[2][0, 0] == pytest.approx(f1)


def test_growing_by_two_pixels_uses_a_cross() -> None:
    point = np.zeros((7, 7))
    point[3, 3] = 1
    assert metrics.grow(point, 2).sum() == 9


def test_bootstrap_draws_groups_not_images() -> None:
    values = np.repeat([0.0, 1.0], 50)
    by_image = metrics.bootstrap(lambda rows: values[rows].mean(), np.arange(100))
    by_group = metrics.bootstrap(lambda rows: values[rows].mean(), np.repeat([0, 1], 50))
    assert by_group.tolist() == [0.0, 1.0]
    assert 0.35 < by_image[0] < 0.45 < 0.55 < by_image[1] < 0.65
