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
from model.export import Deployable, other_size
from model.tiles import Answerer, Answers

TOLERANCE = 1e-4
"""by which probabilities and scores may differ"""

EDGE = 1e-3
"""Two runtimes add in different orders. A pixel may differ where its logit lies this near to a number at which the
answer turns, a part of what rounding to half precision leaves open: such numbers are 0.004 apart at logits of 4."""

SAME_NETWORK = 0.5
"""by which a probability may differ from what the evaluation found; bfloat16 has been seen to move one by 0.07"""

SAME_MASKS = 0.2
"""of the mask pixels, here or in the evaluation, that may be in one of both alone; in bfloat16 1 % have been seen"""

_SAME_DECISION = 0.5, 0.1
"""by which a decision's logit may differ from the evaluation's: so much, and this part of it more. bfloat16 has been
seen to move one by 0.12"""

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
    unlike_decided: int
    """of the images, that the evaluation decided otherwise"""
    judged_decision: float | None
    """largest difference of a decision's logit to what the evaluation found; None where no decision was trained"""


class Judged(NamedTuple):
    """What the evaluation found in some images, perhaps on another device in bfloat16."""

    names: Sequence[str]
    image: Array
    """(N, H, W, 3) uint8"""
    probability: Array
    """(N, H, W)"""
    mask: Array
    """(N, H, W) bool"""
    decision: Array
    """(N,) logits; of no meaning where no decision was trained"""


class _AgainstJudged:
    """How far the network is from what the evaluation found, image by image."""

    def __init__(self, module: Deployable, judged: Judged) -> None:
        self.thresholds = module.thresholds
        self.judged = judged
        self.unlike_masks = self.mask_pixels = self.unlike_decided = 0
        self.probability = 0.0
        self.decision = None if self.thresholds.decision_logit is None else 0.0

    def add(self, n: int, decision_logit: float, found: Answers) -> None:
        """The network's answer for image n. Mismatch if it is no other runtime's or precision's, but another's."""
        where = f"image {self.judged.names[n]!r}"
        mask, other = found.mask[0] > 0, self.judged.mask[n]
        self.unlike_masks += int((mask != other).sum())
        self.mask_pixels += int((mask | other).sum())
        apart = _apart(found.probability[0], self.judged.probability[n])
        if not apart <= SAME_NETWORK:
            raise _another(f"each probability to within {SAME_NETWORK:g}", f"one that is {apart:.3g} off", where)
        self.probability = max(self.probability, apart)
        if self.decision is None:
            return
        wanted = float(self.judged.decision[n])
        absolute, relative = _SAME_DECISION
        if not abs(decision_logit - wanted) <= absolute + relative * abs(wanted):
            raise _another(f"the decision's logit near {wanted:.4g}", f"{decision_logit:.4g}", where)
        self.decision = max(self.decision, abs(decision_logit - wanted))
        self.unlike_decided += int(bool(found.defect[0]) != bool(self.thresholds.decide(np.array([wanted]))[0]))

    def end(self) -> None:
        """Mismatch if the masks together are another network's."""
        if self.unlike_masks > SAME_MASKS * self.mask_pixels:
            raise _another(
                f"at most {SAME_MASKS:.0%} of the mask pixels in one of both alone",
                f"{self.unlike_masks:,} of {self.mask_pixels:,}",
                f"the {len(self.judged.names)} images together",
            )


@dataclass(frozen=True)
class _Batch:
    what: str
    images_NHWC: Array
    row: int | None = None
    """of the image, where it is alone and as it was judged"""


def compare(module: Deployable, answer: Answerer, judged: Judged) -> Parity:
    """The module in single precision against what was made from it: each image alone, some together, one at another
    size. Mismatch that says which image and how far."""
    probability = score = 0.0
    edge_pixels = pixels = 0
    against = _AgainstJudged(module, judged)
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
            against.add(batch.row, float(decision_N[0]), wanted)
    against.end()
    return Parity(
        images=len(judged.names),
        pixels=pixels,
        probability=probability,
        score=score,
        edge_pixels=edge_pixels,
        unlike_judged=against.unlike_masks,
        judged_probability=against.probability,
        unlike_decided=against.unlike_decided,
        judged_decision=against.decision,
    )


def check_judged(module: Deployable, judged: Judged) -> None:
    """Mismatch if the module does not answer as the network that was judged: for the zip, whose model needs no file."""
    against = _AgainstJudged(module, judged)
    for n in range(len(judged.names)):
        with torch.inference_mode():
            decision_N, segmentation_NHW = module.logits(torch.from_numpy(judged.image[n : n + 1]))
            found = Answers(*(one.numpy() for one in module.decide(decision_N, segmentation_NHW)))
        against.add(n, float(decision_N[0]), found)
    against.end()


def _batches(judged: Judged) -> Iterator[_Batch]:
    for n, name in enumerate(judged.names):
        yield _Batch(f"image {name!r}", judged.image[n : n + 1], n)
    yield _Batch(f"the first {min(_TOGETHER, len(judged.names))} images together", judged.image[:_TOGETHER])
    larger = other_size(judged.image[:1])
    yield _Batch(f"image {judged.names[0]!r}, mirrored on to {larger.shape[1]}x{larger.shape[2]} px", larger)


def _apart(one: Array, other: Array) -> float:
    """The largest difference; NaN where a number is none."""
    return float(np.abs(one.astype(np.float64) - other).max())


def _another(wanted: str, found: str, where: str) -> Mismatch:
    return Mismatch(
        f"the network must answer as the one that was judged, with {wanted}, found {found}, for {where}; no file is "
        "written; the weights or the evaluation were changed: restore them from a copy of the run"
    )


def _mismatch(batch: _Batch, wanted: str, found: str) -> Mismatch:
    return Mismatch(
        f"the exported file must answer as the network that it is made from, with {wanted}, found {found}, for "
        f"{batch.what}; no file is written; use the versions of torch, onnx, onnxscript and onnxruntime that "
        "constraints.txt names"
    )
