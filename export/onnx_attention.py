"""What the functions of an ONNX program mean: storing and attending with standard operators.

Each is a module that is traced like the program itself. `Decode…` and `Prefill…` differ in how
they read append buffers: one token multiplies int8 rows as they lie, a chunk makes them float
block by block. Heads come first everywhere, [1, heads, T, D], as buffers hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.config import ModelConfig
from edge_kv.export import onnx_ops as op
from edge_kv.kv_plan import APPEND, RING, KVPlan, LayerPlan, StateBuffer
from edge_kv.model.state import (
    MASKED,
    TORCH_DTYPES,
    Rope,
    quantize_rows,
    ring_positions,
    visible,
)

K_ZERO = 128  # int8 key rows are stored as uint8 + 128: MatMulInteger wants them as operand A
Q_LEVELS = 32_512  # 127 * 256: a 16-bit query splits into two int8 halves without overflow
INT32_ROOM = 2**31 - 1


class Attention(nn.Module):
    """One function over the state of one kind of layer; a subclass's forward is its body."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: LayerPlan, decode: bool):
        super().__init__()
        self.layer, self.ctx, self.decode = layer, plan.ctx, decode
        self.eps, self.v_norm = config.norm_eps, config.v_norm
        self.kv_heads = layer.kv_heads if layer.kind == RING else 1  # heads of one call
        self.group = layer.q_heads // layer.kv_heads

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Raw projection [T, heads*D] -> [1, heads, T, D]; one token needs no transpose."""
        if self.decode:
            return x.view(1, heads, 1, -1)
        return x.unflatten(-1, (heads, -1)).unsqueeze(0).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """[heads, group, T, D] -> [T, heads*group*D]."""
        if self.decode:
            return x.view(1, -1)
        return x.permute(2, 0, 1, 3).reshape(x.shape[2], -1)

    def norm_rope(self, x: Tensor, weight: Tensor, rope: Rope) -> Tensor:
        """[1, heads, T, D] normed per head and rotated."""
        normed = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return op.rope(normed, rope.cos, rope.sin)

    def query(self, q: Tensor, q_norm: Tensor, rope: Rope) -> Tensor:
        """Raw queries normed, rotated and scaled: [1, q_heads, T, D]."""
        q = self.norm_rope(self.split(q, self.kv_heads * self.group), q_norm, rope)
        return q if self.layer.scale == 1.0 else q * self.layer.scale

    def rows(self, k: Tensor, v: Tensor, k_norm: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Raw keys and values as they are stored, each [1, heads, T, D]."""
        keys = self.norm_rope(self.split(k, self.kv_heads), k_norm, rope)
        values = self.split(v, self.kv_heads)
        if self.v_norm:
            values = F.rms_norm(values, values.shape[-1:], None, self.eps)
        return keys, values


class StoreRing(Attention):
    """`op.store_rows` into rings."""

    def forward(
        self, k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
        keys: Tensor, values: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        new = self.rows(k, v, k_norm, Rope(cos, sin))
        k_out, v_out = (
            op.write_rows(view, rows.to(view.dtype), pos, 2, True)
            for view, rows in zip((keys, values), new, strict=True)
        )
        return k_out, v_out


class StoreAppend(Attention):
    """`op.store_rows` and `op.store_rows_int8` into the append views of one head."""

    def forward(
        self, k: Tensor, v: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor,
        keys: Tensor, values: Tensor, *scales: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        new = [x.squeeze(0) for x in self.rows(k, v, k_norm, Rope(cos, sin))]  # [1, T, D]
        if not scales:
            return tuple(
                op.write_rows(view, rows.to(view.dtype), pos, 1, False)
                for view, rows in zip((keys, values), new, strict=True)
            )
        (k_new, k_step), (v_new, v_step) = (quantize_rows(rows) for rows in new)
        k_new = (k_new.to(torch.int32) + K_ZERO).to(torch.uint8)
        written = zip(
            (keys, values, *scales), (k_new, v_new, k_step, v_step), strict=True
        )  # fmt: skip
        return tuple(op.write_rows(view, rows, pos, 1, False) for view, rows in written)


class AttendRing(Attention):
    """`op.attend_rows` over whole rings [1, kv_heads, slots, D]."""

    def forward(
        self, q: Tensor, q_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, keys: Tensor,
        values: Tensor,
    ) -> Tensor:  # fmt: skip
        q = self.query(q, q_norm, Rope(cos, sin))
        t, slots = q.shape[2], keys.shape[2]
        keys, values = keys.to(torch.float32), values.to(torch.float32)
        grouped = q.reshape(1, self.kv_heads, self.group * t, -1)
        at = pos + torch.arange(t, device=pos.device)
        held = ring_positions(pos + (t - 1), slots)
        mask = torch.where(visible(at, held, self.layer.window), 0.0, MASKED)
        scores = self.masked(grouped @ keys.transpose(2, 3), mask)
        mixed = scores.softmax(-1) @ values
        return self.merge(mixed.reshape(self.kv_heads, self.group, -1, self.layer.head_dim))

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Add mask [T, slots] to scores [1, kv_heads, group*T, slots]."""
        if self.decode:
            return scores + mask
        return (scores.unflatten(2, (self.group, mask.shape[0])) + mask).flatten(2, 3)


class AttendAppend(Attention):
    """`op.attend_rows` over the live rows of one KV head."""

    def forward(
        self, q: Tensor, q_norm: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, keys: Tensor,
        values: Tensor, *scales: Tensor,
    ) -> Tensor:  # fmt: skip
        q = self.query(q, q_norm, Rope(cos, sin)).squeeze(0)
        attend = self.one_token if self.decode else self.chunk
        return self.merge(attend(q, pos, keys, values, scales).unsqueeze(0))

    def one_token(
        self, q: Tensor, pos: Tensor, keys: Tensor, values: Tensor, scales: Sequence[Tensor]
    ) -> Tensor:
        """Queries [group, 1, D] over keys and values [1, live, D] -> [group, 1, D]."""
        q, keys, values = q.squeeze(1), keys.squeeze(0), values.squeeze(0)
        seen = torch.arange(keys.shape[0], device=pos.device).unsqueeze(0) <= pos
        mask = torch.where(seen, 0.0, MASKED)
        if not scales:
            scores = q @ keys.to(torch.float32).transpose(0, 1) + mask
            return (scores.softmax(-1) @ values.to(torch.float32)).unsqueeze(1)
        k_scale, v_scale = scales
        weights = (int8_scores(q, keys) * k_scale + mask).softmax(-1) * v_scale
        return int8_mix(weights, values, self.ctx).unsqueeze(1)

    def chunk(
        self, q: Tensor, pos: Tensor, keys: Tensor, values: Tensor, scales: Sequence[Tensor]
    ) -> Tensor:
        """Queries [group, T, D] over keys and values [1, live, D] -> [group, T, D]."""
        k_scale, v_scale = scales or [torch.ones(1, keys.shape[1])] * 2
        zero = K_ZERO if scales else 0
        return op.attend_chunk(q, keys, k_scale, zero, values, v_scale, pos)


BODIES: dict[str, tuple[str, Callable[..., Attention]]] = {  # name -> kind of layer, module
    "store_ring": (RING, StoreRing),
    "attend_ring": (RING, AttendRing),
    "store_append": (APPEND, StoreAppend),
    "attend_append": (APPEND, AttendAppend),
    "store_append_int8": (APPEND, StoreAppend),
    "attend_append_int8": (APPEND, AttendAppend),
}


def body(
    name: str, config: ModelConfig, plan: KVPlan, decode: bool
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Any, ...]]:
    """The module behind function `name`, example inputs for a trace, and their dynamic axes.

    Every layer of a kind has the same shapes, so one function serves them all.
    """
    kind, build = BODIES[name]
    layer = next(p for p in plan.layers if p.kind == kind and p.owns)
    module = build(config, plan, layer, decode)
    tokens, dim = (1 if decode else 3), layer.head_dim
    chunk = None if decode or plan.chunk == 1 else {0: "chunk"}
    live = {1: "live"} if kind == APPEND and plan.ctx > 1 else None
    if name.startswith("store"):
        widths = [module.kv_heads * dim] * 2
    else:
        widths = [module.kv_heads * module.group * dim]
    buffers = [plan.by_name[n] for n in (layer.k, layer.v)]
    scales = [plan.by_name[f"{b.name}.scale"] for b in buffers if b.dtype == "int8"]
    args = (
        *(torch.empty(tokens, n) for n in widths),
        torch.empty(dim),
        *(torch.empty(tokens, dim // 2) for _ in ("cos", "sin")),
        torch.empty(1, dtype=torch.int64),
        *(_view(b, plan) for b in (*buffers, *scales)),
    )
    shapes = (*[chunk] * len(widths), None, chunk, chunk, None, live, live)
    rest = (tuple(live for _ in scales),) if scales else ()  # forward takes them as *scales
    return module, args, shapes + rest


def view_dtype(buffer: StateBuffer) -> torch.dtype:
    """How a graph sees the elements of `buffer`."""
    return (
        torch.uint8 if buffer.role == "k" and buffer.dtype == "int8" else TORCH_DTYPES[buffer.dtype]
    )


def _view(buffer: StateBuffer, plan: KVPlan) -> Tensor:
    """An example of the view of `buffer` that one call takes."""
    if buffer.kind == RING:
        return torch.empty(1, *buffer.shape, dtype=view_dtype(buffer))
    return torch.empty(1, min(256, plan.ctx), *buffer.shape[2:], dtype=view_dtype(buffer))


def int8_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q [group, D] times uint8 keys [S, D] (zero point 128), without the key scales: [group, S].

    The query is rounded to 16 bits and split into two int8 halves, so the error is that of the
    stored rows, not of an 8-bit query (measured: 1.6e-4 against 2-4 %).
    """
    group = q.shape[0]
    top = q.abs().amax(-1, keepdim=True).clamp_min(1e-20) * (1 / Q_LEVELS)
    whole = torch.round(q / top)
    high = torch.round(whole * (1 / 256))
    low = (whole - 256 * high).clamp(-128, 127)
    halves = torch.cat((high, low)).to(torch.int8)
    dots = op.matmul_int8(keys, halves.transpose(0, 1), K_ZERO).to(torch.float32).transpose(0, 1)
    return (dots[:group] * 256 + dots[group:]) * top


def int8_mix(weights: Tensor, values: Tensor, ctx: int) -> Tensor:
    """Non-negative weights [group, S] times int8 values [S, D] -> [group, D].

    Weights are rounded to two unsigned halves of `bits` bits each, as many as an int32 accumulator
    holds over `ctx` rows in the worst case: (2^bits - 1) * 127 * ctx < 2^31.
    """
    group = weights.shape[0]
    half = 2 ** mix_bits(ctx)
    top = weights.amax(-1, keepdim=True).clamp_min(1e-30) * (1 / (half * half - 1))
    whole = torch.round(weights / top)
    high = torch.floor(whole * (1 / half))
    low = whole - half * high
    parts = torch.cat((high, low)).to(torch.uint8)
    sums = op.matmul_int8(parts, values, 0).to(torch.float32)
    return (sums[:group] * half + sums[group:]) * top


def mix_bits(ctx: int) -> int:
    """Most bits a half weight may have so that `ctx` rows cannot overflow an int32 sum."""
    return min(8, int(math.log2(INT32_ROOM / (127 * ctx) + 1)))
