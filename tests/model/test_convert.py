from pathlib import Path

import cv2
import numpy as np
import pytest

from model import convert, layouts
from model.inspection import decode_mask
from model.sample import Sample, Supervision
from tests.model.layouts import trees

TREES = [
    trees.crack_segmentation, trees.published, trees.crack500, trees.crackforest, trees.ksdd, trees.dagm,
    trees.severstal, trees.mvtec,
]  # fmt: skip


def facts(sample: Sample) -> list:
    """What a conversion keeps: all but where the files lie and how masks are stored."""
    return [
        sample.name, sample.positive, sample.supervision, sample.group, sample.source, sample.split, sample.digest,
    ]  # fmt: skip


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_a_converted_set_is_the_same_set(tree, tmp_path: Path) -> None:
    tree(tmp_path / "set")
    samples = layouts.read(tmp_path / "set")
    convert.write(samples, tmp_path / "out" / "plain")
    plain = layouts.read(tmp_path / "out" / "plain", "images_masks")
    assert [facts(s) for s in plain] == [facts(s) for s in samples]
    for before, after in zip(samples, plain, strict=True):
        if before.mask is not None:
            np.testing.assert_array_equal(decode_mask(after.mask), decode_mask(before.mask))
            assert set(np.unique(cv2.imread(str(after.mask), cv2.IMREAD_UNCHANGED))) <= {0, 255}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plain"]


def test_labels_without_masks_stay_labels(tmp_path: Path) -> None:
    trees.mvtec(tmp_path / "set")
    (tmp_path / "set/tile/ground_truth/crack/000_mask.png").unlink()
    convert.write(layouts.read(tmp_path / "set"), tmp_path / "plain")
    [hidden] = [s for s in layouts.read(tmp_path / "plain") if s.supervision is Supervision.IMAGE]
    assert (hidden.name, hidden.positive, hidden.mask) == ("tile_test_crack_000", True, None)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    trees.ksdd(tmp_path / "set")
    samples = layouts.read(tmp_path / "set")
    samples[-1].image.unlink()
    with pytest.raises(FileNotFoundError):
        convert.write(samples, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    trees.ksdd(tmp_path / "set")
    with pytest.raises(ValueError, match=r"a converted set needs a new or empty folder, but \S+set is in use"):
        convert.write(layouts.read(tmp_path / "set"), tmp_path / "set")
