"""Data-free weight quantisation: symmetric int4 or int8 in blocks, scales that minimise error.

For each block the scale is searched, not taken from the largest value: every candidate grid is
scored by the squared error left after its least-squares scale, <w,q>^2 / <q,q>.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

SEARCH = {4: (8.0, 7.6, 7.2, 6.8, 8.4, 8.8, -7.0, -7.4), 8: (127.0,)}
_CHUNK = 1 << 18  # values quantised at a time: the search's temporaries stay small


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
    step = max(1, _CHUNK // width)

    def some(at: int) -> float:
        part = rows[at : at + step].reshape(-1, block)
        q, scale, error = _search(part, bits, signed_scales)
        packed[at : at + step] = _pack(q, bits).view(-1, width // block, block * bits // 8)
        scales[at : at + step] = scale.view(-1, width // block)
        return error

    # A thread a core, each alone with its part: torch's own threads would wait at every operation.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            lost = sum(pool.map(some, range(0, n, step)))
    finally:
        torch.set_num_threads(threads)
    return packed, scales, lost


def _search(blocks: Tensor, bits: int, signed_scales: bool) -> tuple[Tensor, Tensor, float]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    top = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # signed extreme of each block
    grids = SEARCH[bits]
    if not signed_scales:
        top, grids = -top.abs(), tuple(map(abs, grids))
    inverse = torch.where(top == 0, 0.0, 1.0 / torch.where(top == 0, 1.0, top))
    q, work = torch.empty_like(blocks), torch.empty_like(blocks)
    dots, norms = torch.empty(2, len(grids), blocks.shape[0])
    for i, grid in enumerate(grids):
        _round(blocks, inverse * -grid, low, high, out=q)
        torch.sum(torch.mul(blocks, q, out=work), 1, out=dots[i])
        torch.sum(torch.mul(q, q, out=work), 1, out=norms[i])
    gain, best = (dots * dots / norms.clamp_min_(1e-30)).max(0)
    scale = (dots / norms).gather(0, best[None])[0]
    _round(blocks, inverse * -torch.tensor(grids)[best][:, None], low, high, out=q)
    error = float((blocks.square().sum(1) - gain).clamp_min_(0).sum(dtype=torch.float64))
    return q, scale, error


def _round(blocks: Tensor, inverse: Tensor, low: int, high: int, out: Tensor) -> None:
    """Integers of a grid; the extreme maps to -grid, the longer end of the range."""
    torch.mul(blocks, inverse, out=out).round_().clamp_(low, high)


def _pack(q: Tensor, bits: int) -> Tensor:
    stored = (q + 2 ** (bits - 1)).to(torch.uint8)
    return stored if bits == 8 else stored[:, 0::2] | (stored[:, 1::2] << 4)
