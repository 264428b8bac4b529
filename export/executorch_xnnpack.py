"""What XNNPACK multiplies by, and modules that say so to its partitioner.

XNNPACK multiplies 8-bit activations (quantised per token as they come) by 4-bit weights in blocks
with positive bfloat16 scales, or by 8-bit weights with one positive scale per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from edge_kv.export.executorch_fuse import call
from edge_kv.export.packed_weights import PackedLinear
from edge_kv.export.rounding import Factor
from edge_kv.export.weight_file import Spec, StoredTensor, WeightLayout
from edge_kv.formats import BLOCK, FORMATS, Format, Quantised, dequantise, unpack
from edge_kv.nets.weights import Norm

REACHES = (7.0, 7.4, 7.8, 8.2, 6.6, 8.6)  # levels that a block's largest magnitude may lie at
_QD: Any = torch.ops.quantized_decomposed
_aten: Any = torch.ops.aten


class XnnpackLayout(WeightLayout):
    """A weight file of what XNNPACK multiplies by."""

    calibrates = False

    def stored(self, spec: Spec) -> StoredTensor:
        t = super().stored(spec)
        if t.format is None:
            return t
        return StoredTensor(spec, FORMATS["int4-f16" if t.format.bits < 8 else "int8-row"])

    def quantise(
        self, rows: Tensor, fmt: Format, factors: Sequence[Factor] | None = None
    ) -> tuple[Quantised, float]:
        """The positive scale of each block, or row, that leaves the least error of a few."""
        values = rows.numpy().reshape(-1, BLOCK if fmt.served else rows.shape[-1])
        top = np.abs(values).max(1, keepdims=True)
        scales, codes = np.ones_like(top), np.zeros_like(values)  # XNNPACK refuses a scale of 0
        least = np.square(values).sum(1, keepdims=True)
        for reach in REACHES if fmt.served else (float(fmt.high),):
            scale = top / np.float32(reach)
            if fmt.served:
                scale = torch.from_numpy(scale).to(torch.bfloat16).to(torch.float32).numpy()
            rounded = np.rint(values / np.where(scale == 0, np.float32(1), scale))
            rounded = np.clip(rounded, fmt.low, fmt.high)
            error = np.square(values - rounded * scale).sum(1, keepdims=True)
            better = error < least
            least, scales = np.where(better, error, least), np.where(better, scale, scales)
            codes = np.where(better, rounded, codes)
        if fmt.served:
            scales = scales.astype(np.float16)
        blocks = scales.reshape(len(rows), -1)
        q = Quantised(
            codes.astype(np.int8).reshape(rows.shape),
            blocks if fmt.served else None,
            None if fmt.served else blocks[:, 0],
        )
        return q, float(np.square(rows.numpy() - dequantise(fmt, q), dtype=np.float64).sum())


class XnnpackLinear(nn.Module):
    """`PackedLinear` as the pattern of stock quantisation ops that XNNPACK's partitioner takes."""

    def __init__(self, source: PackedLinear):
        super().__init__()
        self.bits = source.format.bits
        q = unpack(source.format, source.packed.numpy(), source.rows, source.cols)
        scales = q.row_scales if q.block_scales is None else q.block_scales.astype(np.float32)
        self.weight = _fixed(torch.from_numpy(q.codes.copy()))
        self.scales = _fixed(torch.from_numpy(np.array(scales)))
        self.zeros = _fixed(torch.zeros_like(self.scales, dtype=torch.int8))
        self.bias = source.bias if source.has_bias else None

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
        return F.linear(x, weight, self.bias)


class XnnpackNorm(Norm):
    """`Norm` whose mean is a one-row linear: XNNPACK takes no mean over the last dimension."""

    def __init__(self, source: Norm):
        nn.Module.__init__(self)
        self.held, self.eps, self.weight = source.held, source.eps, source.weight
        dim = source.weight.shape[0]
        self.mean = _fixed(torch.full((1, dim), 1.0 / dim))
        self.floor = _fixed(torch.full((1,), source.eps))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.floor)) * self.weight


def _fixed(values: Tensor) -> nn.Parameter:
    """A parameter: ExecuTorch drops those that a method does not use, but keeps every buffer."""
    return nn.Parameter(values, requires_grad=False)


def for_xnnpack(module: nn.Module) -> None:
    """Replace linears and norms by their XNNPACK forms; weights are held once."""
    for name, child in list(module.named_children()):
        if isinstance(child, PackedLinear):
            setattr(module, name, XnnpackLinear(child))
        elif isinstance(child, Norm):
            setattr(module, name, XnnpackNorm(child))
        else:
            for_xnnpack(child)


def sigmoids(program: ExportedProgram) -> None:
    """Put every gelu of the tanh form as the sigmoid that it is, and silu too, in place.

    XNNPACK's own gelu is the erf form, 5e-4 off.
    """
    graph = program.graph_module.graph
    slope = 2 * (2 / math.pi) ** 0.5
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            (x,) = node.args
            square = call(graph, node, _aten.mul.Tensor, x, x)
            rise = call(graph, node, _aten.mul.Tensor, square, slope * 0.044715)
            inner = call(graph, node, _aten.add.Tensor, rise, slope)
            inner = call(graph, node, _aten.mul.Tensor, x, inner)
        elif node.target is _aten.silu.default:
            inner = x = node.args[0]
        else:
            continue
        share = call(graph, node, _aten.sigmoid.default, inner)
        node.replace_all_uses_with(call(graph, node, _aten.mul.Tensor, x, share))
    graph.eliminate_dead_code()
    program.graph_module.recompile()
