"""Count tables of whole batches on a device: what `model.counts.tally` says of each image, to the last count, in a few
operations and one transfer a batch. B images, H x W px, P counted pixels, M rows of the tables.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.arrays import Array
from model.counts import ROW, TOLERANCE, codes, spread

_CODES = 1 << 16
_KINDS = 4
_TRUTH, _REACHED = 2, 3
"""which of the kinds, as ROW names them"""


class Packed(NamedTuple):
    """Tables of B images as they are stored."""

    bytes_M: Tensor
    """(M, bytes of ROW) uint8"""
    lengths_B: Tensor
    """rows of each image"""

    def on_host(self) -> tuple[Array, list[int]]:
        """As `CountsBuilder.extend` takes them."""
        return self.bytes_M.cpu().numpy().ravel().view(ROW), self.lengths_B.tolist()


def tally_batch(half_BHW: Tensor, truth_BHW: Tensor, tolerance: int = TOLERANCE) -> Packed:
    """The tables of a batch; the truth is uint8, 0 or 1. Waits once for the current stream, to know how many rows there
    are."""
    codes_BHW = codes(torch, half_BHW)
    kinds_BHW = truth_BHW + spread(torch, truth_BHW, tolerance)  # 0 to 2, for what is of the truth is near it
    return _packed(
        len(half_BHW),
        _image_of(half_BHW),
        codes_BHW.flatten(),
        kinds_BHW.flatten(),
        spread(torch, codes_BHW, tolerance).flatten(),
    )


def tally_every(half_BHW: Tensor, truth_BHW: Tensor, factor: int, first_row: int) -> Packed:
    """The same, without a tolerance, of every n-th pixel of a flattened split in which the first image of the batch is
    the one of that row: where the pixels of an image begin depends on the images before."""
    first = -first_row * half_BHW[0].numel() % factor
    image_P, half_P, truth_P = (one.flatten()[first::factor] for one in (_image_of(half_BHW), half_BHW, truth_BHW))
    codes_P = codes(torch, half_P)
    return _packed(len(half_BHW), image_P, codes_P, truth_P * _TRUTH, codes_P)


def _image_of(half_BHW: Tensor) -> Tensor:
    """(pixels of the batch,) which image each is of"""
    return torch.arange(len(half_BHW), device=half_BHW.device)[:, None, None].expand(half_BHW.shape).flatten()


def _packed(images: int, image_P: Tensor, codes_P: Tensor, kinds_P: Tensor, best_P: Tensor) -> Packed:
    """`best_P` is the code that reaches a pixel of the truth."""
    table = torch.zeros(images * _KINDS * _CODES, dtype=torch.int32, device=codes_P.device)
    # A sum into places, unlike bincount, need not know the largest place before it begins.
    for kind_P, code_P, counted_P in (
        (kinds_P, codes_P, torch.ones_like(kinds_P)),
        (torch.full_like(kinds_P, _REACHED), best_P, kinds_P == _TRUTH),
    ):
        place_P = (image_P * _KINDS + kind_P) * _CODES + (code_P.int() + _CODES // 2)
        table.scatter_add_(0, place_P, counted_P.int())
    table_BKC = table.view(images, _KINDS, _CODES)
    present_BC = (table_BKC[:, 0] | table_BKC[:, 1] | table_BKC[:, _TRUTH]) != 0
    lengths_B = present_BC.sum(dim=1)
    image_M, code_M = present_BC.nonzero(as_tuple=True)
    counts_MK = table_BKC.transpose(1, 2)[image_M, code_M].contiguous()
    stored_M1 = (code_M - _CODES // 2).to(torch.int16)[:, None]
    return Packed(torch.cat([stored_M1.view(torch.uint8), counts_MK.view(torch.uint8)], dim=1), lengths_B)
