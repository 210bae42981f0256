"""The fast order of sums gives what the networks' own gives: answers and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import fast
from model.config import ARCHITECTURES, RunConfig
from model.feature_norm import feature_norm
from model.losses import decision_loss, segmentation_loss
from model.network import FeatureNorm, SegDecNet, build


def disturbed(architecture: str, norm: str = "root_std", **options: float) -> SegDecNet:
    """A network whose scales and biases are no longer 1 and 0."""
    torch.manual_seed(0)
    network = build(architecture, norm=norm, **options)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def answers_and_gradients(
    network: SegDecNet, forward: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor
) -> dict[str, Tensor]:
    target = (images[:, :1] > 0.9).to(images.dtype)
    labels = torch.arange(len(images)).remainder(2)[:, None].to(images.dtype)
    network.zero_grad()
    decision, segmentation = forward(images)
    loss = segmentation_loss(segmentation, target, torch.ones(len(images))) + decision_loss(decision, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {"decision": decision.detach(), "segmentation": segmentation.detach()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("multiplier", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["root_std", "standard"])
def test_answers_and_gradients_are_those_of_the_plain_network(architecture: str, multiplier: float, norm: str) -> None:
    """128 x 136 px make odd sizes in the decision's branch; a width of 0.3, odd numbers of channels."""
    network = disturbed(architecture, norm, width=0.3).double()
    network.gradient_multiplier = multiplier
    images = torch.rand(2, 3, 128, 136, dtype=torch.float64)
    plain = answers_and_gradients(network, network, images)
    found = answers_and_gradients(network, lambda x: fast.forward(network, x, torch.float64), images)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16_answers_like_the_plain_network_under_autocast() -> None:
    network = disturbed("segdecnet_plusplus", width=0.25)
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        exact = network(images)[1]
        with torch.autocast("cpu", torch.bfloat16):
            plain = network(images)[1].float()
        found = fast.forward(network, images, torch.bfloat16)[1].float()
    assert (found - exact).norm() <= 1.2 * (plain - exact).norm()


def test_a_size_that_the_trunk_cannot_halve_is_refused_in_the_same_words() -> None:
    network = build("segdecnet", width=0.05)
    for forward in (network, lambda images: fast.forward(network, images, torch.float32)):
        with pytest.raises(ValueError, match=r"multiples of 8 px .* found 130x128; use 136x128"):
            forward(torch.rand(1, 3, 130, 128))


def test_folding_is_undone() -> None:
    x = torch.rand(2, 6, 10, 3)
    assert torch.equal(fast.unfold(fast.fold(x)), x)


def test_a_folded_convolution_is_the_5x5_one() -> None:
    x, weight = torch.rand(2, 5, 8, 12, dtype=torch.float64), torch.randn(7, 5, 5, 5, dtype=torch.float64)
    folded = fast.fold(x.permute(0, 2, 3, 1)).flatten(3).permute(0, 3, 1, 2)
    found = F.conv2d(folded, fast.folded_weight(weight), padding=1).permute(0, 2, 3, 1).unflatten(3, (4, 7))
    torch.testing.assert_close(fast.unfold(found).permute(0, 3, 1, 2), F.conv2d(x, weight, padding=2))


def test_an_up_convolution_makes_a_folded_map() -> None:
    up = nn.ConvTranspose2d(6, 4, 5, stride=2, bias=False).double()
    x = torch.rand(2, 6, 3, 5, dtype=torch.float64)
    found = F.conv2d(x, fast.folded_up_weight(up.weight), padding=1).permute(0, 2, 3, 1).unflatten(3, (4, 4))
    torch.testing.assert_close(fast.unfold(found).permute(0, 3, 1, 2), up(x)[:, :, 2:-1, 2:-1])


def test_the_gradient_of_many_weights_is_a_few_matrix_products() -> None:
    x, weight = torch.randn(2, 6, 9, 3, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    weight.requires_grad_()
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=2)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(fast.weight_gradient(x, gradient.permute(0, 2, 3, 1), 5), weight.grad)


@pytest.mark.parametrize("kind", ["root_std", "standard"])
def test_the_closed_gradient_of_feature_norm_is_the_derivative(kind: str) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    scale, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for relu in (False, True):
        assert torch.autograd.gradcheck(lambda *a, relu=relu: feature_norm(*a, kind, relu), (x, scale, bias))


def test_a_constant_channel_has_no_gradient_and_is_no_nan() -> None:
    """A black image, whose every channel is constant behind the first convolution."""
    norm = FeatureNorm(2)
    nn.init.constant_(norm.bias, 0.5)
    x = torch.full((1, 12, 2), 3.0, requires_grad=True)
    y = feature_norm(x, norm.scale.flatten(), norm.bias.flatten(), "root_std", relu=True)
    y.square().sum().backward()
    torch.testing.assert_close(y, torch.full_like(y, 0.5))
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-4)


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(1, 4096, 1)
    norm = FeatureNorm(1)
    plain = feature_norm(x, norm.scale.flatten(), norm.bias.flatten(), "root_std", relu=False)
    moved = feature_norm(x + 1000.0, norm.scale.flatten(), norm.bias.flatten(), "root_std", relu=False)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-3)


def test_convolutions_run_in_what_the_configuration_asks_for() -> None:
    network = build("segdecnet", width=0.05)
    assert fast.compute_dtype(RunConfig(precision="bfloat16"), network) == torch.bfloat16
    assert fast.compute_dtype(RunConfig(precision="float32"), network) == torch.float32
    assert fast.compute_dtype(RunConfig(precision="float32"), network.double()) == torch.float64
