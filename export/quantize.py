"""Data-free weight quantisation: symmetric int4 or int8 in blocks, scales that minimise error.

For each block the scale is searched, not taken from the largest value: every candidate grid is
scored by the squared error left after its least-squares scale, <w,q>^2 / <q,q>.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEARCH = {4: (8.0, 7.6, 7.2, 6.8, 8.4, 8.8, -7.0, -7.4), 8: (127.0,)}
_CHUNK = 1 << 20  # values quantised at a time: the search's temporaries stay in cache


def quantize(
    rows: Tensor, bits: int, block: int, *, signed_scales: bool = True
) -> tuple[Tensor, Tensor, float]:
    """Rows [n, width] f32 -> packed uint8 [n, width/block, block*bits/8], scales f32, error.

    A negative scale puts a block's extreme on the longer end of the integers; engines that refuse
    them get the best positive ones (`signed_scales` false).

    The error is sum((w - q(w))^2); divide by sum(w^2) and take the root for a relative one. Values
    are stored + 2^(bits-1), four-bit pairs low nibble first (MatMulNBits without zero points).
    """
    n, width = rows.shape
    packed = torch.empty(n, width // block, block * bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, width // block)
    lost = 0.0
    step = max(1, _CHUNK // width)
    for at in range(0, n, step):
        part = rows[at : at + step].reshape(-1, block)
        q, scale, error = _search(part, bits, signed_scales)
        packed[at : at + step] = _pack(q, bits).view(-1, width // block, block * bits // 8)
        scales[at : at + step] = scale.view(-1, width // block)
        lost += error
    return packed, scales, lost


def _search(blocks: Tensor, bits: int, signed_scales: bool) -> tuple[Tensor, Tensor, float]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    top = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # signed extreme of each block
    grids = SEARCH[bits]
    if not signed_scales:
        top, grids = -top.abs(), tuple(map(abs, grids))
    inverse = torch.where(top == 0, 0.0, 1.0 / torch.where(top == 0, 1.0, top))
    best_gain = torch.full((blocks.shape[0],), -1.0)
    best_q = torch.zeros_like(blocks)
    best_scale = torch.zeros(blocks.shape[0])
    for grid in grids:
        # the extreme maps to -grid: the asymmetric end of the range gets the largest value
        q = (blocks * (inverse * -grid)).round_().clamp_(low, high)
        dot, norm = (blocks * q).sum(1), (q * q).sum(1).clamp_min_(1e-30)
        gain = dot * dot / norm
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, dot / norm, best_scale)
        best_q = torch.where(better.unsqueeze(1), q, best_q)
    error = float((blocks.square().sum(1) - best_gain).clamp_min_(0).sum(dtype=torch.float64))
    return best_q, best_scale, error


def _pack(q: Tensor, bits: int) -> Tensor:
    stored = (q + 2 ** (bits - 1)).to(torch.uint8)
    return stored if bits == 8 else stored[:, 0::2] | (stored[:, 1::2] << 4)
