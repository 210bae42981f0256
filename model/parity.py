"""Whether an exported file answers as the network does that it was made from, on real images.

N images, H x W px.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model.arrays import Array
from model.export import Answerer, Answers, Deployable, other_size

TOLERANCE = 1e-4
"""by which probabilities and scores may differ"""

EDGE = 1e-3
"""Two runtimes add in different orders. A pixel may differ where its logit lies this near to a number at which the
answer turns, a part of what rounding to half precision leaves open: such numbers are 0.004 apart at logits of 4."""

SAME_NETWORK = 0.5
"""by which a probability may differ from what the evaluation found; bfloat16 has been seen to move one by 0.06, and
another epoch of the same training moves some by nearly 1"""

_TOGETHER = 4
"""images of a batch: more would need gigabytes"""


class Mismatch(RuntimeError):
    """The file answers otherwise than the network."""


@dataclass(frozen=True)
class Parity:
    """What was compared, and how far file and network are apart."""

    images: int
    pixels: int
    probability: float
    """largest difference"""
    score: float
    """largest difference"""
    edge_pixels: int
    """of the masks, that differ since they lie on the edge"""
    unlike_judged: int
    """of the masks of the images, that the evaluation found otherwise"""
    judged_probability: float
    """largest difference to what the evaluation found"""


class Judged(NamedTuple):
    """What the evaluation found in some images, perhaps on another device in bfloat16."""

    names: Sequence[str]
    image: Array
    """(N, H, W, 3) uint8"""
    probability: Array
    """(N, H, W)"""
    mask: Array
    """(N, H, W) bool"""


@dataclass(frozen=True)
class _Batch:
    what: str
    images_NHWC: Array
    row: int | None = None
    """of the image, where it is alone and as it was judged"""


def compare(module: Deployable, answer: Answerer, judged: Judged) -> Parity:
    """The module in single precision against what was made from it: each image alone, some together, one at another
    size. Mismatch that says which image and how far."""
    probability = score = judged_probability = 0.0
    edge_pixels = pixels = unlike_judged = 0
    for batch in _batches(judged):
        with torch.inference_mode():
            decision_N, segmentation_NHW = module.logits(torch.from_numpy(batch.images_NHWC))
            wanted = Answers(*(one.numpy() for one in module.decide(decision_N, segmentation_NHW)))
            is_edge_NHW = (module.from_edge(segmentation_NHW) <= EDGE).numpy()
        found = answer(batch.images_NHWC)
        for name, one, other in zip(Answers._fields, wanted, found, strict=True):
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise _mismatch(batch, f"{name} as {one.dtype} {one.shape}", f"{other.dtype} {other.shape}")
        differs_NHW = wanted.mask != found.mask
        if beyond := int((differs_NHW & ~is_edge_NHW).sum()):
            raise _mismatch(batch, "equal masks", f"{beyond:,} pixels that differ")
        if (wanted.defect != found.defect).any():
            raise _mismatch(batch, f"the decision {wanted.defect.tolist()}", f"{found.defect.tolist()}")
        for name in ("probability", "score"):
            apart = _apart(getattr(wanted, name), getattr(found, name))
            if not apart <= TOLERANCE:
                raise _mismatch(batch, f"each {name} to within {TOLERANCE:g}", f"one that is {apart:.3g} off")
        probability = max(probability, _apart(wanted.probability, found.probability))
        score = max(score, _apart(wanted.score, found.score))
        edge_pixels += int(differs_NHW.sum())
        pixels += differs_NHW.size
        if batch.row is not None:
            unlike_judged += int((wanted.mask[0] != judged.mask[batch.row]).sum())
            apart = _apart(wanted.probability[0], judged.probability[batch.row])
            if not apart <= SAME_NETWORK:
                raise Mismatch(
                    f"the network must answer as the one that was judged, with each probability to within "
                    f"{SAME_NETWORK:g}, found one that is {apart:.3g} off, for {batch.what}; no file is written; the "
                    "weights or the evaluation were changed: restore them from a copy of the run"
                )
            judged_probability = max(judged_probability, apart)
    return Parity(len(judged.names), pixels, probability, score, edge_pixels, unlike_judged, judged_probability)


def _batches(judged: Judged) -> Iterator[_Batch]:
    for n, name in enumerate(judged.names):
        yield _Batch(f"image {name!r}", judged.image[n : n + 1], n)
    yield _Batch(f"the first {min(_TOGETHER, len(judged.names))} images together", judged.image[:_TOGETHER])
    larger = other_size(judged.image[:1])
    yield _Batch(f"image {judged.names[0]!r}, mirrored on to {larger.shape[1]}x{larger.shape[2]} px", larger)


def _apart(one: Array, other: Array) -> float:
    """The largest difference; NaN where a number is none."""
    return float(np.abs(one.astype(np.float64) - other).max())


def _mismatch(batch: _Batch, wanted: str, found: str) -> Mismatch:
    return Mismatch(
        f"the exported file must answer as the network that it is made from, with {wanted}, found {found}, for "
        f"{batch.what}; no file is written; use the versions of torch, onnx, onnxscript and onnxruntime that "
        "constraints.txt names"
    )
