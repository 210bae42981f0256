"""The splits of a run as a file: read back as they were, broken ones named, changed data named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import layouts, splits, splits_file
from model.sample import Rle, Sample, Supervision
from model.splits import Splits
from tests.model.layouts import trees

TREES = [
    trees.images_masks, trees.crack_segmentation, trees.published, trees.deepcrack, trees.crack500, trees.crack500_lists,
    trees.crackforest, trees.ksdd, trees.ksdd2, trees.dagm, trees.severstal, trees.mvtec,
]  # fmt: skip
WAY_OUT = "restore them"


def written(folder: Path, tree=trees.images_masks) -> tuple[Path, Path, Splits]:
    """The file, the data folder, and what was written."""
    (folder / "set").mkdir()
    tree(folder / "set")
    found = splits.assign(layouts.read(folder / "set"), folder / "set", 0.34, 0.34, 0)
    splits_file.write(folder / "splits.json", found, folder / "set")
    return folder / "splits.json", folder / "set", found


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_what_is_read_is_what_was_written(tree, tmp_path: Path) -> None:
    path, data, found = written(tmp_path, tree)
    assert splits_file.read(path, data, splits.fingerprint(found)) == found
    splits_file.check_files([*found.train, *found.validation, *found.test], data, WAY_OUT)


texts = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..")
)
samples = st.builds(
    Sample,
    name=texts,
    image=texts.map(lambda name: Path("/data/set") / name) | texts.map(lambda name: Path("/elsewhere") / name),
    mask=st.none() | texts.map(lambda name: Path("/data/set/masks/..") / name),
    positive=st.booleans(),
    supervision=st.sampled_from(Supervision),
    group=st.text(max_size=5),
    source=st.text(max_size=5),
    split=st.sampled_from([None, *layouts.SPLITS]),
    digest=texts,
    mask_digest=st.text(max_size=5),
)


@given(st.builds(Splits, *(st.lists(samples, max_size=3) for _ in range(3))))
def test_any_name_and_any_path_survive(tmp_path_factory, found: Splits) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    splits_file.write(path, found, Path("/data/set"))
    assert splits_file.read(path, Path("/data/set"), splits.fingerprint(found)) == found


def test_the_folder_may_move(tmp_path: Path) -> None:
    path, data, found = written(tmp_path)
    assert str(tmp_path) not in path.read_text()
    moved = data.rename(tmp_path / "elsewhere")
    again = splits_file.read(path, moved, splits.fingerprint(found))
    assert again.test[0].image == moved / "images" / found.test[0].image.name
    splits_file.check_files(again.test, moved, WAY_OUT)


def test_runs_need_their_table_no_more(tmp_path: Path) -> None:
    path, data, found = written(tmp_path, trees.severstal)
    (data / "train.csv").unlink()
    again = splits_file.read(path, data, splits.fingerprint(found))
    assert any(isinstance(sample.mask, Rle) for sample in again.train)
    splits_file.check_files(again.train, data, WAY_OUT)


def test_a_sample_takes_a_line_without_what_is_empty(tmp_path: Path) -> None:
    path, _, found = written(tmp_path)
    lines = [line for line in path.read_text().splitlines() if line.startswith('{"name"')]
    assert len(lines) == sum(map(len, found))
    assert set(json.loads(lines[0].rstrip(","))) == {
        "name", "image", "mask", "positive", "supervision", "group", "digest", "mask_digest",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Splits]:
    return written(tmp_path_factory.mktemp("splits"))


def first(document: dict, **values) -> None:
    document["train"][0] |= values


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.pop("test"),
        lambda document: document.update(schema=2),
        lambda document: document["test"].pop(),
        lambda document: document["train"].append(document["validation"].pop()),
        lambda document: document["train"][0].pop("image"),
        lambda document: document["train"].insert(0, "a name"),
        lambda document: document.update(train=5),
        lambda document: first(document, positive="no"),
        lambda document: first(document, group=7),
        lambda document: first(document, mask=["a"]),
        lambda document: first(document, mask={"file": "train.csv"}),
        lambda document: first(document, supervision="none"),
        lambda document: first(document, colour="red"),
        lambda document: first(document, digest="0" * 64),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(spoil, made, tmp_path: Path) -> None:
    whole, data, found = made
    document = json.loads(whole.read_text())
    spoil(document)
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"splits\.json: must hold the splits .* restore the file .* start a new run"):
        splits_file.read(path, data, splits.fingerprint(found))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"schema": 1, "train": [', b"\xff\xfe\x00", b"[" * 100_000])
def test_bytes_that_are_no_splits(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"splits\.json: must hold the splits"):
        splits_file.read(tmp_path / "splits.json", tmp_path, "any")
    (tmp_path / "splits.json").unlink()
    with pytest.raises(ValueError, match=r"splits\.json: must hold the splits .*\(there is no such file\)"):
        splits_file.read(tmp_path / "splits.json", tmp_path, "any")


def test_other_runs_are_noticed(tmp_path: Path) -> None:
    path, data, found = written(tmp_path, trees.severstal)
    path.write_text(path.read_text().replace(" 8 ", " 9 "))
    with pytest.raises(ValueError, match=r"the runs of '\d+' do not have its mask_digest"):
        splits_file.read(path, data, splits.fingerprint(found))


def another_picture(path: Path) -> None:
    """As valid as before, and of the same size."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), 255 - pixels)
    assert cv2.imread(str(path)) is not None


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (Path.unlink, "is missing"),
        (another_picture, "has other bytes than it had"),
        (lambda path: path.write_bytes(b""), "has other bytes than it had"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "has other bytes than it had"),
        (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(Is a directory\)"),
    ],
)
@pytest.mark.parametrize("which", ["image", "mask"])
def test_a_file_that_changed_is_named(which: str, spoil, what: str, tmp_path: Path) -> None:
    _, data, found = written(tmp_path)
    changed = getattr(found.test[0], which)
    spoil(changed)
    with pytest.raises(ValueError, match=rf"found 1 of 8 files missing or changed:\n  {changed}: {what}\nrestore them"):
        splits_file.check_files(found.test, data, WAY_OUT)
    splits_file.check_files([*found.train, *found.validation], data, WAY_OUT)


def test_five_files_and_the_count(tmp_path: Path) -> None:
    _, data, found = written(tmp_path)
    shutil.rmtree(data / "images")
    with pytest.raises(ValueError, match=r"found 12 of 24 files missing or changed") as caught:
        splits_file.check_files([*found.train, *found.validation, *found.test], data, WAY_OUT)
    assert str(caught.value).count("is missing") == 5
    assert "\n  ... and 7 more\n" in str(caught.value)
    shutil.rmtree(data)
    with pytest.raises(ValueError, match=r"there is no folder \S+set; restore them"):
        splits_file.check_files(found.test, data, WAY_OUT)


def test_the_test_split_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    _, _, found = written(tmp_path)
    fewer = found._replace(train=found.train[1:])
    assert splits.fingerprint_of_test(fewer) == splits.fingerprint_of_test(found)
    altered = [dataclasses.replace(found.test[0], mask_digest="new"), *found.test[1:]]
    assert splits.fingerprint_of_test(found._replace(test=altered)) != splits.fingerprint_of_test(found)
