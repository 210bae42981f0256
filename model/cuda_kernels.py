"""FeatureNorm with its ReLU, and pooling by 2 x 2, as Triton kernels: each reads and writes a map once in each pass.

Shapes: B images, P positions, C channels, which lie last in memory. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""values that a program holds at a time"""

_MOST_CHANNELS = 64
"""of a tile"""

_PROGRAMS = 1056
"""that keep 132 multiprocessors busy"""

_MOST_PARTS = 256
"""of the positions of an image, each of which leaves a partial sum"""


@triton.jit
def _tile(part, tiles, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, n):
    """Offsets and mask of the n-th tile of a part of an image."""
    p = (part * tiles + n) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return p[:, None] * C + c[None, :], (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def _moments(x_ptr, partial_ptr, P, tiles, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of a part, into (2, B, parts, C): two passes over each tile, joined as by
    Chan, Golub and LeVeque, so that a large mean costs no digits."""
    part, b = tl.program_id(0), tl.program_id(2)
    x_ptr += b.to(tl.int64) * P * C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for n in range(tiles):
        at, inside = _tile(part, tiles, P, C, BLOCK_P, BLOCK_C, n)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(P - (part * tiles + n) * BLOCK_P, 0), BLOCK_P).to(tl.float32)
        own = tl.sum(x, axis=0) / tl.maximum(here, 1.0)
        apart = tl.where(inside, x - own[None, :], 0.0)
        both = tl.maximum(count + here, 1.0)
        delta = own - mean
        squares += tl.sum(apart * apart, axis=0) + delta * delta * (count * here / both)
        mean += delta * (here / both)
        count += here
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = partial_ptr + (b * tl.num_programs(0) + part) * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + tl.num_programs(2) * tl.num_programs(0) * C, squares, mask=c < C)


@triton.jit
def _mean_std(partial_ptr, mean_ptr, std_ptr, P, parts, size, least, C: tl.constexpr, BLOCK_C: tl.constexpr,
              PARTS: tl.constexpr):  # fmt: skip
    """Joins the parts: mean and unbiased standard deviation (B, C). `size` is how many positions a part has."""
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (c < C)[None, :]
    at = partial_ptr + (b * parts + part)[:, None] * C + c[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + tl.num_programs(0) * parts * C, mask=inside, other=0.0)
    counts = tl.minimum(tl.maximum(P - part * size, 0), size).to(tl.float32)[:, None]
    counts = tl.where(inside, counts, 0.0)
    mean = tl.sum(means * counts, axis=0) / P
    apart = means - mean[None, :]
    variance = tl.sum(squares + counts * apart * apart, axis=0) / (P - 1)
    tl.store(mean_ptr + b * C + c, mean, mask=c < C)
    tl.store(std_ptr + b * C + c, tl.maximum(tl.sqrt(variance), least), mask=c < C)


@triton.jit
def _factors(mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, b, c, C: tl.constexpr, IS_ROOT: tl.constexpr):
    mean = tl.load(mean_ptr + b * C + c, mask=c < C, other=0.0)
    spread = tl.load(std_ptr + b * C + c, mask=c < C, other=1.0) + epsilon
    factor = 1.0 / tl.sqrt(spread) if IS_ROOT else 1.0 / spread
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    return mean, factor, scale * factor, tl.load(bias_ptr + c, mask=c < C, other=0.0)


@triton.jit
def _apply(x_ptr, y_ptr, mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, P, tiles, C: tl.constexpr,
           BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, IS_ROOT: tl.constexpr, RELU: tl.constexpr):  # fmt: skip
    part, b = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, _, slope, bias = _factors(mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, b, c, C, IS_ROOT)
    start = b.to(tl.int64) * P * C
    for n in range(tiles):
        at, inside = _tile(part, tiles, P, C, BLOCK_P, BLOCK_C, n)
        x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * slope[None, :] + bias[None, :]
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # keeps NaN
        tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(g_ptr, x_ptr, partial_ptr, mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, P, tiles,
                   C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, IS_ROOT: tl.constexpr,
                   RELU: tl.constexpr):  # fmt: skip
    """The sums of g and of g (x - m) over a part, into (2, B, parts, C)."""
    part, b = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, _, slope, bias = _factors(mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, b, c, C, IS_ROOT)
    start = b.to(tl.int64) * P * C
    of_g = tl.zeros((BLOCK_C,), tl.float32)
    of_product = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(tiles):
        at, inside = _tile(part, tiles, P, C, BLOCK_P, BLOCK_C, n)
        g = tl.load(g_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            g = tl.where(apart * slope[None, :] + bias[None, :] <= 0, 0.0, g)
        of_g += tl.sum(g, axis=0)
        of_product += tl.sum(g * apart, axis=0)
    out = partial_ptr + (b * tl.num_programs(0) + part) * C + c
    tl.store(out, of_g, mask=c < C)
    tl.store(out + tl.num_programs(2) * tl.num_programs(0) * C, of_product, mask=c < C)


@triton.jit
def _joined_sums(partial_ptr, sums_ptr, own_ptr, mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, P, parts,
                 C: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, IS_ROOT: tl.constexpr):  # fmt: skip
    """Of each image: what is taken from g and what (x - m) is multiplied by, into `sums` (2, B, C); and its gradients
    of scale and bias, into `own` (2, B, C)."""
    b, images = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (c < C)[None, :]
    at = partial_ptr + (b * parts + part)[:, None] * C + c[None, :]
    of_g = tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    of_product = tl.sum(tl.load(at + images * parts * C, mask=inside, other=0.0), axis=0)
    _, factor, _, _ = _factors(mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, b, c, C, IS_ROOT)
    std = tl.load(std_ptr + b * C + c, mask=c < C, other=1.0)
    ratio = 0.5 if IS_ROOT else 1.0
    out = b * C + c
    tl.store(sums_ptr + out, of_g / P, mask=c < C)
    tl.store(sums_ptr + images * C + out, ratio * of_product / ((P - 1) * std * (std + epsilon)), mask=c < C)
    tl.store(own_ptr + out, of_product * factor, mask=c < C)
    tl.store(own_ptr + images * C + out, of_g, mask=c < C)


@triton.jit
def _gradient(g_ptr, x_ptr, d_x_ptr, sums_ptr, mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, P, tiles,
              C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, IS_ROOT: tl.constexpr,
              RELU: tl.constexpr):  # fmt: skip
    part, b, images = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, _, slope, bias = _factors(mean_ptr, std_ptr, scale_ptr, bias_ptr, epsilon, b, c, C, IS_ROOT)
    taken = tl.load(sums_ptr + b * C + c, mask=c < C, other=0.0)
    k = tl.load(sums_ptr + (images + b) * C + c, mask=c < C, other=0.0)
    start = b.to(tl.int64) * P * C
    for n in range(tiles):
        at, inside = _tile(part, tiles, P, C, BLOCK_P, BLOCK_C, n)
        g = tl.load(g_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            g = tl.where(apart * slope[None, :] + bias[None, :] <= 0, 0.0, g)
        d_x = slope[None, :] * (g - taken[None, :] - k[None, :] * apart)
        tl.store(d_x_ptr + start + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


class _Plan:
    """How a map is cut into programs: (parts of its positions, blocks of channels, images)."""

    def __init__(self, x_BPC: Tensor) -> None:
        B, P, C = x_BPC.shape
        self.block_c = min(_MOST_CHANNELS, triton.next_power_of_2(C))
        self.block_p = _TILE // self.block_c
        blocks = triton.cdiv(C, self.block_c)
        all_tiles = triton.cdiv(P, self.block_p)
        parts = max(1, min(_MOST_PARTS, all_tiles, triton.cdiv(_PROGRAMS, B * blocks)))
        self.tiles = triton.cdiv(all_tiles, parts)
        self.parts = triton.cdiv(all_tiles, self.tiles)
        self.grid = (self.parts, blocks, B)
        self.joined = (B, blocks)
        self.tile = {"C": C, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c}
        self.join = {"C": C, "BLOCK_C": self.block_c, "PARTS": triton.next_power_of_2(self.parts)}
        self.partial = x_BPC.new_empty(2, B, self.parts, C, dtype=torch.float32)


def norm_forward(
    x_BPC: Tensor, scale_C: Tensor, bias_C: Tensor, epsilon: float, least: float, is_root: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P, C) the normalised map; (B, C) means and standard deviations, at least `least`."""
    B, P, C = x_BPC.shape
    plan = _Plan(x_BPC)
    mean_BC, std_BC = x_BPC.new_empty(2, B, C, dtype=torch.float32)
    y_BPC = torch.empty_like(x_BPC)
    _moments[plan.grid](x_BPC, plan.partial, P, plan.tiles, **plan.tile)
    size = plan.tiles * plan.block_p
    _mean_std[plan.joined](plan.partial, mean_BC, std_BC, P, plan.parts, size, least, **plan.join)
    found = mean_BC, std_BC, scale_C, bias_C, epsilon
    _apply[plan.grid](x_BPC, y_BPC, *found, P, plan.tiles, **plan.tile, IS_ROOT=is_root, RELU=relu)
    return y_BPC, mean_BC, std_BC


def norm_backward(
    g_BPC: Tensor,
    x_BPC: Tensor,
    scale_C: Tensor,
    bias_C: Tensor,
    mean_BC: Tensor,
    std_BC: Tensor,
    epsilon: float,
    is_root: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the map, of scale and of bias."""
    B, P, C = x_BPC.shape
    plan = _Plan(x_BPC)
    sums, own = x_BPC.new_empty(2, 2, B, C, dtype=torch.float32)
    d_x_BPC = torch.empty_like(x_BPC)
    found = mean_BC, std_BC, scale_C, bias_C, epsilon
    kinds = {"IS_ROOT": is_root, "RELU": relu}
    _gradient_sums[plan.grid](g_BPC, x_BPC, plan.partial, *found, P, plan.tiles, **plan.tile, **kinds)
    _joined_sums[plan.joined](plan.partial, sums, own, *found, P, plan.parts, **plan.join, IS_ROOT=is_root)
    _gradient[plan.grid](g_BPC, x_BPC, d_x_BPC, sums, *found, P, plan.tiles, **plan.tile, **kinds)
    d_scale, d_bias = own.sum(dim=1)
    return d_x_BPC, d_scale, d_bias


@triton.jit
def _square(n, W2, C: tl.constexpr, FOLDED: tl.constexpr, BLOCK: tl.constexpr):
    """Of the n-th block of pooled values: their offsets, and the offset of the first of the four values of each, with
    the steps to the others. n counts pooled values, channels last."""
    at = n * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    position, c = at // C, at % C
    if FOLDED:
        return at, position * 4 * C + c, C, 2 * C
    row, column = position // W2, position % W2
    return at, (row * 2 * 2 * W2 + column * 2) * C + c, C, 2 * W2 * C


@triton.jit
def _pool(x_ptr, y_ptr, which_ptr, count, W2, C: tl.constexpr, FOLDED: tl.constexpr, BLOCK: tl.constexpr):
    at, first, right, down = _square(tl.program_id(0).to(tl.int64), W2, C, FOLDED, BLOCK)
    inside = at < count
    best = tl.load(x_ptr + first, mask=inside)
    which = tl.zeros((BLOCK,), tl.int32)
    for n in tl.static_range(1, 4):
        other = tl.load(x_ptr + first + (n % 2) * right + (n // 2) * down, mask=inside)
        which = tl.where(other > best, n, which)
        best = tl.where(other > best, other, best)
    tl.store(y_ptr + at, best, mask=inside)
    tl.store(which_ptr + at, which.to(tl.uint8), mask=inside)


@triton.jit
def _unpool(g_ptr, d_x_ptr, which_ptr, count, W2, C: tl.constexpr, FOLDED: tl.constexpr, BLOCK: tl.constexpr):
    at, first, right, down = _square(tl.program_id(0).to(tl.int64), W2, C, FOLDED, BLOCK)
    inside = at < count
    g = tl.load(g_ptr + at, mask=inside)
    which = tl.load(which_ptr + at, mask=inside)
    for n in tl.static_range(4):
        value = tl.where(which == n, g, 0.0).to(g.dtype)
        tl.store(d_x_ptr + first + (n % 2) * right + (n // 2) * down, value, mask=inside)


_POOLED_AT_A_TIME = 1024


def pool_forward(x: Tensor, folded: bool) -> tuple[Tensor, Tensor]:
    """The largest of each 2 x 2 positions, and which of them it was (uint8, the first of equals).

    Of a map (B, 2H, 2W, C), or of a folded one (B, H, W, 4, C).
    """
    B, H, W, C = (*x.shape[:3], x.shape[-1]) if folded else (len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3])
    y_BHWC = x.new_empty(B, H, W, C)
    which_BHWC = torch.empty_like(y_BHWC, dtype=torch.uint8)
    grid = (triton.cdiv(y_BHWC.numel(), _POOLED_AT_A_TIME),)
    _pool[grid](x, y_BHWC, which_BHWC, y_BHWC.numel(), W, C=C, FOLDED=folded, BLOCK=_POOLED_AT_A_TIME)
    return y_BHWC, which_BHWC


def pool_backward(g_BHWC: Tensor, which_BHWC: Tensor, folded: bool) -> Tensor:
    """The gradient of the map: each pooled value's goes to where it came from."""
    B, H, W, C = g_BHWC.shape
    d_x = g_BHWC.new_empty((B, H, W, 4, C) if folded else (B, 2 * H, 2 * W, C))
    grid = (triton.cdiv(g_BHWC.numel(), _POOLED_AT_A_TIME),)
    _unpool[grid](g_BHWC, d_x, which_BHWC, g_BHWC.numel(), W, C=C, FOLDED=folded, BLOCK=_POOLED_AT_A_TIME)
    return d_x
