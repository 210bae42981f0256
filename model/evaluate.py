"""Applies a network to a split: one pass that leaves count tables, decision scores and nothing of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model import metrics
from model.config import RunConfig
from model.data import Cache, to_input
from model.metrics import Array, Floats, PixelCounts
from model.network import SegDecNet
from model.thresholds import Thresholds, ThresholdSearch, decision_threshold, sigmoid


@dataclass(frozen=True)
class Scores:
    """What a network says of a split of N images."""

    search: ThresholdSearch
    counts: PixelCounts
    labels: Array
    """(N,) bool"""
    decision_logits: Floats
    """(N,)"""

    def choose(self, rule: str, factor: int, config: RunConfig) -> Thresholds:
        """Thresholds by a rule, with the configuration's way of applying them; only ever asked of validation."""
        decision, _ = self.decision()
        kept = self.decision_logits >= decision if config.blacken and decision is not None else None
        threshold = self.search.choose(rule, factor, kept)
        return Thresholds(rule, factor, threshold, decision, config.blacken, config.lower_threshold)

    def decision(self) -> tuple[float | None, float | None]:
        """The decision threshold, a logit, and its F measure; None without both classes."""
        if self.labels.all() or not self.labels.any():
            return None, None
        return decision_threshold(self.labels, self.decision_logits)

    def figures(self, thresholds: Thresholds) -> dict[str, float | None]:
        """The figures of a split at given thresholds, under the names of records; None for what cannot exist."""
        selected = thresholds.select(self.counts, self.decision_logits)
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
