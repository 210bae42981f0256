"""Any layout -> the plain one: images/, masks/ and index.csv."""

from __future__ import annotations

import csv
import shutil
import tempfile
from pathlib import Path

import cv2

from model.inspection import decode_mask
from model.sample import Sample, Supervision

COLUMNS = ("name", "positive", "segmented", "split", "group", "source")


def write(samples: list[Sample], out: Path) -> None:
    """Writes the samples as the layout images_masks; the folder appears complete or not at all.

    Images are copied byte for byte, masks become PNG files of 0 and 255. ValueError if `out` is in use.
    """
    target = out.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"a converted set needs a new or empty folder, but {out} is in use; name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        root = Path(temporary) / target.name
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        with (root / "index.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            for sample in samples:
                rows.writerow(_write_files(sample, root))
        root.rename(target)


def _write_files(sample: Sample, root: Path) -> list[str | int]:
    """One image and its mask; its row of index.csv."""
    image = f"{sample.name}{sample.image.suffix}"
    shutil.copyfile(sample.image, root / "images" / image)
    if sample.mask is not None:
        mask = root / "masks" / f"{sample.name}.png"
        encoded, data = cv2.imencode(".png", decode_mask(sample.mask) * 255)
        if not encoded:
            raise OSError(f"OpenCV could not encode {mask}")
        mask.write_bytes(data.tobytes())
    segmented = int(sample.supervision is Supervision.PIXEL)
    return [image, int(sample.positive), segmented, sample.split or "", sample.group, sample.source]
