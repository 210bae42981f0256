"""What one image is to the method. B images, C channels (RGB), H x W px of the network's input."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # reading a data set needs no torch
    from torch import Tensor

    from model.arrays import Array


class Supervision(enum.Enum):
    """What is known of an image in training. The image label is always known."""

    PIXEL = "pixel"
    """its mask; the empty one for a negative"""
    IMAGE = "image"
    """its label alone"""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask without a file of its own: runs of defect pixels, counted from 1 down the columns (Severstal's CSV)."""

    file: Path
    """the CSV, for messages"""
    image: str
    """the image's name there, for messages"""
    runs: tuple[str, ...]
    """one text 'start length start length ...' a class; a pixel of any class is a defect"""
    height: int
    width: int
    """px of the image that the runs count"""

    def __str__(self) -> str:
        return f"{self.file}, {self.image}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image of a data set. The label is stated, never read off a mask that may be absent or shrunk."""

    name: str
    image: Path
    mask: Path | Rle | None
    """None where there is none: an unlabelled positive, or a negative"""
    positive: bool
    supervision: Supervision
    group: str
    """images of one group (one photo, one item) stay on one side of a split"""
    source: str = ""
    split: str | None = None
    """train, validation or test where the data set fixes it"""
    digest: str
    """SHA-256 of the image file"""
    mask_digest: str
    """SHA-256 of the mask file or of its runs, or empty"""


class Batch(NamedTuple):
    """What one training step sees."""

    images_BCHW: Tensor
    """float32 in 0..1"""
    targets_B1HW: Tensor
    """float32, 0 or 1: the dilated masks; zeros where there is none"""
    weights_B1HW: Tensor | None
    """float32 loss weights, or None for 1"""
    labels_B1: Tensor
    """float32, 0 or 1"""
    segmented_B: Tensor
    """float32, 1 for pixel supervision"""
    rows: Array
    """(B,) where the images stand in their split"""
