"""FeatureNorm (and the ReLU after it) in two passes over a map in each direction, with the gradient in closed form.

With m and s the mean and the unbiased standard deviation of a channel of an image over its P positions, and f(s) =
(s + 0.001)^-1/2 (`root_std`) or 1 / (s + 0.001) (`standard`):

    y = scale f (x - m) + bias
    dL/dx = scale f [g - mean(g) - k (x - m)],    k = r / ((P - 1) s (s + 0.001)) sum(g (x - m))

with r = 1/2 or 1: the gradient of batch normalisation with another factor k. So PyTorch's own kernels of batch
normalisation compute it, given other numbers for its statistics; on CUDA, Triton kernels that also hold the ReLU.

Shapes: B images, P positions, C channels; maps lie with their channels last.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

EPSILON = 0.001
"""added to the standard deviation, as in the public code"""

_LEAST_STD = 1e-12
"""A channel that is constant has nothing to divide by: its gradient is as if it had this much."""

logger = logging.getLogger(__name__)


def feature_norm(x_BPC: Tensor, scale_C: Tensor, bias_C: Tensor, kind: str, relu: bool) -> Tensor:
    """The normalised map, in the precision of `x_BPC`, with its negative values cut off where `relu`.

    Statistics and gradients are computed in float32 (float64 for such maps), which scale and bias have to be in. Needs
    P of at least 2.
    """
    y: Tensor = _FeatureNorm.apply(x_BPC, scale_C, bias_C, kind == "root_std", relu)
    return y


class _FeatureNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BPC: Tensor, scale_C: Tensor, bias_C: Tensor, is_root: bool, relu: bool) -> Tensor:
        x_BPC = x_BPC.contiguous()
        ctx.is_root, ctx.relu, ctx.on_triton = is_root, relu, has_kernels(x_BPC)
        if ctx.on_triton:
            from model import cuda_kernels

            y_BPC, mean_BC, std_BC = cuda_kernels.norm_forward(
                x_BPC, scale_C, bias_C, EPSILON, _LEAST_STD, is_root, relu
            )
        else:
            y_BPC, mean_BC, std_BC = _forward(x_BPC, scale_C, bias_C, is_root)
            if relu:
                y_BPC.relu_()
        needed = y_BPC if relu and not ctx.on_triton else None  # the kernels see from x what the ReLU cut off
        ctx.save_for_backward(x_BPC, needed, scale_C, bias_C, mean_BC, std_BC)
        return y_BPC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BPC, y_BPC, scale_C, bias_C, mean_BC, std_BC = ctx.saved_tensors
        g_BPC = gradients[0].contiguous()
        if ctx.on_triton:
            from model import cuda_kernels

            found = cuda_kernels.norm_backward(
                g_BPC, x_BPC, scale_C, bias_C, mean_BC, std_BC, EPSILON, ctx.is_root, ctx.relu
            )
        else:
            if y_BPC is not None:
                g_BPC = torch.ops.aten.threshold_backward(g_BPC, y_BPC, 0)
            found = _backward(g_BPC, x_BPC, scale_C, mean_BC, std_BC, ctx.is_root)
        return *found, None, None


def has_kernels(x: Tensor) -> bool:
    """Whether model/cuda_kernels.py can take a map."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _triton_works(x.device)


@cache
def _triton_works(device: torch.device) -> bool:
    """Tried once: Triton needs a C compiler and Python's headers on the machine, and a GPU that is not too old."""
    try:
        from model import cuda_kernels

        one = torch.ones(1, device=device)
        cuda_kernels.norm_forward(torch.ones(1, 2, 1, device=device), one, one, EPSILON, _LEAST_STD, True, True)
    except Exception as error:
        logger.warning("Triton does not work here, so training on %s takes longer: %s", device, error)
        return False
    return True


def _forward(x_BPC: Tensor, scale_C: Tensor, bias_C: Tensor, is_root: bool) -> tuple[Tensor, Tensor, Tensor]:
    positions, channels = x_BPC.shape[1:]
    y_BPC = torch.empty_like(x_BPC)
    means, stds = [], []
    for x_PC, y_PC in zip(x_BPC, y_BPC, strict=True):
        unused = scale_C.new_zeros(2, channels)  # running statistics say which precision is wanted
        mean, variance = torch.ops.aten.batch_norm_update_stats(_as_image(x_PC), unused[0], unused[1], 0.0)
        std = (variance * (positions / (positions - 1))).sqrt().clamp_min(_LEAST_STD)
        spread = std + EPSILON
        squared = spread if is_root else spread.square()  # of which batch normalisation takes the root
        torch.ops.aten.native_batch_norm.out(
            _as_image(x_PC), scale_C, bias_C, mean, squared, False, 0.0, 0.0,
            out=_as_image(y_PC), save_mean=scale_C.new_empty(0), save_invstd=scale_C.new_empty(0),
        )  # fmt: skip
        means.append(mean)
        stds.append(std)
    return y_BPC, torch.stack(means), torch.stack(stds)


def _backward(
    g_BPC: Tensor, x_BPC: Tensor, scale_C: Tensor, mean_BC: Tensor, std_BC: Tensor, is_root: bool
) -> tuple[Tensor, Tensor, Tensor]:
    positions = x_BPC.shape[1]
    spread_BC = std_BC + EPSILON
    factor_BC = spread_BC.rsqrt() if is_root else spread_BC.reciprocal()
    # Batch normalisation has k = inverse^2 / P sum(g (x - m)), and scale * inverse before the bracket.
    inverse_BC = (positions / ((positions - 1) * std_BC * spread_BC * (2 if is_root else 1))).sqrt()
    d_x_BPC = torch.empty_like(x_BPC)
    d_scale, d_bias = torch.zeros_like(scale_C), torch.zeros_like(scale_C)
    for n, (g_PC, x_PC) in enumerate(zip(g_BPC, x_BPC, strict=True)):
        ratio = factor_BC[n] / inverse_BC[n]
        found, with_inverse, of_bias = torch.ops.aten.native_batch_norm_backward(
            _as_image(g_PC), _as_image(x_PC), scale_C * ratio, None, None, mean_BC[n], inverse_BC[n], True, 0.0,
            [True, True, True],
        )  # fmt: skip
        d_x_BPC[n] = found[0, :, :, 0].t()
        d_scale += with_inverse * ratio
        d_bias += of_bias
    return d_x_BPC, d_scale, d_bias


def _as_image(map_PC: Tensor) -> Tensor:
    """One image (1, C, P, 1) whose channels lie last in memory."""
    return map_PC.t()[None, :, :, None]
