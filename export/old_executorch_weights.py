"""Weights of portable programs: as XNNPACK computes with them, and modules that say so to its
partitioner.

XNNPACK multiplies 8-bit activations (quantised per token as they come) by 4-bit weights in blocks
with positive bfloat16 scales, or by 8-bit weights with one positive scale per row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.formats import BLOCK, unpack
from edge_kv.model.decoder import Attention, GeluGate, QuantLinear, RMSNorm

_QD: Any = torch.ops.quantized_decomposed


class XnnpackLinear(nn.Module):
    """`QuantLinear` as the pattern of stock quantisation ops that XNNPACK's partitioner takes."""

    def __init__(self, source: QuantLinear):
        super().__init__()
        self.bits = source.format.bits
        q = unpack(source.format, source.packed.numpy(), source.n_out, source.n_in)
        scales = q.row_scales if q.block_scales is None else q.block_scales.astype(np.float32)
        self.weight = _fixed(torch.from_numpy(q.codes.copy()))
        self.scales = _fixed(torch.from_numpy(np.array(scales)))
        self.zeros = _fixed(torch.zeros_like(self.scales, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        scale, zero = _QD.choose_qparams_per_token_asymmetric(x, torch.int8)
        x = _QD.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        x = _QD.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
        if self.bits == 4:
            weight = _QD.dequantize_per_channel_group(
                self.weight, self.scales, self.zeros, low, high, torch.int8, BLOCK,
                torch.float32,
            )  # fmt: skip
        else:
            weight = _QD.dequantize_per_channel(
                self.weight, self.scales, self.zeros, 0, low, high, torch.int8
            )
        return F.linear(x, weight)


class XnnpackNorm(nn.Module):
    """`RMSNorm` whose mean is a one-row linear: XNNPACK takes no mean over the last dimension."""

    def __init__(self, source: RMSNorm):
        super().__init__()
        self.weight, self.eps = source.weight, source.eps
        dim = source.weight.shape[0]
        self.mean = _fixed(torch.full((1, dim), 1.0 / dim))
        self.floor = _fixed(torch.full((1,), source.eps))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.floor)) * self.weight


class XnnpackGate(nn.Module):
    """`GeluGate` as the sigmoid that it is: XNNPACK's own gelu is the erf form, 5e-4 off."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        slope = 2 * (2 / math.pi) ** 0.5
        return gate * torch.sigmoid(gate * (gate * gate * (slope * 0.044715) + slope)) * up


def _fixed(values: Tensor) -> nn.Parameter:
    """A parameter: ExecuTorch drops those that a method does not use, but keeps every buffer."""
    return nn.Parameter(values, requires_grad=False)


def for_xnnpack(module: nn.Module) -> None:
    """Replace linears, norms and gates by their XNNPACK forms; weights are held once.

    The norms of an attention's heads are left: the state computes with their weights.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, QuantLinear):
            setattr(module, name, XnnpackLinear(child))
        elif isinstance(child, RMSNorm) and not isinstance(module, Attention):
            setattr(module, name, XnnpackNorm(child))
        elif isinstance(child, GeluGate):
            setattr(module, name, XnnpackGate())
        else:
            for_xnnpack(child)
