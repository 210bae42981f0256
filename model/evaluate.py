"""Applies a network to a split: one pass that leaves count tables, decision scores and nothing of the images.

B images of a batch, N of a split, H x W px.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from model import metrics
from model.arrays import Array, Floats
from model.centre_lines import CentreLines, trace
from model.config import Judgement, RunConfig
from model.counts import CountsBuilder, PixelCounts, tally, to_half
from model.data import Cache, Rows, to_input
from model.network import SegDecNet
from model.thresholds import Thresholds, ThresholdSearch, decision_threshold, select_all, sigmoid


@dataclass(frozen=True)
class Scores:
    """What a network says of a split of N images."""

    counts: PixelCounts
    strided: dict[int, PixelCounts]
    """of every n-th pixel of the split, by n"""
    labels: Array
    """(N,) bool"""
    decision_logits: Floats
    """(N,) rounded to half precision, as thresholds compare them"""
    centre_lines: CentreLines | None = None
    """where they were asked for"""

    def choose(self, judgement: Judgement, chosen_on: str = "validation") -> Thresholds:
        """Thresholds as a judgement wants them."""
        decision, _ = self.decision
        search = self._search_blackened if judgement.blacken else self._search
        rule, factor = judgement.threshold_rule, judgement.threshold_factor
        found = search.choose(rule, factor)
        return Thresholds(rule, factor, found, decision, judgement.blacken, judgement.lower_threshold, chosen_on)

    @cached_property
    def _search(self) -> ThresholdSearch:
        return ThresholdSearch(self.counts, self.strided, np.ones(len(self.labels), bool))

    @cached_property
    def _search_blackened(self) -> ThresholdSearch:
        decision, _ = self.decision
        kept = self._search.kept_N if decision is None else self.decision_logits >= decision
        return ThresholdSearch(self.counts, self.strided, kept)

    @cached_property
    def decision(self) -> tuple[float | None, float | None]:
        """The decision threshold, a logit, and its F measure; None without both classes."""
        if self.labels.all() or not self.labels.any():
            return None, None
        return decision_threshold(self.labels, self.decision_logits)

    @cached_property
    def decision_rates(self) -> dict[str, float | None]:
        """The rates of the decision at its threshold, under the names of records; None for what cannot exist."""
        decision, _ = self.decision
        if decision is None:
            return {}
        rates = metrics.decision_figures(metrics.confusion(self.labels, self.decision_logits >= decision))
        return {name: None if np.isnan(value) else value for name, value in rates.items()}

    def figures(self, found: list[Thresholds]) -> list[dict[str, float | None]]:
        """The figures of a split at each of some thresholds, under the names of records; None for what cannot exist."""
        out = []
        for one, selected in zip(found, select_all(found, self.counts, self.decision_logits), strict=True):
            values = metrics.figures(selected, self.labels, self.decision_logits)
            values["threshold"] = float(sigmoid(one.segmentation_logit))
            out.append({name: None if np.isnan(value) else value for name, value in values.items()})
        return out


def predict(
    network: SegDecNet, images_NHWC: Array | Rows, config: RunConfig, device: torch.device, batch_size: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(decision logits (B,), segmentation logits (B, H, W)) of one batch after another, float32 on the device.

    FloatingPointError if the network returns a number that is not finite.
    """
    network.eval()
    for start in range(0, len(images_NHWC), batch_size):
        with torch.inference_mode(), autocast(config, device):
            answers = network(to_input(images_NHWC[start : start + batch_size], device))
        decision, segmentation = (answer[:, 0].float() for answer in answers)
        if not (decision.isfinite().all() and segmentation.isfinite().all()):
            raise FloatingPointError("the network returned a number that is not finite")
        yield decision, segmentation


def score(
    network: SegDecNet,
    cache: Cache,
    config: RunConfig,
    device: torch.device,
    factors: tuple[int, ...] = (1,),
    centre_lines_at: Thresholds | None = None,
) -> Scores:
    """One pass over a split. `factors` are those that rule pr_curve may be asked for; where thresholds are known, the
    centre lines of the masks that they give are traced too."""
    on_cpu = device.type == "cpu"
    xp = np if on_cpu else torch  # numpy is the faster one there
    counts = CountsBuilder()
    strided = {factor: CountsBuilder() for factor in factors if factor > 1}
    lines: list[CentreLines] = []
    decisions: list[float] = []
    for decision, segmentation in predict(network, cache.images, config, device):
        for decision_logit, half_HW in zip(decision.tolist(), to_half(segmentation), strict=True):
            row = len(decisions)
            mask_HW = np.array(cache.masks[row])
            there = (half_HW.numpy(), mask_HW) if on_cpu else (half_HW, torch.from_numpy(mask_HW).to(device))
            counts.add(tally(xp, *there))
            for factor, builder in strided.items():
                # Every n-th pixel of the flattened split: the first one here depends on the images before.
                first = -row * mask_HW.size % factor
                half_P, mask_P = (one.ravel()[None, first::factor] for one in there)
                builder.add(tally(xp, half_P, mask_P, tolerance=0))
            if centre_lines_at:
                lines.append(trace(mask_HW, centre_lines_at.mask(half_HW.cpu().numpy(), decision_logit)))
            decisions.append(decision_logit)
    return Scores(
        counts.build(),
        {factor: builder.build() for factor, builder in strided.items()},
        cache.positive,
        to_half(np.array(decisions)).astype(np.float64),
        CentreLines(*np.array(lines).T) if lines else None,
    )


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where asked for, or where the device computes in it; FeatureNorm and losses stay wide."""
    enabled = config.precision == "bfloat16" or (config.precision == "auto" and _has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
