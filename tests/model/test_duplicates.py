from pathlib import Path

import cv2
import numpy as np
import pytest

from model.duplicates import NEAR_BITS, near_duplicates
from model.sample import Sample, Supervision
from model.splits import Splits


def sample(path: Path) -> Sample:
    return Sample(
        name=path.stem, image=path, mask=None, positive=False, supervision=Supervision.PIXEL, group=path.stem,
        digest=path.stem, mask_digest="",
    )  # fmt: skip


def picture(seed: int) -> np.ndarray:
    """Blurred noise, which has the spectrum of a surface."""
    noise = np.random.default_rng(seed).normal(size=(96, 96, 3))
    return np.uint8(np.clip(128 + 400 * cv2.GaussianBlur(noise, (0, 0), 3), 0, 255))


def save(folder: Path, name: str, pixels: np.ndarray) -> Sample:
    cv2.imwrite(str(folder / name), pixels)
    return sample(folder / name)


def test_copies_are_found_across_splits_alone(tmp_path: Path) -> None:
    base = picture(0)
    train = [save(tmp_path, "a.png", base), save(tmp_path, "twin.png", base)]
    validation = [save(tmp_path, "other.png", picture(1)), save(tmp_path, "small.png", cv2.resize(base, (48, 48)))]
    test = [save(tmp_path, "bright.jpg", cv2.convertScaleAbs(base, beta=12)), save(tmp_path, "more.png", picture(2))]
    found = near_duplicates(Splits(train, validation, test))
    pairs = {(Path(pair.first.split()[0]).name, Path(pair.second.split()[0]).name) for pair in found}
    assert pairs == {
        ("a.png", "small.png"), ("twin.png", "small.png"), ("a.png", "bright.jpg"), ("twin.png", "bright.jpg"),
        ("small.png", "bright.jpg"),
    }  # fmt: skip
    assert [pair.bits for pair in found] == sorted(pair.bits for pair in found)
    assert "small.png (validation) look alike: their hashes differ in" in str(found[0]) + str(found[1]) + str(found[2])


def test_different_pictures_are_not(tmp_path: Path) -> None:
    rows = [save(tmp_path, f"{n}.png", picture(n)) for n in range(30)]
    assert near_duplicates(Splits(rows[:10], rows[10:20], rows[20:])) == []


def test_an_empty_split_has_none(tmp_path: Path) -> None:
    assert near_duplicates(Splits([save(tmp_path, "a.png", picture(0))], [], [])) == []


@pytest.mark.timeout(120)
def test_real_cracks_do_not_look_alike_but_for_crops(crackseg448: Path) -> None:
    files = [sample(path) for path in sorted((crackseg448 / "images").iterdir())]
    assert near_duplicates(Splits(files[::2], files[1::2], [])) == []
    assert NEAR_BITS == 40
