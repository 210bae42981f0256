"""The loop that training is compared with does the same training."""

import argparse
from dataclasses import replace

import pytest
import torch

from bench.measure import config_of, split_of
from bench.plain import Plain, forward, operations
from bench.training_step import Fast
from model.config import RunConfig
from model.network import build

SIZE = argparse.Namespace(height=128, width=128, width_factor=0.1)
CPU = torch.device("cpu")


def test_the_plain_network_answers_as_the_network_does():
    torch.manual_seed(0)
    network = build("segdecnet_decoder", width=0.25)
    images = torch.rand(2, 3, 128, 192)
    with torch.no_grad():
        for plain, ours in zip(forward(dict(network.named_parameters()), images), network(images), strict=True):
            torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_epochs_of_the_plain_loop_have_the_losses_of_training_in_batches():
    config = replace(config_of(SIZE, batch_size=4, epochs=3), precision="float32")
    plain, ours = Plain(config, CPU), Fast(config, CPU)
    with split_of(SIZE, distinct=8) as cache:
        for epoch in range(3):
            plain.epochs_done = ours.training.epochs_done = epoch
            assert ours.epoch(cache) == pytest.approx(plain.epoch(cache), rel=1e-3)


def test_operations_are_those_of_the_convolutions():
    once, both = operations(RunConfig())
    assert once == pytest.approx(143.3e9, rel=0.001)
    assert both == pytest.approx(3 * once, rel=0.01)  # back, each convolution twice, but for the first one's input
