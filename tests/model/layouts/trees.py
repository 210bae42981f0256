"""A small tree of every published layout, made for a test: six positives and six negatives where there are any."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

HEIGHT, WIDTH = 32, 48


def image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Noise that depends on the path, so that no two files are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path).encode()))
    cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), np.uint8))
    return path


def drawn(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The defect of every positive: rows 8 to 15, columns 16 to 31, 0 and 1."""
    found = np.zeros((height, width), np.uint8)
    found[8:16, 16:32] = 1
    return found


def mask(path: Path, defect: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), drawn() * 255 * int(defect))
    return path


def images_masks(root: Path) -> None:
    for n in range(12):
        image(root / f"images/{n:02}.jpg")
        mask(root / f"masks/{n:02}.png", n < 6)


def crack_segmentation(root: Path) -> None:
    for part, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        for n in range(2):
            image(root / f"{word}_positive/CRACK500_20160222_08101{n}_1_{len(part)}.jpg")
            mask(root / f"{word}_positive/CRACK500_20160222_08101{n}_1_{len(part)}_GT.png")
            image(root / f"{word}_negative/noncrack_{part}_wall_{n}_0.jpg")
    for word in ("val", "test"):  # other photos than those of training
        for file in sorted((root / f"{word}_positive").iterdir()):
            file.rename(file.with_name(file.name.replace("20160222", "20160223" if word == "val" else "20160224")))
    mask(root / "train_negative/noncrack_train_wall_0_0_GT.png", defect=False)


def published(root: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for n in range(count):
            for name, defect in (
                (f"Rissbilder_for_Florian_9S6A{part}{n}_0_0_10_10", True),
                (f"noncrack_{part}{n}_3", False),
            ):
                image(root / part / "images" / f"{name}.jpg")
                mask(root / part / "masks" / f"{name}.jpg", defect)


def deepcrack(root: Path) -> None:
    for part, count in (("train", 8), ("test", 4)):
        for n in range(count):
            image(root / f"{part}_img" / f"{part}{n // 2}-{n % 2}.jpg")
            mask(root / f"{part}_lab" / f"{part}{n // 2}-{n % 2}.png", n // 2 % 2 == 0)


def crack500(root: Path) -> None:
    for day, part in enumerate(("train", "val", "test")):
        for n in range(4):
            name = f"2016022{day}_08101{n // 2}_{1 + 640 * (n % 2)}_361"
            image(root / f"{part}crop" / f"{name}.jpg")
            mask(root / f"{part}crop" / f"{name}.png", n < 2)


def crack500_lists(root: Path) -> None:
    """With lists, as unpacked from archives."""
    crack500(root)
    for part in ("train", "val", "test"):
        folder = root / f"{part}crop"
        names = sorted(file.stem for file in folder.glob("*.jpg"))
        lines = [f"{folder.name}/{name}.jpg {folder.name}/{name}.png\n" for name in names]
        (root / f"{part}.txt").write_text("".join(lines))
        folder.rename(root / "moved")
        folder.mkdir()
        (root / "moved").rename(folder / folder.name)


def truth(path: Path, labels: np.ndarray) -> Path:
    """A ground truth as CrackForest's MATLAB structs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": {"Segmentation": labels, "Boundaries": labels > 1}})
    return path


def crackforest(root: Path) -> None:
    """Crack is labels 2 and 4; 3 is sound road inside a crack's loop."""
    for n in range(1, 13):
        labels = np.ones((HEIGHT, WIDTH), np.uint16)
        labels[20:30, 2:10] = 3
        if n <= 6:
            labels[drawn() > 0] = 2
            labels[8, 16:32] = 4
        image(root / f"image/{n:03}.jpg")
        truth(root / f"groundTruth/{n:03}.mat", labels)
    image(root / "image/201.jpg")  # upstream has no ground truth for it


def ksdd(root: Path) -> None:
    for item in range(1, 7):
        for part in range(2):
            image(root / f"kos{item:02}/Part{part}.jpg")
            mask(root / f"kos{item:02}/Part{part}_label.bmp", part == 0)


def ksdd2(root: Path) -> None:
    for part, first, count in (("train", 10000, 8), ("test", 20000, 4)):
        for n in range(count):
            image(root / part / f"{first + n}.png")
            mask(root / part / f"{first + n}_GT.png", n % 2 == 0)
    for name in ("10001", "10001_GT"):
        (root / f"train/{name} (copy).png").write_bytes((root / f"train/{name}.png").read_bytes())


def dagm(root: Path) -> None:
    for part, first, count in (("Train", 576, 8), ("Test", 1, 4)):
        lines = ["1"]
        for n in range(first, first + count):
            folder, defect = root / "Class1" / part, n % 2 == 0
            image(folder / f"{n:04}.PNG")
            if defect:
                mask(folder / "Label" / f"{n:04}_label.PNG")
            lines.append(f"{n}\t{int(defect)}\t{n:04}.PNG\t0\t{f'{n:04}_label.PNG' if defect else 0}")
        (root / "Class1" / part / "Label" / "Labels.txt").write_text("\n".join(lines) + "\n")


def severstal_rows(
    root: Path, rows: list[list[str]], header: tuple[str, ...] = ("ImageId", "ClassId", "EncodedPixels")
):
    with (root / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(header), *rows])


def severstal(root: Path) -> None:
    """Two classes in one image: rows 8 to 15, columns 16 to 23 and 24 to 31."""
    for n in range(12):
        image(root / f"train_images/{n:04}.jpg", 256, 1600)
    runs = [" ".join(f"{256 * column + 9} 8" for column in range(start, start + 8)) for start in (16, 24)]
    severstal_rows(root, [[f"{n:04}.jpg", str(c + 1), runs[c]] for n in range(6) for c in range(2)])


def severstal_old(root: Path) -> None:
    """The older file: a row for every image and class, most of them empty."""
    severstal(root)
    with (root / "train.csv").open() as file:
        runs = {(row["ImageId"], row["ClassId"]): row["EncodedPixels"] for row in csv.DictReader(file)}
    rows = [
        [f"{n:04}.jpg_{c}", runs.get((f"{n:04}.jpg", str(c)), "")] for n in range(12) for c in range(1, 5)
    ]  # fmt: skip
    severstal_rows(root, rows, ("ImageId_ClassId", "EncodedPixels"))


def mvtec(root: Path, category: str = "tile") -> None:
    for n in range(4):
        image(root / category / f"train/good/{n:03}.png")
    for n in range(2):
        image(root / category / f"test/good/{n:03}.png")
    for defect in ("crack", "oil"):
        for n in range(3):
            image(root / category / f"test/{defect}/{n:03}.png")
            mask(root / category / f"ground_truth/{defect}/{n:03}_mask.png")
