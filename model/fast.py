"""The networks of model/network.py computed in an order that hardware likes: the same sums, within rounding.

Maps lie with their channels last. A map of few channels is *folded*: the 2 x 2 positions of a square lie beside each
other as four times as many channels, (B, H, W, C) as (B, H/2, W/2, 4, C), and a 5x5 convolution becomes a 3x3 one from
four times the channels to four times the channels. That is 1.44 times the products (some are with zeros), and several
times faster: matrix units want 32 channels and more. An up-convolution with stride 2 makes a folded map by itself,
pooling a folded map needs no neighbours, and FeatureNorm does not care for the order of positions.

Shapes: B images, H x W px, C (I in, O out) channels; F = 4 the places in a square, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import STRIDE, RunConfig, input_size_problem
from model.feature_norm import feature_norm, has_kernels
from model.network import Decision, DecoderStep, FeatureNorm, Gate, SegDecNet, scale_gradient

_WIDE = 15
"""Side of the trunk's last convolution: 64 % of the work."""


def forward(network: SegDecNet, images_BCHW: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `network(images_BCHW)` returns, (decision_logits_B1, segmentation_logits_B1HW), with convolutions in
    `dtype` and FeatureNorm's statistics in float32."""
    if problem := input_size_problem(*images_BCHW.shape[2:]):
        raise ValueError(problem)
    full = _folded_blocks(network.trunk1, fold(images_BCHW.to(dtype).permute(0, 2, 3, 1)))
    half = _blocks(network.trunk2, _pool_folded(full))
    quarter = _blocks(network.trunk3, _pool(half))
    eighth = _conv_norm(network.trunk4, _pool(quarter))
    if network.architecture == "segdecnet":
        map_B1HW = reduced = _conv_norm(network.segment, eighth).permute(0, 3, 1, 2)
        segmentation = F.interpolate(map_B1HW, scale_factor=STRIDE, mode="nearest")
    else:
        skips = fold(quarter), fold(half), full
        if network.architecture == "segdecnet_plusplus":
            skips = (
                _gated(skips[0], network.skip3, network.gate23),
                _gated(skips[1], network.skip2, network.gate23),
                _gated(skips[2], network.skip1, network.gate1),
            )
        x = _decoder_step(network.up1, eighth, skips[0])
        x = _decoder_step(network.up2, unfold(x), skips[1])
        x = _decoder_step(network.up3, unfold(x), skips[2])
        map_B1HW = segmentation = unfold(_folded_conv_norm(network.segment, x)).permute(0, 3, 1, 2)
        reduced = F.avg_pool2d(map_B1HW, STRIDE)
    return _decision(network.decision, eighth, reduced, map_B1HW, network.gradient_multiplier), segmentation


def lay_out(network: SegDecNet) -> None:
    """Orders the weights in memory as `forward` wants them: channels last where they are used as they are."""
    for part in (network.trunk2, network.trunk3, network.trunk4, network.decision.convolve):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compute_dtype(config: RunConfig, network: SegDecNet) -> torch.dtype:
    """bfloat16 where asked for, or where the network's device computes in it; else that of its weights."""
    weight = network.decision.linear.weight
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and _has_bfloat16(weight.device))
    return torch.bfloat16 if wanted else weight.dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def fold(x_BHWC: Tensor) -> Tensor:
    """(B, H/2, W/2, F, C)"""
    B, H, W, C = x_BHWC.shape
    return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4, C)


def unfold(x_BHWFC: Tensor) -> Tensor:
    """The inverse of `fold`: (B, 2H, 2W, C)"""
    B, H, W, _, C = x_BHWFC.shape
    return x_BHWFC.reshape(B, H, W, 2, 2, C).transpose(2, 3).reshape(B, 2 * H, 2 * W, C)


def folded_weight(weight_OI55: Tensor) -> Tensor:
    """(F*O, F*I, 3, 3): the weights of a 5x5 convolution for folded maps."""
    outs, ins = weight_OI55.shape[:2]
    # The row 2u + r of the input lies in square u at place r; the output's row p sees it with weight 2u + r - p + 2.
    padded = F.pad(weight_OI55, (1, 1, 1, 1))
    places = [padded[:, :, 1 - p : 7 - p, 1 - q : 7 - q] for p in (0, 1) for q in (0, 1)]
    split = torch.stack(places).reshape(4, outs, ins, 3, 2, 3, 2)  # place, O, I, u, r, v, s
    return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(4 * outs, 4 * ins, 3, 3)


def folded_up_weight(weight_IO55: Tensor) -> Tensor:
    """(F*O, I, 3, 3): the weights of a 5x5 up-convolution with stride 2 and cropped by 2 and 1, for a folded result."""
    ins, outs = weight_IO55.shape[:2]
    # Row p of a square takes the input's row u with weight p + 2 - 2u.
    split = F.pad(weight_IO55, (0, 1, 0, 1)).reshape(ins, outs, 3, 2, 3, 2).flip(2, 4)
    return split.permute(3, 5, 1, 0, 2, 4).reshape(4 * outs, ins, 3, 3)


class _Rearranged(torch.autograd.Function):
    """A weight under one of the two definitions above, in one step each way instead of dozens of small ones."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, definition: Callable[[Tensor], Tensor]) -> Tensor:
        from_flat, is_zero, back, (outs, ins) = _places(definition, tuple(weight.shape), weight.device)
        ctx.back, ctx.shape = back, weight.shape
        values = weight.flatten()[from_flat].masked_fill_(is_zero, 0)
        return values.view(outs, 3, 3, ins).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        places = gradients[0].permute(0, 2, 3, 1).reshape(-1)
        return places[ctx.back].sum(dim=0).view(ctx.shape), None


@cache  # recorded steps read these tables
def _places(
    definition: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Where each value of a rearranged weight, channels last, is from and whether it is none; for each value of the
    weight all the places that it has (places, values); and the channels of the result."""
    with torch.inference_mode(False):
        count = math.prod(shape)
        result = definition(torch.arange(1, count + 1).view(shape))
        numbers = result.permute(0, 2, 3, 1).flatten()
        taken = numbers.argsort(stable=True)[int((numbers == 0).sum()) :]
        back = taken.view(count, -1).t().contiguous()
        return (
            (numbers - 1).clamp(min=0).to(device),
            (numbers == 0).to(device),
            back.to(device),
            (result.shape[0], result.shape[1]),
        )


def _conv(x_BHWI: Tensor, weight_OIKK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    weight = weight_OIKK.to(x_BHWI.dtype, memory_format=torch.channels_last)
    bias = None if bias_O is None else bias_O.to(x_BHWI.dtype)
    outs, ins = weight.shape[:2]
    if not x_BHWI.is_cuda:
        return _conv2d(x_BHWI, weight, bias)
    if weight.shape[2] == _WIDE:
        found: Tensor = _WideConv.apply(x_BHWI, weight)
        return found
    # cuDNN's fast kernels know multiples of 8 channels alone.
    of_ins, of_outs = -ins % 8, -outs % 8
    weight = F.pad(weight, (0, 0, 0, 0, 0, of_ins, 0, of_outs)) if of_ins or of_outs else weight
    x_BHWI = F.pad(x_BHWI, (0, of_ins)) if of_ins else x_BHWI
    bias = F.pad(bias, (0, of_outs)) if bias is not None and of_outs else bias
    return _conv2d(x_BHWI, weight, bias)[..., :outs]


def _conv2d(x_BHWI: Tensor, weight_OIKK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    padding = weight_OIKK.shape[2] // 2
    return F.conv2d(x_BHWI.permute(0, 3, 1, 2), weight_OIKK, bias_O, padding=padding).permute(0, 2, 3, 1)


class _WideConv(torch.autograd.Function):
    """A convolution whose weights' gradient is computed as matrix products: cuDNN has no fast kernel for 15x15."""

    @staticmethod
    def forward(ctx: Any, x_BHWI: Tensor, weight_OIKK: Tensor) -> Tensor:
        ctx.save_for_backward(x_BHWI, weight_OIKK)
        return _conv2d(x_BHWI, weight_OIKK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_BHWI, weight_OIKK = ctx.saved_tensors
        size = weight_OIKK.shape[2]
        d_x, _, _ = torch.ops.aten.convolution_backward(
            gradients[0].permute(0, 3, 1, 2), x_BHWI.permute(0, 3, 1, 2), weight_OIKK, None,
            [1, 1], [size // 2, size // 2], [1, 1], False, [0, 0], 1, [True, False, False],
        )  # fmt: skip
        return d_x.permute(0, 2, 3, 1), weight_gradient(x_BHWI, gradients[0], size)


def weight_gradient(x_BHWI: Tensor, g_BHWO: Tensor, size: int) -> Tensor:
    """(O, I, size, size): the gradient of the weights of a convolution that keeps the size of its map.

    A row of weights is one matrix product over all positions: of the input's windows, a row long, with the gradient.
    Both lie as rows of one length, so that the next row of weights sees the windows one row further on.
    """
    width, ins, outs = x_BHWI.shape[2], x_BHWI.shape[3], g_BHWO.shape[3]
    around = size // 2
    windows = F.pad(x_BHWI, (0, 0, around, around, around, around)).unfold(2, size, 1)  # (B, H + 2 around, W, I, size)
    windows_PQ = windows.transpose(3, 4).reshape(-1, size * ins)
    g_PO = F.pad(g_BHWO, (0, 0, 0, 0, 0, 2 * around)).reshape(-1, outs)  # nothing below each image
    last = len(g_PO) - 2 * around * width
    rows = [windows_PQ[n * width : n * width + last].t() @ g_PO[:last] for n in range(size)]
    return torch.stack(rows).reshape(size, size, ins, outs).permute(3, 2, 0, 1)


def _norm(norm: FeatureNorm, x: Tensor, relu: bool) -> Tensor:
    channels = x.shape[-1]
    found = feature_norm(x.reshape(len(x), -1, channels), norm.scale.flatten(), norm.bias.flatten(), norm.kind, relu)
    return found.reshape(x.shape)


def _parts(block: nn.Module) -> tuple[nn.Conv2d, FeatureNorm, bool]:
    """The convolution and the norm of a block, and whether a ReLU follows."""
    conv, norm = block.get_submodule("conv"), block.get_submodule("norm")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, FeatureNorm)
    return conv, norm, "relu" in block._modules


def _conv_norm(block: nn.Module, x_BHWI: Tensor) -> Tensor:
    conv, norm, relu = _parts(block)
    return _norm(norm, _conv(x_BHWI, conv.weight), relu)


def _folded_conv_norm(block: nn.Module, x_BHWFI: Tensor) -> Tensor:
    conv, norm, relu = _parts(block)
    x = _conv(x_BHWFI.flatten(3), _Rearranged.apply(conv.weight, folded_weight))
    return _norm(norm, x.unflatten(3, (4, -1)), relu)


def _blocks(blocks: nn.Sequential, x_BHWC: Tensor) -> Tensor:
    for block in blocks:
        x_BHWC = _conv_norm(block, x_BHWC)
    return x_BHWC


def _folded_blocks(blocks: nn.Sequential, x_BHWFC: Tensor) -> Tensor:
    for block in blocks:
        x_BHWFC = _folded_conv_norm(block, x_BHWFC)
    return x_BHWFC


def _pool(x_BHWC: Tensor) -> Tensor:
    if has_kernels(x_BHWC) and x_BHWC.shape[1] % 2 == x_BHWC.shape[2] % 2 == 0:
        found: Tensor = _Pool.apply(x_BHWC, False)
        return found
    return F.max_pool2d(x_BHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _pool_folded(x_BHWFC: Tensor) -> Tensor:
    B, H, W, places, C = x_BHWFC.shape
    if has_kernels(x_BHWFC):
        found: Tensor = _Pool.apply(x_BHWFC, True)
        return found
    as_image = x_BHWFC.reshape(B, H * W, places, C).permute(0, 3, 1, 2)
    return F.max_pool2d(as_image, (1, places)).permute(0, 2, 3, 1).reshape(B, H, W, C)


class _Pool(torch.autograd.Function):
    """Pooling on CUDA: torch keeps eight bytes for each value that it chose, and is slow with channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: bool) -> Tensor:
        from model import cuda_kernels

        y_BHWC, which_BHWC = cuda_kernels.pool_forward(x.contiguous(), folded)
        ctx.save_for_backward(which_BHWC)
        ctx.folded = folded
        return y_BHWC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from model import cuda_kernels

        (which_BHWC,) = ctx.saved_tensors
        return cuda_kernels.pool_backward(gradients[0].contiguous(), which_BHWC, ctx.folded), None


def _gated(skip: Tensor, conv: nn.Conv2d, gate: Gate) -> Tensor:
    """A folded skip connection, weighed by its gate."""
    squeezed = skip.mean(dim=(1, 2, 3), dtype=gate.reduce.weight.dtype)[:, :, None, None]
    weights = gate.weights(squeezed).to(skip.dtype)
    return F.linear(skip, conv.weight[:, :, 0, 0].to(skip.dtype)) * weights[:, None, None, None, :, 0, 0]


def _decoder_step(step: DecoderStep, x_BHWI: Tensor, skip_BHWFC: Tensor) -> Tensor:
    assert step.up.bias is not None
    weight = _Rearranged.apply(step.up.weight, folded_up_weight)
    up = _conv(x_BHWI, weight, step.up.bias.repeat(4)).unflatten(3, (4, -1))
    return _folded_blocks(step.convolve, torch.cat([skip_BHWFC, up], dim=4))


def _decision(
    decision: Decision, eighth_BHWC: Tensor, reduced_B1HW: Tensor, map_B1HW: Tensor, multiplier: float
) -> Tensor:
    """The decision's logits; without a multiplier nothing flows back, and so nothing is computed for it."""
    trunk, reduced, map_B1HW = (scale_gradient(x, multiplier) for x in (eighth_BHWC, reduced_B1HW, map_B1HW))
    first, second, third = (module for module in decision.convolve if isinstance(module, nn.Sequential))
    conv, norm, relu = _parts(first)
    of_trunk, of_map = conv.weight.split([trunk.shape[3], 1], dim=1)  # apart, since 1,025 is an awkward number
    x = _conv(_pool(trunk), of_trunk) + _conv(F.max_pool2d(reduced, 2).permute(0, 2, 3, 1), of_map)
    x = _pool(_norm(norm, x, relu))
    wide = decision.linear.weight.dtype
    x = _conv_norm(third, _pool(_conv_norm(second, x))).to(wide)
    whole = map_B1HW.to(wide)
    parts = [x.amax(dim=(1, 2)), x.mean(dim=(1, 2)), whole.amax(dim=(2, 3)), whole.mean(dim=(2, 3))]
    logits: Tensor = decision.linear(torch.cat(parts, dim=1))
    return logits
