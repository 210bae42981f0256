"""Applies a network to a split: one pass that leaves count tables, decision scores and nothing of the images.

B images of a batch, N of a split, H x W px.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from model import metrics
from model.arrays import Array, Floats
from model.batch_counts import tally_batch, tally_every
from model.centre_lines import CentreLines, trace
from model.config import Judgement, RunConfig
from model.counts import CountsBuilder, PixelCounts, tally, to_half
from model.data import Cache, Rows, input_batches, queued_so_far
from model.fast import compute_dtype, forward
from model.network import SegDecNet
from model.step import first_of_its_shape
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
        return ThresholdSearch(self.counts, self.strided, kept, like=self._search)

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
        """The figures of a split at each of some thresholds, under the names of records; None for what cannot exist.

        Judgements that come to the same masks share them, and what was asked for before is known.
        """
        # What the figures depend on; rule and factor only say how it was found.
        alike = {one: replace(one, rule="", factor=1, chosen_on="") for one in found}
        new = [one for one in dict.fromkeys(alike.values()) if one not in self._figures]
        for one, selected in zip(new, select_all(new, self.counts, self.decision_logits), strict=True):
            values = metrics.figures(selected, self.labels, self.decision_logits)
            values["threshold"] = float(sigmoid(one.segmentation_logit))
            self._figures[one] = {name: None if np.isnan(value) else value for name, value in values.items()}
        return [dict(self._figures[alike[one]]) for one in found]

    @cached_property
    def _figures(self) -> dict[Thresholds, dict[str, float | None]]:
        return {}


def predict(
    network: SegDecNet,
    images_NHWC: Array | Rows,
    config: RunConfig,
    device: torch.device,
    batch_size: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(decision logits (B,), segmentation logits (B, H, W)) of one batch after another, float32 on the device.

    FloatingPointError if the network returns a number that is not finite; on a GPU after the last batch.
    """
    network.eval()
    dtype = compute_dtype(config, network)
    batch_size = batch_size or (8 if device.type == "cpu" else 16)
    finite = torch.ones((), dtype=torch.bool, device=device)
    sizes: set[int] = set()
    for inputs in input_batches(images_NHWC, device, batch_size):
        is_new = device.type == "cuda" and len(inputs) not in sizes
        sizes.add(len(inputs))
        with torch.inference_mode(), first_of_its_shape(tries=False) if is_new else nullcontext():
            answers = forward(network, inputs, dtype)
        decision, segmentation = (answer[:, 0].float() for answer in answers)
        finite = finite & decision.isfinite().all() & segmentation.isfinite().all()
        if device.type == "cpu":
            _refuse_infinite(finite)
        yield decision, segmentation
    _refuse_infinite(finite)  # once: to ask a GPU is to wait for it


def _refuse_infinite(finite: torch.Tensor) -> None:
    if not finite:
        raise FloatingPointError("the network returned a number that is not finite")


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
    counts = {factor: CountsBuilder() for factor in {1, *factors}}
    count = _count_images if device.type == "cpu" else _count_batch
    lines: list[CentreLines] = []
    decisions: list[float] = []
    beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # before the next batch
    for (decision, segmentation), queued in _one_behind(predict(network, cache.images, config, device)):
        # Counting waits for its own results: on a stream of its own it does not make the network wait too.
        with torch.cuda.stream(beside) if beside else nullcontext():
            if beside and queued:
                beside.wait_event(queued)
            first_row = len(decisions)
            decisions += decision.tolist()
            half_BHW = to_half(segmentation)
            masks_BHW = np.array(cache.masks[first_row : len(decisions)])
            count(counts, half_BHW, masks_BHW, first_row)
            if centre_lines_at:
                shown = zip(masks_BHW, half_BHW.cpu().numpy(), decisions[first_row:], strict=True)
                lines += [trace(truth, centre_lines_at.mask(logits, decision)) for truth, logits, decision in shown]
    return Scores(
        counts[1].build(),
        {factor: builder.build() for factor, builder in counts.items() if factor > 1},
        cache.positive,
        to_half(np.array(decisions)).astype(np.float64),
        CentreLines(*np.array(lines).T) if lines else None,
    )


def _count_images(counts: dict[int, CountsBuilder], half_BHW: torch.Tensor, masks_BHW: Array, first_row: int) -> None:
    """With numpy, an image at a time: the fastest way on a processor."""
    for row, (half_HW, mask_HW) in enumerate(zip(half_BHW.numpy(), masks_BHW, strict=True), start=first_row):
        for factor, builder in counts.items():
            if factor == 1:
                builder.add(tally(np, half_HW, mask_HW))
            else:
                # Every n-th pixel of the flattened split: the first one here depends on the images before.
                first = -row * mask_HW.size % factor
                half_P, mask_P = (one.ravel()[None, first::factor] for one in (half_HW, mask_HW))
                builder.add(tally(np, half_P, mask_P, tolerance=0))


def _count_batch(counts: dict[int, CountsBuilder], half_BHW: torch.Tensor, masks_BHW: Array, first_row: int) -> None:
    """On the device, where each operation and each wait costs as much for an image as for many."""
    truth_BHW = torch.from_numpy(masks_BHW).to(half_BHW.device)
    for factor, builder in counts.items():
        packed = (
            tally_batch(half_BHW, truth_BHW) if factor == 1 else tally_every(half_BHW, truth_BHW, factor, first_row)
        )
        builder.extend(*packed.on_host())


def _one_behind(
    answers: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.cuda.Event | None]]:
    """On a GPU each batch when the next one is queued, with the event after which it is there; else each at once."""
    before = None
    for answer in answers:
        if answer[0].device.type != "cuda":
            yield answer, None
            continue
        queued = queued_so_far()
        if before:
            yield before
        before = answer, queued
    if before:
        yield before
