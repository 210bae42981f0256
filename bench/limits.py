"""What the machine can do: matrix products and copies in memory, the limits that other figures are shares of.

    python -m bench.limits [--device cpu] [--side 8192] [--seconds 2]

Medians. `TF32` is how cuDNN computes convolutions of float32 numbers by default.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from bench.measure import MIB, median_seconds, options_of, table

_INPUTS = 4
"""Pairs of matrices in turn, so that none is found in a cache because it was used just before."""


@dataclass(frozen=True)
class Limits:
    """Of a device, in units of 10^12 operations and 10^9 bytes a second."""

    bfloat16: float
    float32: float
    tf32: float | None
    copies: float


def measure(device: torch.device, seconds: float, side: int | None = None) -> Limits:
    """Takes about four times `seconds`."""
    tf32 = None
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        tf32 = products(device, torch.float32, side, seconds)
        torch.set_float32_matmul_precision(before)
    return Limits(
        bfloat16=products(device, torch.bfloat16, side, seconds),
        float32=products(device, torch.float32, side, seconds),
        tf32=tf32,
        copies=copies(device, seconds),
    )


def products(device: torch.device, dtype: torch.dtype, side: int | None, seconds: float) -> float:
    """10^12 operations a second of products of square matrices, a multiplication and an addition being two."""
    side = side or (8192 if device.type == "cuda" else 2048)
    pairs = [[torch.randn(side, side, device=device).to(dtype) for _ in range(2)] for _ in range(_INPUTS)]
    out = torch.empty(side, side, dtype=dtype, device=device)

    def work() -> None:
        for a, b in pairs:
            torch.mm(a, b, out=out)

    return _INPUTS * 2 * side**3 / median_seconds(work, device, seconds) / 1e12


def copies(device: torch.device, seconds: float) -> float:
    """10^9 bytes a second that are read and written, in blocks larger than any cache."""
    size = 1024 * MIB if device.type == "cuda" else 256 * MIB
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / median_seconds(lambda: target.copy_(source), device, seconds) / 1e9


def show(limits: Limits, options: argparse.Namespace) -> None:
    """One table."""
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else f"{options.threads} threads"
    table(
        ("limit", name),
        ("bfloat16, TFLOP/s", f"{limits.bfloat16:.2f}"),
        ("float32, TFLOP/s", f"{limits.float32:.2f}"),
        *([("TF32, TFLOP/s", f"{limits.tf32:.2f}")] if limits.tf32 else []),
        ("copy in memory, GB/s read and written", f"{limits.copies:.0f}"),
    )


def main() -> None:
    """Prints a Markdown table."""
    options = options_of(__doc__, 2, side={"type": int, "help": "of the matrices; as the device suits if left out"})
    show(measure(options.device, options.seconds, options.side), options)


if __name__ == "__main__":
    main()
