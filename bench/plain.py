"""The training step as anybody would write it first, to compare with: float32, eager, one image after the other.

The network's arithmetic is written out once more, over the parameters of model/network.py by their names, so that
nothing that is done there for speed is in it. The architecture is `segdecnet_decoder`, the losses are unweighted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.arrays import Ints
from model.config import RunConfig
from model.data import Cache, step_rows
from model.losses import balance
from model.network import build

Parameters = dict[str, Tensor]


class Plain:
    """A network on its way through its epochs, from the weights that `model.train.start` begins with."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert config.architecture == "segdecnet_decoder"
        assert config.gradient_adjustment
        assert config.norm == "root_std"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = build(config.architecture, width=config.width)
        self.config, self.device = config, device
        self.parameters = {
            name: value.detach().to(device, copy=True).contiguous().requires_grad_()
            for name, value in network.named_parameters()
        }
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=config.learning_rate, foreach=False)
        self.epochs_done = 0

    def epoch(self, cache: Cache) -> float:
        """One pass over the images of the next epoch, in the order of model/data.py; the mean total loss."""
        weights = balance(self.epochs_done, self.config.epochs, self.config.delta_cls_loss, self.config.dynamic_balance)
        total, images = torch.zeros((), device=self.device), 0
        for rows in step_rows(cache, self.config, self.epochs_done):
            total += self.step(cache, rows, weights)
            images += len(rows)
        return float(total) / images

    def step(self, cache: Cache, rows: Ints, weights: tuple[float, float]) -> Tensor:
        """The sum of the images' losses; gradients of single images add up to the batch's."""
        self.optimizer.zero_grad()
        found = torch.zeros((), device=self.device)
        for row in rows:
            pixels = torch.from_numpy(np.array(cache.images[row])).to(self.device)
            image = (pixels.permute(2, 0, 1)[None].float() / 255).contiguous()
            target = torch.from_numpy(np.array(cache.masks[row])).to(self.device)[None, None].float()
            label = torch.tensor([[float(cache.positive[row])]], device=self.device)
            decision, segmentation = forward(self.parameters, image)
            loss = weights[0] * F.binary_cross_entropy_with_logits(segmentation, target)
            loss = loss + weights[1] * F.binary_cross_entropy_with_logits(decision, label)
            (loss / len(rows)).backward()
            found += loss.detach()
        self.optimizer.step()
        return found


def forward(p: Parameters, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Decision logits (B, 1) and segmentation logits (B, 1, H, W)."""
    full = _blocks(p, "trunk1", images_BCHW)
    half = _blocks(p, "trunk2", F.max_pool2d(full, 2))
    quarter = _blocks(p, "trunk3", F.max_pool2d(half, 2))
    eighth = _block(p, "trunk4", F.max_pool2d(quarter, 2))
    x = eighth
    for name, skip in (("up1", quarter), ("up2", half), ("up3", full)):
        x = F.conv_transpose2d(x, p[f"{name}.up.weight"], p[f"{name}.up.bias"], stride=2)[:, :, 2:-1, 2:-1]
        x = _blocks(p, f"{name}.convolve", torch.cat([skip, x], dim=1))
    segmentation = _conv_norm(p, "segment", x)
    joined = torch.cat([eighth, F.avg_pool2d(segmentation, 8)], dim=1).detach()  # the decision trains itself alone
    features = joined
    for n in (1, 3, 5):
        features = _block(p, f"decision.convolve.{n}", F.max_pool2d(features, 2))
    parts = [features.amax(dim=(2, 3)), features.mean(dim=(2, 3))]
    parts += [segmentation.amax(dim=(2, 3)).detach(), segmentation.mean(dim=(2, 3)).detach()]
    return F.linear(torch.cat(parts, dim=1), p["decision.linear.weight"], p["decision.linear.bias"]), segmentation


def _blocks(p: Parameters, name: str, x: Tensor) -> Tensor:
    n = 0
    while f"{name}.{n}.conv.weight" in p:
        x = _block(p, f"{name}.{n}", x)
        n += 1
    return x


def _block(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.relu(_conv_norm(p, name, x))


def _conv_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    weight = p[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean = x.mean(dim=(2, 3), keepdim=True)
    std = x.std(dim=(2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(std + 0.001) * p[f"{name}.norm.scale"] + p[f"{name}.norm.bias"]


def operations(config: RunConfig) -> tuple[int, int]:
    """Of one image in a forward pass, and in a forward and backward pass; nothing is computed for it.

    Multiplications and additions of convolutions and products, as torch counts them; no norm, activation or loss.
    """
    with torch.device("meta"):
        parameters = dict(build(config.architecture, width=config.width).named_parameters())
        image = torch.empty(1, 3, config.input_height, config.input_width)
    with FlopCounterMode(display=False) as once:
        answers = forward(parameters, image)
    with FlopCounterMode(display=False) as back:
        torch.autograd.backward([answer.sum() for answer in answers])
    return once.get_total_flops(), once.get_total_flops() + back.get_total_flops()


def images_in(cache: Cache, config: RunConfig, epoch: int = 0) -> int:
    """How many an epoch has."""
    return sum(map(len, step_rows(cache, config, epoch)))
