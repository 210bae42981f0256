from pathlib import Path

import cv2
import numpy as np
import pytest

from model import layouts, splits
from model.layouts import DataError
from model.sample import Supervision


def image(path: Path, height: int = 64, width: int = 128, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), value, np.uint8))


def mask(path: Path, height: int = 64, width: int = 128, defect: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.zeros((height, width), np.uint8)
    if defect:
        drawn[5, :20] = 255
    cv2.imwrite(str(path), drawn)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images, the even ones with a defect."""
    for n in range(12):
        image(tmp_path / f"images/{n:02}.png", value=10 * n + 5)
        mask(tmp_path / f"masks/{n:02}.png", defect=n % 2 == 0)
    return tmp_path


def index(folder: Path, columns: str, *rows: str) -> None:
    (folder / "index.csv").write_text("\n".join([columns, *rows]) + "\n")


def test_labels_come_from_masks_without_an_index(folder: Path) -> None:
    samples = layouts.read(folder)
    assert [sample.positive for sample in samples] == [n % 2 == 0 for n in range(12)]
    assert {sample.supervision for sample in samples} == {Supervision.PIXEL}
    assert [sample.group for sample in samples] == [sample.name for sample in samples]


def test_real_layouts_are_read(crackforest: Path, crackseg448: Path) -> None:
    roads, merged = layouts.read(crackforest), layouts.read(crackseg448)
    assert splits.counts(roads) == {"positive": 118, "negative": 0, "segmented": 118}
    assert splits.counts(merged) == {"positive": 220, "negative": 80, "segmented": 220}
    assert len({sample.group for sample in merged}) == 272


def test_an_index_says_labels_groups_splits_and_who_has_a_mask(folder: Path) -> None:
    rows = [f"{n:02}.png,{1 - n % 2},{int(n != 0)},g{n // 3},train" for n in range(12)]
    index(folder, "name,positive,segmented,photo_group,split", *rows)
    (folder / "masks/00.png").unlink()
    (folder / "masks/01.png").unlink()
    samples = layouts.read(folder)
    assert samples[0].supervision is Supervision.IMAGE
    assert samples[0].positive
    assert samples[1].supervision is Supervision.PIXEL  # a negative needs no file
    assert samples[5].group == "g1"
    assert samples[5].split == "train"


def broken(folder: Path) -> None:
    (folder / "images/03.png").write_text("not an image")


def cut_mask(folder: Path) -> None:
    mask(folder / "masks/03.png", height=32)


def no_mask(folder: Path) -> None:
    (folder / "masks/03.png").unlink()


def orphan_mask(folder: Path) -> None:
    mask(folder / "masks/99.png")


def no_images(folder: Path) -> None:
    for file in [*(folder / "images").iterdir(), *(folder / "masks").iterdir()]:
        file.unlink()


def wrong_label(folder: Path) -> None:
    index(folder, "name,positive", *(f"{n:02},{n % 2}" for n in range(12)))


def unknown_name(folder: Path) -> None:
    index(folder, "name", *(f"{n:02}" for n in range(12)), "elsewhere")


def bad_value(folder: Path) -> None:
    index(folder, "name,split", *(f"{n:02},valid" for n in range(12)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken, r"images/03\.png: cannot be decoded as an image; replace the file or remove it"),
        (cut_mask, r"masks/03\.png: a mask must have its image's size, 128x64 px, found 128x32"),
        (no_mask, r"images/03\.png: there is no mask for it; add masks/03\.png, or say positive = 0"),
        (orphan_mask, r"masks/99\.png: there is no image of this name"),
        (no_images, r"images: no image found"),
        (wrong_label, r"index\.csv says positive = 1, but its mask is empty"),
        (unknown_name, r"line 14: there is no image named 'elsewhere'"),
        (bad_value, r"line 2: split must be one of train, validation, test, found 'valid'"),
    ],
)
def test_a_data_set_that_cannot_be_used_says_why(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        layouts.read(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder; name the one that holds images/"):
        layouts.read(tmp_path / "nowhere")


def problems(folder: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        layouts.read(folder)
    return str(caught.value).split("\n  ")[1:]


def test_all_broken_files_come_in_one_error(folder: Path) -> None:
    cut_mask(folder)
    (folder / "images/07.png").write_bytes(b"")
    assert len(problems(folder)) == 2


def test_a_missing_mask_hides_no_broken_image(folder: Path) -> None:
    """What the listing finds, what a look at the files finds, and a label that its mask contradicts."""
    index(folder, "name,positive", *(f"{n:02},{1 - n % 2 if n else 0}" for n in range(12)))
    (folder / "masks/04.png").unlink()
    (folder / "images/07.png").write_bytes(b"")
    mask(folder / "masks/99.png")
    assert [Path(line.split(":")[0]).stem for line in problems(folder)] == ["99", "04", "00", "07"]


def test_a_bad_word_in_the_index_is_one_problem(folder: Path) -> None:
    index(folder, "name,positive", *(f"{n:02},{'yes' if n == 0 else 1 - n % 2}" for n in range(12)))
    assert len(problems(folder)) == 1


def test_a_long_list_of_problems_is_cut_short(folder: Path) -> None:
    for n in range(30):
        mask(folder / f"masks/1{n:02}.png")
    (folder / "images/07.png").write_bytes(b"")
    assert len(problems(folder)) == 21
    assert problems(folder)[-1] == "... and 11 more"
