"""Every published layout: read as it should be, and refused by name where it is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from model import layouts, splits
from model.data import open_cache
from model.inspection import decode_image, decode_mask
from model.layouts import DataError
from model.layouts.crack_segmentation import photo
from model.sample import Sample, Supervision
from tests.model.layouts import trees

Tree = Callable[[Path], None]

GIVEN = {"train": 4, "validation": 4, "test": 4}
TEST_GIVEN = {None: 8, "test": 4}
FREE = {None: 12}
EXPECTED = [
    # tree, what auto finds, splits, groups, sources, a name
    (trees.images_masks, "images_masks", FREE, 12, {""}, "00"),
    (trees.crack_segmentation, "crack_segmentation", GIVEN, 12, {"crack500", "noncrack"}, "noncrack_train_wall_0_0"),
    (trees.published, "crack_segmentation_published", TEST_GIVEN, 12, {"rissbilder", "noncrack"}, "noncrack_test0_3"),
    (trees.deepcrack, "deepcrack", TEST_GIVEN, 6, {""}, "train0-1"),
    (trees.crack500, "crack500", GIVEN, 6, {""}, "20160220_081010_1_361"),
    (trees.crack500_lists, "crack500", GIVEN, 6, {""}, "20160220_081010_1_361"),
    (trees.crackforest, "crackforest", FREE, 12, {""}, "001"),
    (trees.ksdd, "ksdd", FREE, 6, {""}, "kos01_Part0"),
    (trees.ksdd2, "ksdd2", TEST_GIVEN, 12, {""}, "10000"),
    (trees.dagm, "dagm", TEST_GIVEN, 12, {"Class1"}, "Class1_Train_0576"),
    (trees.severstal, "severstal", FREE, 12, {""}, "0000"),
    (trees.severstal_old, "severstal", FREE, 12, {""}, "0000"),
    (trees.mvtec, "mvtec", FREE, 12, {"tile"}, "tile_test_crack_000"),
]
IDS = [tree.__name__ for tree, *_ in EXPECTED]


def made(tree: Tree, root: Path) -> Path:
    root.mkdir(exist_ok=True)
    tree(root)
    return root


def count(samples: list[Sample], field: str) -> dict:
    values = [getattr(sample, field) for sample in samples]
    return {value: values.count(value) for value in values}


@pytest.mark.parametrize(("tree", "layout", "sides", "groups", "sources", "name"), EXPECTED, ids=IDS)
def test_a_published_layout(tree, layout, sides, groups, sources, name, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    samples = layouts.read(folder)
    assert samples == layouts.read(folder, layout)
    assert count(samples, "positive") == {True: 6, False: 6}
    assert count(samples, "supervision") == {Supervision.PIXEL: 12}
    assert count(samples, "split") == sides
    assert len(count(samples, "group")) == groups
    assert set(count(samples, "source")) == sources
    assert name in count(samples, "name")
    assert len(count(samples, "digest")) == 12
    assert not any("/" in sample.name for sample in samples)
    for sample in samples:
        if sample.positive:
            assert sample.mask
            found = decode_mask(sample.mask)
            np.testing.assert_array_equal(found, trees.drawn(*found.shape))
            assert sample.mask_digest


@pytest.mark.parametrize(("tree", "sides"), [(row[0], row[2]) for row in EXPECTED], ids=IDS)
def test_it_can_be_split(tree, sides, tmp_path: Path) -> None:
    samples = layouts.read(made(tree, tmp_path / "set"))
    found = splits.assign(samples, tmp_path, 0.34, 0.34, 0)
    assert sum(map(len, found)) == 12
    if "test" in sides:
        assert {s.split for s in found.test} == {"test"}


@pytest.mark.parametrize("tree", [trees.crackforest, trees.severstal, trees.ksdd], ids=lambda tree: tree.__name__)
def test_masks_of_every_kind_reach_the_cache(tree: Tree, tmp_path: Path) -> None:
    samples = layouts.read(made(tree, tmp_path / "set"))
    height, width = decode_image(samples[0].image).shape[:2]
    cache = open_cache(samples, height, width, tmp_path / "cache")
    for sample, found in zip(samples, cache.masks, strict=True):
        np.testing.assert_array_equal(found, trees.drawn(height, width) * sample.positive)
    if tree is trees.severstal:  # another mask is another cache
        trees.severstal_rows(tmp_path / "set", [["0000.jpg", "1", "1 5"]])
        assert open_cache(layouts.read(tmp_path / "set"), height, width, tmp_path / "cache").masks.sum() == 5


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def of_other_size(path: Path) -> None:
    if path.suffix == ".mat":
        trees.truth(path, np.ones((8, 8), np.uint8))
    else:
        cv2.imwrite(str(path), np.full((8, 8), 255, np.uint8))


NEEDS_NO_FILE = "label alone"
PLACES = {
    # tree: an image, its mask, and what the message about a missing mask says
    trees.images_masks: ("images/00.jpg", "masks/00.png", r"there is no mask for it; add masks/00\.png"),
    trees.crack_segmentation: (
        "train_positive/CRACK500_20160222_081010_1_5.jpg",
        "train_positive/CRACK500_20160222_081010_1_5_GT.png",
        NEEDS_NO_FILE,
    ),
    trees.published: (
        "test/images/Rissbilder_for_Florian_9S6Atest0_0_0_10_10.jpg",
        "test/masks/Rissbilder_for_Florian_9S6Atest0_0_0_10_10.jpg",
        r"there is no mask for it.*add test/masks/Rissbilder",
    ),
    trees.deepcrack: ("test_img/test0-0.jpg", "test_lab/test0-0.png", r"there is no mask for it"),
    trees.crack500: (
        "valcrop/20160221_081010_1_361.jpg",
        "valcrop/20160221_081010_1_361.png",
        r"there is no mask for it",
    ),
    trees.crack500_lists: (
        "valcrop/valcrop/20160221_081010_1_361.jpg",
        "valcrop/valcrop/20160221_081010_1_361.png",
        r"val\.txt, line 1: there is no file \S+20160221_081010_1_361\.png",
    ),
    trees.crackforest: ("image/001.jpg", "groundTruth/001.mat", r"there is no mask for it.*add groundTruth/001\.mat"),
    trees.ksdd: ("kos01/Part0.jpg", "kos01/Part0_label.bmp", r"there is no mask for it.*add Part0_label\.bmp"),
    trees.ksdd2: ("train/10000.png", "train/10000_GT.png", r"there is no mask for it.*add train/10000_GT\.png"),
    trees.dagm: (
        "Class1/Train/0576.PNG",
        "Class1/Train/Label/0576_label.PNG",
        r"Labels\.txt says that it has a defect; add Label/0576_label\.PNG",
    ),
    trees.severstal: ("train_images/0000.jpg", None, None),
    trees.mvtec: ("tile/test/crack/000.png", "tile/ground_truth/crack/000_mask.png", NEEDS_NO_FILE),
}


def refused(folder: Path, message: str) -> None:
    """One error with one problem."""
    with pytest.raises(DataError, match=message) as caught:
        layouts.read(folder)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("tree", PLACES, ids=lambda tree: tree.__name__)
def test_a_truncated_image_is_named(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    truncated(folder / PLACES[tree][0])
    refused(folder, rf"{PLACES[tree][0]}: cannot be decoded as an image; replace the file or remove it")


@pytest.mark.parametrize("tree", [t for t in PLACES if PLACES[t][1]], ids=lambda tree: tree.__name__)
def test_a_truncated_mask_is_named(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    truncated(folder / PLACES[tree][1])
    refused(folder, rf"{PLACES[tree][1]}: cannot be (decoded as an image|read as a MATLAB file).*replace the file")


@pytest.mark.parametrize("tree", [t for t in PLACES if PLACES[t][1]], ids=lambda tree: tree.__name__)
def test_a_mask_of_another_size_is_named(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    of_other_size(folder / PLACES[tree][1])
    refused(folder, rf"{PLACES[tree][1]}: a mask must have its image's size, 48x32 px, found 8x8")


@pytest.mark.parametrize("tree", [t for t in PLACES if PLACES[t][1]], ids=lambda tree: tree.__name__)
def test_a_missing_mask_is_named_or_means_image_supervision(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    place, truth, message = PLACES[tree]
    (folder / truth).unlink()
    if message != NEEDS_NO_FILE:
        return refused(folder, message)
    [hidden] = [sample for sample in layouts.read(folder) if sample.image == folder / place]
    assert hidden.positive
    assert hidden.supervision is Supervision.IMAGE
    return None


@pytest.mark.parametrize("tree", [t for t in PLACES if PLACES[t][1]], ids=lambda tree: tree.__name__)
def test_a_mask_without_an_image_is_named(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    (folder / PLACES[tree][0]).unlink()
    refused(folder, r"there is no (image|photo|file)")


EMPTY = {
    trees.images_masks: "images",
    trees.crack_segmentation: "val_positive",
    trees.published: "test/images",
    trees.deepcrack: "test_img",
    trees.crack500: "valcrop",
    trees.crackforest: "image",
    trees.ksdd: "kos03",
    trees.ksdd2: "test",
    trees.dagm: "Class1/Test",
    trees.mvtec: "tile/test/oil",
}


@pytest.mark.parametrize("tree", EMPTY, ids=lambda tree: tree.__name__)
def test_an_empty_split_is_named(tree: Tree, tmp_path: Path) -> None:
    folder = made(tree, tmp_path / "set")
    for file in [f for f in (folder / EMPTY[tree]).rglob("*") if f.is_file()]:
        file.unlink()
    with pytest.raises(DataError, match=rf"{EMPTY[tree]}: no image found"):
        layouts.read(folder)


def test_an_empty_list_is_named(tmp_path: Path) -> None:
    folder = made(trees.crack500_lists, tmp_path / "set")
    (folder / "val.txt").write_text("\n")
    refused(folder, r"val\.txt: lists no image")
    (folder / "val.txt").write_text("one.jpg\n")
    refused(folder, r"val\.txt, line 1: must be an image and a mask, found 'one\.jpg'")


@pytest.mark.parametrize(
    "runs",
    ["1 2 3", "0 5", "5 0", "-3 2", "409600 2", "1,2", "1 two", "1.5 2", "²1 2", "9" * 5000 + " 1"],
    ids=lambda runs: runs[:9],
)
def test_unknown_runs_are_named(tmp_path: Path, runs: str) -> None:
    folder = made(trees.severstal, tmp_path / "set")
    trees.severstal_rows(folder, [["0000.jpg", "1", runs], ["0001.jpg", "1", "1 5"]])
    refused(folder, r"train\.csv, 0000\.jpg: EncodedPixels must be pairs 'start length', counted from 1.*found")


def test_runs_go_down_the_columns_and_count_from_one(tmp_path: Path) -> None:
    folder = made(trees.severstal, tmp_path / "set")
    trees.severstal_rows(folder, [["0000.jpg", "1", "1 2 256 1"], ["0000.jpg", "4", "257 1 409600 1"]])
    found = decode_mask(layouts.read(folder)[0].mask)
    assert np.argwhere(found).tolist() == [[0, 0], [0, 1], [1, 0], [255, 0], [255, 1599]]


def test_a_table_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = made(trees.severstal, tmp_path / "set")
    trees.severstal_rows(folder, [["gone.jpg", "1", "1 5"]])
    refused(folder, r"train\.csv, line 2: there is no image 'gone\.jpg' in train_images/")
    trees.severstal_rows(folder, [], ("Image", "Pixels"))
    refused(folder, r"needs the columns ImageId .* found Image, Pixels")


def test_images_that_were_resized_do_not_fit_their_runs(tmp_path: Path) -> None:
    folder = made(trees.severstal, tmp_path / "set")
    trees.image(folder / "train_images/0000.jpg", 128, 800)
    refused(folder, r"train\.csv, 0000\.jpg: a mask must have its image's size, 800x128 px, found 1600x256")


def faint(path: Path, value: int, depth: type = np.uint8) -> None:
    cv2.imwrite(str(path), trees.drawn().astype(depth) * value)


@pytest.mark.parametrize(("value", "depth"), [(1, np.uint8), (127, np.uint8), (255, np.uint16)])
def test_a_mask_of_class_numbers_is_no_silent_negative(tmp_path: Path, value: int, depth: type) -> None:
    folder = made(trees.ksdd2, tmp_path / "set")
    faint(folder / "train/10000_GT.png", value, depth)
    refused(folder, rf"train/10000_GT\.png: a mask's defect must lie above \d+, found {value} as its largest value")


def test_an_empty_jpeg_mask_may_ring(tmp_path: Path) -> None:
    folder = made(trees.published, tmp_path / "set")
    faint(folder / "test/masks/noncrack_test0_3.jpg", 9)
    assert count(layouts.read(folder), "positive") == {True: 6, False: 6}


def test_sixteen_bits_are_cut_at_half(tmp_path: Path) -> None:
    faint(tmp_path / "deep.png", 65535, np.uint16)
    np.testing.assert_array_equal(decode_mask(tmp_path / "deep.png"), trees.drawn())


def test_a_name_that_says_negative_holds_against_its_mask(tmp_path: Path) -> None:
    folder = made(trees.published, tmp_path / "set")
    trees.mask(folder / "train/masks/noncrack_train0_3.jpg")
    refused(folder, r"noncrack_train0_3\.jpg: the name says positive = 0, but its mask has \d+ defect pixels; mend")


def test_a_folder_that_says_positive_holds_against_an_empty_mask(tmp_path: Path) -> None:
    folder = made(trees.crack_segmentation, tmp_path / "set")
    trees.mask(folder / "train_positive/CRACK500_20160222_081010_1_5_GT.png", defect=False)
    refused(folder, r"081010_1_5\.jpg: the folder says positive = 1, but its mask is empty; mend the mask or move")


def test_label_folders_without_validation_give_the_test_split_alone(tmp_path: Path) -> None:
    folder = made(trees.crack_segmentation, tmp_path / "set")
    for label in ("positive", "negative"):
        for file in (folder / f"val_{label}").iterdir():
            file.rename(folder / f"train_{label}" / file.name)
        (folder / f"val_{label}").rmdir()
    assert count(layouts.read(folder), "split") == TEST_GIVEN


def test_sccdnet_is_the_published_tree(tmp_path: Path) -> None:
    folder = made(trees.published, tmp_path / "set")
    assert layouts.read(folder, "sccdnet") == layouts.read(folder)


def test_dagm_without_its_table_takes_the_label_folder(tmp_path: Path) -> None:
    folder = made(trees.dagm, tmp_path / "set")
    with_table = layouts.read(folder)
    for table in folder.rglob("Labels.txt"):
        table.unlink()
    assert layouts.read(folder) == with_table
    (folder / "Class1").rename(folder / "inner")
    (folder / "Class1").mkdir()
    (folder / "inner").rename(folder / "Class1" / "Class1")
    assert [s.name for s in layouts.read(folder)] == [s.name for s in with_table]


def test_mvtec_takes_one_category_or_many(tmp_path: Path) -> None:
    folder = made(trees.mvtec, tmp_path / "set")
    one = layouts.read(folder / "tile")
    assert one == layouts.read(folder)
    (folder / "tile/test/good/._000.png").write_bytes(b"of a Mac")
    trees.mvtec(folder, "wood")
    assert set(count(layouts.read(folder), "source")) == {"tile", "wood"}
    assert layouts.read(folder / "tile") == one


def test_mvtec_keeps_its_test_split_where_training_has_defects(tmp_path: Path) -> None:
    folder = made(trees.mvtec, tmp_path / "set")
    trees.image(folder / "tile/train/crack/100.png")
    trees.mask(folder / "tile/ground_truth/crack/100_mask.png")
    trees.image(folder / "tile/train/crack/000.png")  # the mask of this name is the test image's
    samples = layouts.read(folder)
    assert count(samples, "split") == {None: 6, "test": 8}
    kinds = {s.name: s.supervision for s in samples if s.positive and s.split is None}
    assert kinds == {"tile_train_crack_100": Supervision.PIXEL, "tile_train_crack_000": Supervision.IMAGE}


def test_a_folder_of_no_layout_names_them(tmp_path: Path) -> None:
    trees.image(tmp_path / "photos/1.png")
    refused(tmp_path, r"must hold images/ and masks/, or have another known layout \(crack_segm.*mvtec\), found photos")


def test_a_named_layout_that_is_not_there(tmp_path: Path) -> None:
    trees.images_masks(tmp_path)
    with pytest.raises(DataError, match="no image found as the layout ksdd has them"):
        layouts.read(tmp_path, "ksdd")


def test_two_images_of_one_name_are_named(tmp_path: Path) -> None:
    folder = made(trees.deepcrack, tmp_path / "set")
    trees.image(folder / "test_img/train0-0.jpg")
    trees.mask(folder / "test_lab/train0-0.png")
    refused(folder, r"train0-0\.jpg and \S+train0-0\.jpg: have one name; rename one")


@pytest.mark.parametrize(
    ("name", "source", "group"),
    [
        ("CRACK500_20160222_115219_1281_721", "crack500", "crack500:20160222_115219"),
        ("GAPS384_train_0503_541_1", "gaps384", "gaps384:train_0503"),
        ("Rissbilder_for_Florian_9S6A2782_0_0_3840_5760", "rissbilder", "rissbilder:9S6A2782"),
        ("Rissbilder_9S6A2782_0_0_3840_5760", "rissbilder", "rissbilder:9S6A2782"),
        ("Volker_DSC01608_969_117_1674_1684", "volker", "volker:DSC01608"),
        ("Eugen_Muller_8980a_123_420_527_438", "eugen_muller", "eugen_muller:8980a"),
        ("DeepCrack_11125-1", "deepcrack", "deepcrack:11125"),
        ("DeepCrack_11118", "deepcrack", "deepcrack:11118"),
        ("noncrack_concrete_wall_103_1", "noncrack", "noncrack:concrete_wall_103"),
        ("cracktree200_6203", "cracktree200", "cracktree200:6203"),
        ("CFD_001", "cfd", "crackforest:1"),
        ("forest_001", "forest", "crackforest:1"),
        ("mine", "", "mine"),
    ],
)
def test_crops_of_one_photo_have_one_group(name: str, source: str, group: str) -> None:
    assert photo(name) == (source, group)


def test_photos_by_name_are_the_groups_of_the_real_set(crackseg448: Path) -> None:
    """The names give the hand-checked groups, but for two photos that are there under two names each."""
    samples = layouts.read(crackseg448)
    by_name: dict[str, set[str]] = {}
    for sample in samples:
        by_name.setdefault(photo(sample.name)[1], set()).add(sample.group)
    assert all(len(groups) == 1 for groups in by_name.values())
    assert len(by_name) - len({s.group for s in samples}) <= 3
