"""Looks at every file of a data set once: can it be decoded, how large is it, how much of it is defect, which bytes.

Runs as a process of its own (`python -m model.inspection`), since it is the one place before the final evaluation
that may open test images: nothing but hashes, sizes and counts comes back to the search.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

MASK_LEVEL = 127
"""A mask's pixel is a defect above this value: half of 8 bit. JPEG masks ring, so `> 0` would widen them by a third."""


def decode_image(path: Path) -> np.ndarray:
    """RGB (H, W, 3) uint8. ValueError if the file is no image."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path}: cannot be decoded as an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 of 0 and 1. ValueError if the file is no image."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise ValueError(f"{path}: cannot be decoded as an image")
    return (mask > MASK_LEVEL).astype(np.uint8)


def inspect(pairs: list[tuple[Path, Path | None]]) -> list[dict[str, Any]]:
    """For each image and its mask: `digest`, `mask_digest`, `height`, `width`, `defect_pixels`, `problem`."""
    lines = "\n".join(json.dumps([str(image), str(mask) if mask else None]) for image, mask in pairs)
    answer = subprocess.run(
        [sys.executable, "-m", "model.inspection"],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENCV_LOG_LEVEL": "SILENT"},
    )
    if answer.returncode:
        raise RuntimeError(f"looking through the data set failed:\n{answer.stderr}")
    return [json.loads(line) for line in answer.stdout.splitlines()]


def _facts(pair: tuple[str, str | None]) -> dict[str, Any]:
    image_path, mask_path = Path(pair[0]), Path(pair[1]) if pair[1] else None
    facts: dict[str, Any] = {"digest": _digest(image_path), "mask_digest": "", "defect_pixels": 0, "problem": None}
    try:
        facts["height"], facts["width"] = decode_image(image_path).shape[:2]
        if mask_path:
            mask = decode_mask(mask_path)
            facts["mask_digest"], facts["defect_pixels"] = _digest(mask_path), int(mask.sum())
            if mask.shape != (facts["height"], facts["width"]):
                facts["problem"] = (
                    f"{mask_path}: a mask must have its image's size, {facts['width']}x{facts['height']} px, "
                    f"found {mask.shape[1]}x{mask.shape[0]}; export it again"
                )
    except ValueError as error:
        facts["problem"] = f"{error}; replace the file or remove it"
    return facts


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Reads one JSON pair of paths a line, writes one JSON object a line."""
    cv2.setNumThreads(1)
    pairs = [json.loads(line) for line in sys.stdin]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing release the interpreter's lock
        for facts in pool.map(_facts, pairs):
            print(json.dumps(facts))


if __name__ == "__main__":
    main()
