"""The Triton kernels say what torch says. Where there is no GPU they run in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model import cuda_kernels, feature_norm
from model.fast import fold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch) -> None:
    """So that small maps are cut into several parts, of which the last is not full."""
    monkeypatch.setattr(cuda_kernels, "_TILE", 64)
    monkeypatch.setattr(cuda_kernels, "_PROGRAMS", 20)


@pytest.mark.parametrize(("channels", "positions", "images"), [(8, 50, 2), (1, 33, 1), (5, 40, 3), (100, 21, 2)])
@pytest.mark.parametrize("is_root", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_feature_norm_and_its_gradients(channels: int, positions: int, images: int, is_root: bool, relu: bool) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(images, positions, channels, device=DEVICE) for _ in range(2))
    x = x * 2 + 3
    scale, bias = (torch.randn(channels, device=DEVICE) for _ in range(2))
    small = feature_norm.EPSILON, 1e-12
    y, mean, std = cuda_kernels.norm_forward(x, scale, bias, *small, is_root, relu)
    found = cuda_kernels.norm_backward(g, x, scale, bias, mean, std, small[0], is_root, relu)

    wide = [value.double() for value in (x, scale, bias)]
    plain, plain_mean, plain_std = feature_norm._forward(*wide, is_root)
    if relu:
        plain = plain.relu()
    g_wide = torch.where(plain > 0, g.double(), 0.0) if relu else g.double()
    expected = feature_norm._backward(g_wide, wide[0], wide[1], plain_mean, plain_std, is_root)
    for one, other in zip((y, mean, std, *found), (plain, plain_mean, plain_std, *expected), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [8, 3])
def test_pooling_and_its_gradient(channels: int) -> None:
    """Of equals the first is taken, as torch does."""
    x = torch.randint(0, 3, (2, 6, 8, channels), device=DEVICE).float()
    as_image = x.permute(0, 3, 1, 2).clone().requires_grad_()
    plain = F.max_pool2d(as_image, 2)
    gradient = torch.rand_like(plain)
    plain.backward(gradient)
    for folded in (False, True):
        found, which = cuda_kernels.pool_forward(fold(x) if folded else x, folded)
        back = cuda_kernels.pool_backward(gradient.permute(0, 2, 3, 1).contiguous(), which, folded)
        assert torch.equal(found, plain.permute(0, 2, 3, 1))
        expected = as_image.grad.permute(0, 2, 3, 1)
        assert torch.equal(back, fold(expected) if folded else expected)
