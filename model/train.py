"""Trains one network. An epoch depends on the configuration, its number and the weights before it, on nothing else:
going on from a checkpoint gives, on a CPU, the same weights to the bit as never having stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model.config import RunConfig
from model.data import Cache, batches
from model.evaluate import autocast
from model.losses import balance, decision_loss, segmentation_loss
from model.network import SegDecNet, build, place

_STEPS_BETWEEN_CHECKS = 50
"""A check for a finite loss waits for the device."""


class TrainingDiverged(ArithmeticError):
    """The loss or the network's output is no longer a finite number."""


@dataclass
class Training:
    """A network on its way through the epochs of its configuration."""

    config: RunConfig
    network: SegDecNet
    optimizer: torch.optim.Optimizer
    epochs_done: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def state(self) -> dict[str, Any]:
        """What `start` takes to go on from here."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs_done": self.epochs_done,
        }


def start(config: RunConfig, device: torch.device, state: dict[str, Any] | None = None) -> Training:
    """A fresh network from the configuration's seed, or one that goes on from `Training.state`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = place(build(config.architecture, width=config.width), device)
    network.gradient_multiplier = 0.0 if config.gradient_adjustment else 1.0
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    training = Training(config, network, kind(network.parameters(), lr=config.learning_rate))
    if state:
        network.load_state_dict(state["network"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.epochs_done = state["epochs_done"]
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
    """One pass over the images of the next epoch; mean losses over images."""
    config, network, device = training.config, training.network, training.device
    epoch = training.epochs_done
    # Without negatives the image label says nothing, and one class alone would drive the decision to infinity.
    has_negatives = not cache.positive.all()
    weight_segmentation, weight_decision = balance(
        epoch, config.epochs, config.delta_cls_loss if has_negatives else 0.0, config.dynamic_balance
    )
    network.train()
    sums, images = torch.zeros(2, device=device), 0
    for step, batch in enumerate(batches(cache, config, epoch, device), start=1):
        with autocast(config, device):
            decision, segmentation = network(batch.images_BCHW)
        of_segmentation = segmentation_loss(segmentation, batch.targets_B1HW, batch.segmented_B, batch.weights_B1HW)
        of_decision = decision_loss(decision, batch.labels_B1)
        training.optimizer.zero_grad(set_to_none=True)
        (weight_segmentation * of_segmentation + weight_decision * of_decision).backward()
        training.optimizer.step()
        sums += torch.stack([of_segmentation.detach(), of_decision.detach()]) * len(batch.labels_B1)
        images += len(batch.labels_B1)
        if step % _STEPS_BETWEEN_CHECKS == 0:
            _check_finite(sums, epoch)
    _check_finite(sums, epoch)
    mean_segmentation, mean_decision = (sums / images).tolist()
    return {
        "loss_segmentation": mean_segmentation,
        "loss_decision": mean_decision,
        "loss_total": weight_segmentation * mean_segmentation + weight_decision * mean_decision,
    }


def _check_finite(sums: torch.Tensor, epoch: int) -> None:
    if not torch.isfinite(sums).all():
        raise TrainingDiverged(f"the loss of epoch {epoch + 1} is not a finite number")
