"""Looks at every file of a data set once: can it be decoded, how large is it, how much of it is defect, which bytes.

Runs as a process of its own (`python -m model.inspection`), since it is the one place before the final evaluation
that may open test images: nothing but hashes, sizes and counts comes back to the search.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.sample import Rle

MASK_LEVEL = 127
"""A mask's pixel is a defect above this value: half of 8 bit. JPEG masks ring, so `> 0` would widen them by a third."""

CRACKFOREST_DEFECTS = (2, 4)
"""Labels of a CrackForest .mat that are crack: 1 is sound road, 3 a piece of sound road enclosed by cracks."""

HASH_SIDE = 16
"""A perceptual hash has 16 x 16 bits."""


Read = Callable[[Path], bytes]
"""How the bytes of a file come: Path.read_bytes, or a function that has them from elsewhere."""


def decode_image(path: Path, read: Read = Path.read_bytes) -> np.ndarray:
    """RGB (H, W, 3) uint8. ValueError if the file is no image, or is cut short."""
    return cv2.cvtColor(_decode(path, read, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def resize_image(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image at the network's input size (height, width), as training sees it."""
    if image_HWC.shape[:2] == tuple(size):
        return image_HWC
    shrinks = image_HWC.shape[0] > size[0] or image_HWC.shape[1] > size[1]
    return cv2.resize(image_HWC, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode_mask(mask: Path | Rle, read: Read = Path.read_bytes) -> np.ndarray:
    """(H, W) uint8 of 0 and 1, from an image, CrackForest's .mat or runs. ValueError if it is none of them."""
    if isinstance(mask, Rle):
        return _decode_runs(mask)
    return _decode_mat(mask, read) if mask.suffix.lower() == ".mat" else _decode_mask_image(mask, read)


def _decode(path: Path, read: Read, flags: int) -> np.ndarray:
    data = np.frombuffer(read(path), np.uint8)
    image = cv2.imdecode(data, flags) if data.size else None  # unlike imread, refuses a JPEG file that is cut short
    if image is None:
        raise ValueError(f"{path}: cannot be decoded as an image; replace the file or remove it")
    return image


def _decode_mask_image(path: Path, read: Read) -> np.ndarray:
    values = _decode(path, read, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    if values.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: a mask must have 8 or 16 bits, found {values.dtype}; save it as 0 and 255")
    level = MASK_LEVEL if values.dtype == np.uint8 else 2**15 - 1
    largest = int(values.max())
    if 0 < largest <= level and path.suffix.lower() not in (".jpg", ".jpeg"):  # an empty JPEG mask may ring
        raise ValueError(
            f"{path}: a mask's defect must lie above {level}, found {largest} as its largest value, so that nothing "
            "would be a defect; save it as 0 and 255"
        )
    return (values > level).astype(np.uint8)


def _decode_mat(path: Path, read: Read) -> np.ndarray:
    """CrackForest's ground truth: `groundTruth.Segmentation`, labels from 1. Reads arrays, runs nothing."""
    from scipy.io import loadmat

    data = read(path)
    try:
        found = loadmat(io.BytesIO(data), variable_names=["groundTruth"])
        labels = np.asarray(found["groundTruth"]["Segmentation"][0, 0])
    except Exception as error:  # SciPy raises whatever the broken bytes lead to
        raise ValueError(
            f"{path}: cannot be read as a MATLAB file with groundTruth.Segmentation ({type(error).__name__}); "
            "replace the file or remove it"
        ) from error
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.number):
        raise ValueError(f"{path}: Segmentation must be an array of labels, found {labels.dtype} {labels.shape}")
    return np.isin(labels, CRACKFOREST_DEFECTS).astype(np.uint8)


def _decode_runs(mask: Rle) -> np.ndarray:
    flat = np.zeros(mask.height * mask.width, np.uint8)
    for text in mask.runs:
        words = text.split()
        numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 12]
        starts, lengths = numbers[::2], numbers[1::2]
        if (
            len(numbers) != len(words)
            or len(starts) != len(lengths)
            or not all(
                start >= 1 and length >= 1 and start - 1 + length <= flat.size
                for start, length in zip(starts, lengths, strict=True)
            )
        ):
            raise ValueError(
                f"{mask}: EncodedPixels must be pairs 'start length', counted from 1 down the columns of "
                f"{mask.width}x{mask.height} px, found {text[:60]!r}; export it again"
            )
        for start, length in zip(starts, lengths, strict=True):
            flat[start - 1 : start - 1 + length] = 1
    return flat.reshape((mask.height, mask.width), order="F")


def inspect(pairs: list[tuple[Path, Path | Rle | None]]) -> list[dict[str, Any]]:
    """For each image and its mask: `digest`, `mask_digest`, `height`, `width`, `defect_pixels`, `problem`."""
    return _ask(["facts", str(image), _to_json(mask)] for image, mask in pairs)


def perceptual_hashes(images: list[Path]) -> np.ndarray:
    """(N, HASH_SIDE ** 2) bool: the pHash of each image, which a new size, file format or brightness hardly changes."""
    answers = _ask(["perceptual hash", str(image), None] for image in images)
    return np.array(answers, bool).reshape(len(images), HASH_SIDE**2)


def _ask(requests: Iterable[list[Any]]) -> list[Any]:
    """Answers of a process of its own, in order."""
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "model.inspection"],  # -P: nothing of the current folder is imported
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENCV_LOG_LEVEL": "SILENT", "PYTHONPATH": _import_path()},
    )
    if answer.returncode:
        raise RuntimeError(f"looking through the data set failed:\n{answer.stderr}")
    return [json.loads(line) for line in answer.stdout.splitlines()]


def _import_path() -> str:
    """Where this package lies, before whatever the user has set."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def _to_json(mask: Path | Rle | None) -> Any:
    if isinstance(mask, Rle):
        return {**dataclasses.asdict(mask), "file": str(mask.file)}
    return str(mask) if mask else None


def _from_json(value: Any) -> Path | Rle | None:
    if isinstance(value, dict):
        return Rle(**{**value, "file": Path(value["file"]), "runs": tuple(value["runs"])})
    return Path(value) if value else None


def _facts(image_path: Path, mask_source: Path | Rle | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"digest": "", "mask_digest": "", "defect_pixels": 0, "problem": None}
    try:
        facts["digest"] = digest(image_path)
        facts["height"], facts["width"] = decode_image(image_path).shape[:2]
        if mask_source:
            mask = decode_mask(mask_source)
            facts["mask_digest"], facts["defect_pixels"] = digest(mask_source), int(mask.sum())
            if mask.shape != (facts["height"], facts["width"]):
                facts["problem"] = (
                    f"{mask_source}: a mask must have its image's size, {facts['width']}x{facts['height']} px, "
                    f"found {mask.shape[1]}x{mask.shape[0]}; export it again"
                )
    except (ValueError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def digest(source: Path | Rle, read: Read = Path.read_bytes) -> str:
    """SHA-256 of a file's bytes, or of runs. OSError if the file cannot be read."""
    data = json.dumps(dataclasses.astuple(source)[2:]).encode() if isinstance(source, Rle) else read(source)
    return hashlib.sha256(data).hexdigest()


def perceptual_hash(image_HWC: np.ndarray) -> np.ndarray:
    """(HASH_SIDE ** 2) bool: the pHash of one image that is decoded already."""
    import imagehash
    from PIL import Image

    found: np.ndarray = imagehash.phash(Image.fromarray(image_HWC), hash_size=HASH_SIDE).hash.ravel()
    return found


def _perceptual_hash(image_path: Path) -> list[int]:
    return [int(bit) for bit in perceptual_hash(decode_image(image_path))]


def _answer(request: list[Any]) -> Any:
    what, image, mask = request
    return _facts(Path(image), _from_json(mask)) if what == "facts" else _perceptual_hash(Path(image))


def main() -> None:
    """Reads one JSON request a line (what is asked, image, mask), writes one JSON answer a line."""
    cv2.setNumThreads(1)
    requests = [json.loads(line) for line in sys.stdin]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing release the interpreter's lock
        for found in pool.map(_answer, requests):
            print(json.dumps(found))


if __name__ == "__main__":
    main()
