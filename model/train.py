"""Trains one network. An epoch depends on the configuration, its number and the state before it, on nothing else:
going on from a checkpoint gives, on a CPU, the same weights to the bit as never having stopped.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.arrays import Array, Floats, Ints
from model.config import RunConfig
from model.data import Cache, loader, step_rows
from model.evaluate import autocast
from model.losses import balance, decision_loss, segmentation_losses
from model.network import SegDecNet, build
from model.parallel import ALONE, Team
from model.sample import Batch

_STEPS_BETWEEN_CHECKS = 50
"""A check for a finite loss waits for the device."""

_SEEDING = threading.Lock()
"""Torch has one generator a process, and trials may share a process."""

_HARD_AT = (2.0, 1.0, 0.5, 0.0)
"""standard deviations above the mean score at which an image counts as hard; the first that yields enough"""


class TrainingDiverged(ArithmeticError):
    """The loss or the network's output is no longer a finite number."""


@dataclass
class Training:
    """A network on its way through the epochs of its configuration."""

    config: RunConfig
    network: SegDecNet
    optimizer: torch.optim.Optimizer
    epochs_done: int = 0
    hardness: dict[str, float] = field(default_factory=dict)
    """last mining score of each image, by its name"""
    team: Team = ALONE

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def state(self) -> dict[str, Any]:
        """What `start` takes to go on from here."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs_done": self.epochs_done,
            "hardness": self.hardness,
        }


def start(config: RunConfig, device: torch.device, state: dict[str, Any] | None = None, team: Team = ALONE) -> Training:
    """A fresh network from the configuration's seed, or one that goes on from `Training.state`, whatever team had come
    so far."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.architecture, width=config.width, norm=config.norm).to(device)
    network.gradient_multiplier = 0.0 if config.gradient_adjustment else 1.0
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    training = Training(config, network, kind(network.parameters(), lr=config.learning_rate), team=team)
    if state:
        network.load_state_dict(state["network"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.epochs_done = state["epochs_done"]
        training.hardness = state["hardness"]
    return training


def fit(training: Training, cache: Cache) -> Iterator[dict[str, float]]:
    """Trains the epochs that remain; after each yields its mean losses (segmentation, decision, total).

    The network can be evaluated and saved between epochs. Raises TrainingDiverged.
    """
    while training.epochs_done < training.config.epochs:
        losses = train_epoch(training, cache)
        training.epochs_done += 1
        yield losses


def train_epoch(training: Training, cache: Cache) -> dict[str, float]:
    """One pass over the images of the next epoch; mean losses over images, those of a whole team."""
    config, device, epoch, team = training.config, training.device, training.epochs_done, training.team
    team.meet()  # the first one has kept the epoch before
    step_losses = _StepLosses(training, cache)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    training.network.train()
    sums, images = torch.zeros(2, device=device), 0
    load = loader(cache, config, epoch, device)
    hard = hard_rows(training.hardness, cache, config)
    for step, rows in enumerate(step_rows(cache, config, epoch, hard), start=1):
        training.optimizer.zero_grad(set_to_none=True)
        step_losses.scores.append([])
        for part in _parts(team.own(rows), config.micro_batch):
            total, means = step_losses(load(part))
            (total * (len(part) / len(rows))).backward()
            sums += means * len(part)
        team.sum_gradients(training.network.parameters())
        training.optimizer.step()
        images += len(rows)
        if step % _STEPS_BETWEEN_CHECKS == 0:
            _check_finite(team.summed(sums), epoch)
    sums = team.summed(sums)
    _check_finite(sums, epoch)
    training.hardness.update(team.in_turn(step_losses.scores))
    of_segmentation, of_decision = (sums / images).tolist()
    return {
        "loss_segmentation": of_segmentation,
        "loss_decision": of_decision,
        "loss_total": step_losses.weights[0] * of_segmentation + step_losses.weights[1] * of_decision,
    }


def learning_rate(config: RunConfig, epoch: int) -> float:
    """The step size of an epoch counted from 0: constant, cut every so many epochs, or half a cosine to 0."""
    if config.schedule == "step":
        return config.learning_rate * config.schedule_gamma ** (epoch // config.schedule_step)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.learning_rate


class _StepLosses:
    """The losses of a batch in one epoch, with all their weights; notes how hard each image was."""

    def __init__(self, training: Training, cache: Cache) -> None:
        config = training.config
        self.training, self.cache = training, cache
        self.scores: list[list[tuple[str, float]]] = []
        """name and mining score of each image of each step"""
        # Without negatives the image label says nothing; one class alone would drive the decision to infinity.
        delta = config.delta_cls_loss if not cache.positive.all() else 0.0
        self.weights = balance(training.epochs_done, config.epochs, delta, config.dynamic_balance)
        self.pixel_weight = _or_balanced(config.pixel_positive_weight, lambda: _pixel_balance(cache, config.dilate))
        self.image_weight = _or_balanced(
            config.image_positive_weight, lambda: float((~cache.positive).sum() / cache.positive.sum())
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The total loss, and the means (2,) of both parts without their weights in the total."""
        config = self.training.config
        with autocast(config, self.training.device):
            decision, segmentation = self.training.network(batch.images_BCHW)
        each = segmentation_losses(
            segmentation, batch.targets_B1HW, batch.segmented_B, batch.weights_B1HW, self.pixel_weight
        )
        if config.hard_mining_places:
            scores = hardness(config.hard_mining_score, each, decision, segmentation, batch).tolist()
            names = (self.cache.samples[row].name for row in batch.rows)
            self.scores[-1] += zip(names, scores, strict=True)
        of_decision = decision_loss(decision, batch.labels_B1, self.image_weight)
        total = self.weights[0] * each.mean() + self.weights[1] * of_decision
        return total, torch.stack([each.mean(), of_decision]).detach()


def _or_balanced(value: float | str, balanced: Any) -> float:
    return balanced() if value == "balanced" else float(value)


def _pixel_balance(cache: Cache, dilate: int) -> float:
    """Sound over defect pixels of the training targets, [2]."""
    targets, rows = cache.targets(dilate), np.flatnonzero(cache.segmented)
    defect = sum(int(np.count_nonzero(targets[row])) for row in rows)  # one at a time: a split may not fit in memory
    return (len(rows) * targets[0].size - defect) / max(defect, 1)


def hardness(score: str, losses_B: Tensor, decision_B1: Tensor, map_B1HW: Tensor, batch: Batch) -> Tensor:
    """(B,) how hard each image was, by one of the three scores of [2]; masks are cut at probability 0.5."""
    losses = losses_B.detach()
    if score == "loss":
        return losses
    probability = torch.sigmoid(map_B1HW.detach().float())
    if score == "disagreement":
        return (probability.amax(dim=(1, 2, 3)) - torch.sigmoid(decision_B1.detach().float())[:, 0]).abs()
    mask, truth = probability >= 0.5, batch.targets_B1HW > 0.5
    false_alarms = (mask & ~truth).sum(dim=(1, 2, 3))
    misses = (~mask & truth).sum(dim=(1, 2, 3))
    return losses * (2 * false_alarms + misses + 1)


def hard_rows(last: dict[str, float], cache: Cache, config: RunConfig) -> Array:
    """Rows of the images that were hard when last seen, hardest first; none before any was seen.

    Images whose score is over 2, else 1, 0.5, 0 standard deviations above the mean: the first set that is at least
    the share asked for, or the last one.
    """
    names = {sample.name: row for row, sample in enumerate(cache.samples)}
    if not config.hard_mining_places or not last:
        return np.zeros(0, np.int64)
    rows = np.array([names[name] for name in last])
    scores: Floats = np.array(list(last.values()))
    chosen = rows[:0]
    for spread in _HARD_AT:
        over = scores > scores.mean() + spread * scores.std()
        chosen = rows[over][np.argsort(-scores[over], kind="stable")]
        if len(chosen) >= config.hard_mining_share * len(rows):
            break
    return chosen


def _parts(rows: Ints, size: int) -> Iterator[Ints]:
    """Rows of a batch that are on the device at a time; their gradients, weighted by their sizes, add up to its own."""
    size = size or len(rows)
    for start in range(0, len(rows), size or 1):
        yield rows[start : start + size]


def _check_finite(sums: Tensor, epoch: int) -> None:
    if not torch.isfinite(sums).all():
        raise TrainingDiverged(f"the loss of epoch {epoch + 1} is not a finite number")
