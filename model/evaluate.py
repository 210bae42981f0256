"""Applies a network to a split: one pass that leaves count tables, decision scores and nothing of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from model import metrics
from model.config import RunConfig
from model.data import Cache, to_input
from model.metrics import Array, Floats, PixelCounts
from model.network import SegDecNet
from model.thresholds import ThresholdSearch, decision_threshold, sigmoid


@dataclass(frozen=True)
class Thresholds:
    """What decides pixels and images, found together with the weights that it belongs to.

    A pixel is a defect when its logit in half precision is at least `segmentation_logit`, an image when its decision
    logit is at least `decision_logit`; without negatives there is no decision, and that is None.
    """

    rule: str
    factor: int
    segmentation_logit: float
    decision_logit: float | None

    def to_dict(self) -> dict[str, Any]:
        """With the probabilities, which are for reading."""
        decision = None if self.decision_logit is None else float(sigmoid(self.decision_logit))
        return asdict(self) | {
            "segmentation_probability": float(sigmoid(self.segmentation_logit)),
            "decision_probability": decision,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Thresholds:
        """The inverse of `to_dict`."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Scores:
    """What a network says of a split of N images."""

    search: ThresholdSearch
    counts: PixelCounts
    labels: Array
    """(N,) bool"""
    decision_logits: Floats
    """(N,)"""

    def choose(self, rule: str, factor: int) -> Thresholds:
        """Thresholds by a rule; only ever asked of the validation split."""
        both = self.labels.any() and not self.labels.all()
        decision = decision_threshold(self.labels, self.decision_logits)[0] if both else None
        return Thresholds(rule, factor, self.search.choose(rule, factor), decision)

    def figures(self, thresholds: Thresholds) -> dict[str, float | None]:
        """The figures of a split at given thresholds, under the names of records; None for what cannot exist."""
        selected = self.counts.at(thresholds.segmentation_logit)
        found = metrics.figures(selected, self.labels, self.decision_logits)
        found["threshold"] = float(sigmoid(thresholds.segmentation_logit))
        return {name: None if np.isnan(value) else value for name, value in found.items()}


def predict(
    network: SegDecNet, images_NHWC: Array, config: RunConfig, device: torch.device, batch_size: int = 8
) -> Iterator[tuple[Array, Array]]:
    """(decision logits (B,), segmentation logits (B, H, W)) of one batch after another, as float32."""
    network.eval()
    with torch.inference_mode(), autocast(config, device):
        for start in range(0, len(images_NHWC), batch_size):
            decision, segmentation = network(to_input(images_NHWC[start : start + batch_size], device))
            yield decision[:, 0].float().cpu().numpy(), segmentation[:, 0].float().cpu().numpy()


def score(
    network: SegDecNet, cache: Cache, config: RunConfig, device: torch.device, factors: tuple[int, ...] = (1,)
) -> Scores:
    """One pass over a split. `factors` are those that rule pr_curve may be asked for.

    FloatingPointError if the network returns a number that is not finite.
    """
    search = ThresholdSearch(factors)
    decisions = []
    row = 0
    for decision, segmentation in predict(network, cache.images, config, device):
        if not (np.isfinite(decision).all() and np.isfinite(segmentation).all()):
            raise FloatingPointError("the network returned a number that is not finite")
        for logits_HW in segmentation:
            search.add(cache.masks[row], logits_HW)
            row += 1
        decisions.append(decision)
    return Scores(search, search.counts(), cache.positive, np.concatenate(decisions).astype(np.float64))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where asked for, or where the device computes in it; FeatureNorm and losses stay wide."""
    enabled = config.precision == "bfloat16" or (config.precision == "auto" and _has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
