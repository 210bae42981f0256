"""Trains one network. An epoch depends on the configuration, its number and the state before it, on nothing else:
going on from a checkpoint gives, on a CPU, the same weights to the bit as never having stopped.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.arrays import Array, Floats, Ints
from model.config import RunConfig
from model.data import Cache, prefetched, step_rows
from model.fast import compute_dtype, forward, lay_out
from model.losses import balance, decision_loss, segmentation_losses
from model.network import SegDecNet, build
from model.parallel import ALONE, Team
from model.sample import Batch
from model.step import FiniteCheck, Recorder, own_stream

_STEPS_BETWEEN_CHECKS = 50
"""of the loss, which has to be a finite number"""

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
    steps: Steps | None = None
    """made with the first epoch"""
    after_step: Callable[[], object] | None = None
    """told of every step, for who measures"""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def state(self) -> dict[str, Any]:
        """What `start` takes to go on from here."""
        optimizer = self.optimizer.state_dict()
        groups = [group | {"lr": float(group["lr"])} for group in optimizer["param_groups"]]
        return {
            "network": self.network.state_dict(),
            "optimizer": optimizer | {"param_groups": groups},
            "epochs_done": self.epochs_done,
            "hardness": self.hardness,
        }


def start(config: RunConfig, device: torch.device, state: dict[str, Any] | None = None, team: Team = ALONE) -> Training:
    """A fresh network from the configuration's seed, or one that goes on from `Training.state`, whatever team had come
    so far."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.architecture, width=config.width, norm=config.norm).to(device)
    lay_out(network)
    network.gradient_multiplier = 0.0 if config.gradient_adjustment else 1.0
    training = Training(config, network, _optimizer(config, network, device), team=team)
    if state:
        network.load_state_dict(state["network"])
        # The groups say how an optimizer runs on its device, which may be another one than before.
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        _lay_out_state(training.optimizer)
        training.epochs_done = state["epochs_done"]
        training.hardness = state["hardness"]
    return training


def _optimizer(config: RunConfig, network: SegDecNet, device: torch.device) -> torch.optim.Optimizer:
    if device.type != "cuda":
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        return kind(network.parameters(), lr=config.learning_rate)
    # One kernel for all weights; its step size lies where a recorded step finds it.
    step_size = torch.tensor(config.learning_rate, device=device)
    if config.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=step_size, fused=True)
    adam = torch.optim.Adam(network.parameters(), lr=step_size, fused=True, capturable=config.cuda_graphs)
    adam._warned_capturable_if_run_uncaptured = True  # of its first steps, as is meant
    return adam


def _lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Orders what an optimizer keeps of each weight in memory as the weight itself, which one kernel for all wants."""
    for weight, kept in optimizer.state.items():
        for name, value in kept.items():
            if value.shape == weight.shape:
                kept[name] = torch.empty_like(weight).copy_(value)


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
    if training.steps is None or training.steps.cache is not cache:
        training.steps = Steps(training, cache)
    hard = hard_rows(training.hardness, cache, config)
    training.network.train()
    images = 0
    with own_stream(device):
        steps = training.steps
        steps.begin(epoch)
        check = FiniteCheck(steps.sums)
        planned = [
            (len(rows), list(_parts(team.own(rows), config.micro_batch)))
            for rows in step_rows(cache, config, epoch, hard)
        ]
        parts = (part for _, parts in planned for part in parts)
        with closing(prefetched(cache, config, epoch, device, parts)) as batches:
            for step, (size, own) in enumerate(planned, start=1):
                steps.train(size, itertools.islice(batches, len(own)), is_whole=team.ranks == len(own) == 1)
                images += size
                if training.after_step:
                    training.after_step()
                if step % _STEPS_BETWEEN_CHECKS == 0 and not check.look():
                    _diverged(epoch)
        sums = team.summed(steps.sums).tolist()
        scores = steps.scores()
    if not np.isfinite(sums).all():
        _diverged(epoch)
    training.hardness.update(team.in_turn(scores))
    of_segmentation, of_decision = (total / images for total in sums)
    weights = steps.weights_of(epoch)
    return {
        "loss_segmentation": of_segmentation,
        "loss_decision": of_decision,
        "loss_total": weights[0] * of_segmentation + weights[1] * of_decision,
    }


def _diverged(epoch: int) -> None:
    raise TrainingDiverged(f"the loss of epoch {epoch + 1} is not a finite number")


def learning_rate(config: RunConfig, epoch: int) -> float:
    """The step size of an epoch counted from 0: constant, cut every so many epochs, or half a cosine to 0."""
    if config.schedule == "step":
        return config.learning_rate * config.schedule_gamma ** (epoch // config.schedule_step)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.learning_rate


class Steps:
    """The steps of a training on one split, with all weights of the losses; notes how hard each image was."""

    def __init__(self, training: Training, cache: Cache) -> None:
        config, device = training.config, training.device
        self.config, self.cache, self.team = config, cache, training.team
        self.network, self.optimizer = training.network, training.optimizer
        self.dtype = compute_dtype(config, training.network)
        self.epoch = 0
        self.pixel_weight = _or_balanced(config.pixel_positive_weight, lambda: _pixel_balance(cache, config.dilate))
        self.image_weight = _or_balanced(
            config.image_positive_weight, lambda: float((~cache.positive).sum() / cache.positive.sum())
        )
        self.weights = torch.zeros(2, device=device)
        """of the segmentation and the decision loss in this epoch"""
        self.sums = torch.zeros(2, device=device)
        """of both losses without these weights, over images"""
        self._scores: list[list[tuple[Ints, Tensor]]] = []
        self._whole_step = Recorder(device.type == "cuda" and config.cuda_graphs)

    def weights_of(self, epoch: int) -> tuple[float, float]:
        """The weights of the losses in an epoch counted from 0."""
        # Without negatives the image label says nothing; one class alone would drive the decision to infinity.
        delta = self.config.delta_cls_loss if not self.cache.positive.all() else 0.0
        return balance(epoch, self.config.epochs, delta, self.config.dynamic_balance)

    def begin(self, epoch: int) -> None:
        """Makes ready for an epoch counted from 0."""
        self.epoch = epoch
        self.weights.copy_(torch.tensor(self.weights_of(epoch)))
        self.sums.zero_()
        self._scores = []
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate(self.config, epoch))
            else:
                group["lr"] = learning_rate(self.config, epoch)

    def train(self, size: int, parts: Iterator[Batch], is_whole: bool) -> None:
        """One step by a batch of `size` images, of which the parts may be all or what this one of a team takes."""
        self._scores.append([])
        if is_whole:
            batch = next(parts)
            self._note(batch.rows, self._whole_step(self._train_whole, batch))
            return
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            self._note(part.rows, self._add_gradients(part, len(part.rows) / size))
        self.team.sum_gradients(self.network.parameters())
        self.optimizer.step()

    def _train_whole(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        scores = self._add_gradients(batch, 1.0)
        self.optimizer.step()
        return scores

    def _add_gradients(self, batch: Batch, share: float) -> Tensor:
        """Those of the total loss of a part of a batch; returns how hard each image was (B,)."""
        decision, segmentation = forward(self.network, batch.images_BCHW, self.dtype)
        each = segmentation_losses(
            segmentation, batch.targets_B1HW, batch.segmented_B, batch.weights_B1HW, self.pixel_weight
        )
        losses = torch.stack([each.mean(), decision_loss(decision, batch.labels_B1, self.image_weight)])
        ((losses * self.weights).sum() * share).backward()
        self.sums += losses.detach() * len(each)
        if not self.config.hard_mining_places:
            return each.detach()
        return hardness(self.config.hard_mining_score, each, decision, segmentation, batch)

    def _note(self, rows: Ints, scores: Tensor) -> None:
        if self.config.hard_mining_places:
            self._scores[-1].append((rows, scores.clone()))  # read when the epoch is over: to read is to wait

    def scores(self) -> list[list[tuple[str, float]]]:
        """Name and mining score of each image of each step of the epoch."""
        names = self.cache.samples
        return [
            [
                (names[row].name, score)
                for rows, scores in step
                for row, score in zip(rows, scores.tolist(), strict=True)
            ]
            for step in self._scores
        ]


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
