"""Rounds the rows of a matrix to a weight format: codes, and the scales that leave least error.

Without `factors` every value goes to its nearest level. With them the rounding is GPTQ (Frantar et
al., arXiv 2210.17323): columns are rounded in order, and what a column loses is made up for by the
columns behind it, as the covariance of the layer's inputs says; a scale is chosen when its block is
reached, by the error that can no longer be made up for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_kv.formats import BLOCK, Format, Quantised

# Where a block's value of largest magnitude may come to lie, in units of the outermost level:
# on the longer end of the levels, then on the shorter one.
LONG_END = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05, 1.1)
SHORT_END = (1.0, 0.94, 1.06)
ROWS = 2048  # rows rounded at a time by a thread: a block of them stays in its cache
TINY = 1e-30
HALVES = 256  # half steps from 0 to the end of a byte's range


@dataclass(frozen=True)
class Factor:
    """Columns start … of a matrix: U upper triangular with U^T U = H^-1, H [width, width] = x^T x.

    U[j, j]^-2 is what a squared error of column j costs once the columns behind it are free to
    make up for it; row j, divided by U[j, j], is how they do.
    """

    start: int
    upper: Tensor


class _Grid:
    """The levels of a format on a device."""

    def __init__(self, fmt: Format, device: torch.device):
        levels = fmt.levels or range(fmt.low, fmt.high + 1)
        self.fmt, self.even = fmt, not fmt.levels
        self.levels = torch.tensor(levels, dtype=torch.float32, device=device)
        # Levels are whole numbers of a byte, so what lies between two of them changes at a multiple
        # of 1/2: the code of every half step. Searching would take twenty times as long.
        middle = (torch.arange(-HALVES, HALVES, device=device) + 0.5) / 2
        nearest = (middle[:, None] - self.levels).abs().argmin(1)
        self.half_codes, self.half_levels = nearest.to(torch.int8), self.levels[nearest]
        low, high = float(self.levels[0]), float(self.levels[-1])
        long, short = (low, high) if -low > high else (high, low)
        if fmt.bits == 8:
            self.reaches = [short]  # symmetric: nothing of a fine grid is cut off
        else:
            self.reaches = [long * r for r in LONG_END] + [short * r for r in SHORT_END]

    def nearest(self, x: Tensor) -> Tensor:
        """The level nearest to each value; x is used up."""
        if self.even:
            return x.round_().clamp_(self.fmt.low, self.fmt.high)
        return self.half_levels.index_select(0, self._half(x)).view(x.shape)

    def codes(self, levels: Tensor) -> Tensor:
        """int8 codes of exact levels."""
        if self.even:
            return levels.to(torch.int8)
        return self.half_codes.index_select(0, self._half(levels.clone())).view(levels.shape)

    @staticmethod
    def _half(x: Tensor) -> Tensor:
        """Which half step of a byte's range each value lies in; x is used up."""
        return x.mul_(2).add_(HALVES).clamp_(0, 2 * HALVES - 1).to(torch.int32).flatten()

    def scales(self, blocks: Tensor, cost: Tensor) -> Tensor:
        """The scale of each column of `blocks` [m, n] that leaves least error; cost [m] is a row's.

        Every candidate puts the value of largest magnitude at another level; its least-squares
        scale leaves sum(cost w^2) - <w, q>^2 / <q, q>, the products weighted by cost.
        """
        low, high = blocks.amin(0), blocks.amax(0)
        inverse = _inverse(torch.where(-low > high, low, high))
        gain = torch.full_like(inverse, -1.0)
        scale = torch.zeros_like(inverse)
        for reach in self.reaches:
            q = self.nearest(blocks * (inverse * reach))
            norm = (cost @ q.square()).clamp_min_(TINY)
            dot = cost @ q.mul_(blocks)
            found = dot * dot / norm
            better = found > gain
            gain = torch.where(better, found, gain)
            scale = torch.where(better, dot / norm, scale)
        return scale


def round_rows(
    rows: Tensor, fmt: Format, factors: Sequence[Factor] | None = None
) -> tuple[Quantised, float]:
    """`rows` [n, width] f32 as `fmt` stores them, and the squared error sum((w - q(w))^2)."""
    n, width = rows.shape
    blocks = fmt.blocks(width)
    codes = np.empty((n, width), np.int8)
    block_scales = None if fmt.block_scale is None else np.empty((n, blocks), fmt.block_scale)
    row_scales = np.empty(n, np.float32) if fmt.has_row_scales else None

    def some(start: int) -> float:
        at = slice(start, start + ROWS)
        part, kept = _round(rows[at], fmt, factors)
        codes[at] = part.codes
        if block_scales is not None:
            block_scales[at] = part.block_scales
        if row_scales is not None:
            row_scales[at] = part.row_scales
        return kept

    lost = sum(_in_threads(some, range(0, n, ROWS)))
    return Quantised(codes, block_scales, row_scales), lost


def _in_threads(work: Any, items: Sequence[Any]) -> list[Any]:
    """Each item alone on a core: torch's own threads would wait at every operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _round(rows: Tensor, fmt: Format, factors: Sequence[Factor] | None) -> tuple[Quantised, float]:
    n, width = rows.shape
    device = rows.device
    grid = _Grid(fmt, device)
    padded = fmt.blocks(width) * BLOCK
    w = torch.zeros(padded, n, device=device)
    w[:width] = rows.T
    scales = _float_scales(w, grid, factors)
    row_scale = None
    if fmt.has_row_scales:
        row_scale = scales[0] if fmt.block_scale is None else scales.abs().amax(0) / 127
    values = w if factors is None else w.clone()  # what is left to round of them
    kept = torch.empty_like(w)  # the level of every value
    if factors is None:
        factors = [Factor(0, torch.empty(0, 0, device=device))]
    for factor, stop in zip(factors, [*(f.start for f in factors[1:]), padded], strict=True):
        at = slice(factor.start // BLOCK, -(-stop // BLOCK))
        _round_columns(values[factor.start : stop], factor, grid, row_scale,
                       kept[factor.start : stop], scales[at])  # fmt: skip
    q = Quantised(
        np.ascontiguousarray(grid.codes(kept[:width]).T.cpu().numpy()),
        _stored_scales(scales, fmt, row_scale),
        None if row_scale is None else row_scale.cpu().numpy(),
    )
    lost = 0.0
    blocks, levels = w[:width].split(BLOCK), kept[:width].split(BLOCK)
    for block, level, scale in zip(blocks, levels, scales, strict=True):
        lost += float(level.mul_(scale).sub_(block).square_().sum())
    return q, lost


def _float_scales(w: Tensor, grid: _Grid, factors: Sequence[Factor] | None) -> Tensor:
    """The scale [blocks, n] of every block of w [columns, n] by itself, before it is stored.

    Where a row has one scale alone, every block has it, and it depends on what an error costs.
    """
    if grid.fmt.block_scale is None:
        return grid.scales(w, _cost(w, factors)).expand(len(w) // BLOCK, -1)
    plain = torch.ones(BLOCK, device=w.device)
    return torch.stack([grid.scales(block, plain) for block in w.split(BLOCK)])


def _cost(w: Tensor, factors: Sequence[Factor] | None) -> Tensor:
    """What an error of each column of a matrix costs."""
    cost = torch.ones(w.shape[0], device=w.device)
    for factor in factors or ():
        diagonal = factor.upper.diagonal()
        cost[factor.start : factor.start + len(diagonal)] = diagonal**-2
    return cost


def _round_columns(
    w: Tensor, factor: Factor, grid: _Grid, row_scale: Tensor | None, kept: Tensor, scales: Tensor
) -> None:
    """Round w [columns, n] into `kept`, and `scales` [blocks, n] to what can be stored.

    Where the factor covers columns, w is used up, and scales are chosen anew for what is left.
    """
    upper = factor.upper
    for i in range(len(scales)):
        at = slice(i * BLOCK, (i + 1) * BLOCK)
        block, u = w[at], upper[at, at]
        known = len(u)  # columns of the block that the factor covers; others are filling
        if known and grid.fmt.block_scale is not None:
            cost = torch.empty(len(block), device=w.device)
            cost[:known] = u.diagonal() ** -2
            cost[known:] = cost[:known].mean()
            scales[i] = grid.scales(block, cost)
        if grid.fmt.block_scale is not None:
            scales[i] = _storable(scales[i], row_scale)
        scale = scales[i]
        inverse = _inverse(scale)
        if not known:
            kept[at] = grid.nearest(block * inverse)
            continue
        lost = torch.empty_like(block[:known])
        for j in range(known):
            level = grid.nearest(block[j] * inverse)
            kept[i * BLOCK + j] = level
            torch.sub(block[j], level.mul_(scale), out=lost[j]).div_(u[j, j])
            if j + 1 < known:
                block[j + 1 : known].addr_(u[j, j + 1 :], lost[j], alpha=-1)
        kept[i * BLOCK + known : (i + 1) * BLOCK] = grid.nearest(torch.zeros_like(block[known:]))
        behind = slice((i + 1) * BLOCK, len(upper))
        if behind.start < behind.stop:
            w[behind].addmm_(upper[at, behind].T, lost, alpha=-1)


def _storable(scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """The nearest scale that can be stored: of a given row scale, or as a half."""
    if row_scale is None:
        return scale.to(torch.float16).clamp_(-65504, 65504).to(torch.float32)
    return (scale * _inverse(row_scale)).round_().clamp_(-127, 127) * row_scale


def _stored_scales(scales: Tensor, fmt: Format, row_scale: Tensor | None) -> Any:
    """Block scales [blocks, n] in their own type [n, blocks]."""
    if fmt.block_scale is None:
        return None
    if row_scale is not None:
        scales = (scales * _inverse(row_scale)).round()
    return np.ascontiguousarray(scales.T.cpu().numpy().astype(fmt.block_scale))


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is as good as 0."""
    none = x.abs() < TINY
    return torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, x))
