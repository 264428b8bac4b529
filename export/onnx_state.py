"""The decoder's state as ONNX Runtime runs it best: TensorScatter rows, position masks, int8 dots.

`OnnxDecodeState` and `OnnxPrefillState` differ only in how they read append buffers: one token
walks int8 rows without dequantising them, a chunk makes them float block by block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kv.export import onnx_ops as op
from edge_kv.kv_plan import RING, KVPlan, LayerPlan, state_views
from edge_kv.model.state import (
    MASKED,
    HeadNorms,
    Rope,
    quantize_rows,
    ring_positions,
    visible,
)

K_ZERO = 128  # int8 key rows are stored as uint8 + 128: MatMulInteger wants them as operand A
Q_LEVELS = 32_512  # 127 * 256: a 16-bit query splits into two int8 halves without overflow
INT32_ROOM = 2**31 - 1


class OnnxState:
    """State views as graph values; a write replaces the value by its TensorScatter output.

    Heads come first everywhere, [1, heads, T, D], as buffers hold them. A subclass knows T: with
    one token, heads need no transpose and all queries of a layer see the same rows.
    """

    def __init__(self, plan: KVPlan, views: list[Tensor]):
        self.plan = plan
        self.values = {v.name: t for v, t in zip(state_views(plan), views, strict=True)}
        self._masks: dict[str, Tensor] = {}

    def outputs(self) -> list[Tensor]:
        """The written state, in `state_views` order."""
        return list(self.values.values())

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        heads, dim = layer.kv_heads, layer.head_dim
        assert norms.k is not None
        keys = _norm_rope(self._split(k, heads), norms.k, norms.eps, rope)
        values = self._split(v, heads)
        if norms.v:
            values = F.rms_norm(values, (dim,), None, norms.eps)
        self._write(layer.k, keys, pos)
        self._write(layer.v, values, pos)
        return self.attend_shared(layer, q, norms, rope, pos)

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        q = _norm_rope(self._split(q, layer.q_heads), norms.q, norms.eps, rope)
        if layer.scale != 1.0:
            q = q * layer.scale
        attend = self._attend_ring if layer.kind == RING else self._attend_append
        return self._merge(attend(layer, q, pos))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """Raw projection [T, heads*D] -> [1, heads, T, D]."""
        raise NotImplementedError

    def _merge(self, x: Tensor) -> Tensor:
        """[kv_heads, group, T, D] -> [T, kv_heads*group*D]."""
        raise NotImplementedError

    def _mask(self, scores: Tensor, mask: Tensor, group: int) -> Tensor:
        """Add mask [T, slots] to scores [1, kv_heads, group*T, slots]."""
        raise NotImplementedError

    def _attend_head(self, layer: LayerPlan, head: int, q: Tensor, pos: Tensor) -> Tensor:
        """q [group, T, D] over one KV head's live rows -> [group, T, D]."""
        raise NotImplementedError

    def _attend_append(self, layer: LayerPlan, q: Tensor, pos: Tensor) -> Tensor:
        """q [1, q_heads, T, D] over the live rows of every KV head, one after the other."""
        group = layer.q_heads // layer.kv_heads
        parts = _parts(q.squeeze(0), layer.kv_heads, group)
        out = [self._attend_head(layer, h, part, pos) for h, part in enumerate(parts)]
        return torch.stack(out) if len(out) > 1 else out[0].unsqueeze(0)

    def _attend_ring(self, layer: LayerPlan, q: Tensor, pos: Tensor) -> Tensor:
        """q [1, q_heads, T, D] over the whole ring [1, kv_heads, slots, D]."""
        t, kv_heads = q.shape[2], layer.kv_heads
        group = layer.q_heads // kv_heads
        keys, values = (self.values[n].to(torch.float32) for n in (layer.k, layer.v))
        scores = q.reshape(1, kv_heads, group * t, layer.head_dim) @ keys.transpose(2, 3)
        weights = self._mask(scores, self._ring_mask(layer, t, pos, keys.shape[2]), group)
        return (weights.softmax(-1) @ values).reshape(kv_heads, group, -1, layer.head_dim)

    def _ring_mask(self, layer: LayerPlan, t: int, pos: Tensor, slots: int) -> Tensor:
        if "ring" not in self._masks:
            at = pos + torch.arange(t, device=pos.device)
            held = ring_positions(pos + (t - 1), slots)
            self._masks["ring"] = torch.where(visible(at, held, layer.window), 0.0, MASKED)
        return self._masks["ring"]

    def _write(self, name: str, rows: Tensor, pos: Tensor) -> None:
        """Rows [1, heads, T, D] into buffer `name` at pos."""
        buffer = self.plan.by_name[name]
        if buffer.kind == RING:
            rows = rows.to(self.values[name].dtype)
            self.values[name] = op.write_rows(self.values[name], rows, pos, 2, True)
            return
        for h, part in enumerate(_parts(rows.squeeze(0), buffer.heads, 1)):
            self._write_head(name, h, part, pos)

    def _write_head(self, name: str, head: int, rows: Tensor, pos: Tensor) -> None:
        view, scale_view = f"{name}.h{head}", f"{name}.scale.h{head}"
        if scale_view in self.values:
            stored, scale = quantize_rows(rows)
            self.values[scale_view] = op.write_rows(self.values[scale_view], scale, pos, 1, False)
            if self.values[view].dtype == torch.uint8:
                stored = (stored.to(torch.int32) + K_ZERO).to(torch.uint8)
        else:
            stored = rows.to(self.values[view].dtype)
        self.values[view] = op.write_rows(self.values[view], stored, pos, 1, False)


class OnnxDecodeState(OnnxState):
    """One token: int8 rows are multiplied as they lie, queries and weights in two 8-bit halves."""

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(1, heads, 1, -1)

    def _merge(self, x: Tensor) -> Tensor:
        return x.view(1, -1)

    def _mask(self, scores: Tensor, mask: Tensor, group: int) -> Tensor:
        return scores + mask

    def _attend_head(self, layer: LayerPlan, head: int, q: Tensor, pos: Tensor) -> Tensor:
        keys, values = self.values[f"{layer.k}.h{head}"], self.values[f"{layer.v}.h{head}"]
        mask = self._live_mask(pos, keys.shape[1])
        q = q.squeeze(1)
        if self.plan.by_name[layer.k].dtype != "int8":
            scores = q @ keys.squeeze(0).to(torch.float32).transpose(0, 1) + mask
            return (scores.softmax(-1) @ values.squeeze(0).to(torch.float32)).unsqueeze(1)
        k_scale = self.values[f"{layer.k}.scale.h{head}"]
        v_scale = self.values[f"{layer.v}.scale.h{head}"]
        scores = int8_scores(q, keys.squeeze(0)) * k_scale + mask
        weights = scores.softmax(-1) * v_scale
        return int8_mix(weights, values.squeeze(0), self.plan.ctx).unsqueeze(1)

    def _live_mask(self, pos: Tensor, live: int) -> Tensor:
        if "live" not in self._masks:
            seen = torch.arange(live, device=pos.device).unsqueeze(0) <= pos
            self._masks["live"] = torch.where(seen, 0.0, MASKED)
        return self._masks["live"]


class OnnxPrefillState(OnnxState):
    """A chunk: rows become float block by block, with the softmax carried along."""

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).unsqueeze(0).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3).reshape(x.shape[2], -1)

    def _mask(self, scores: Tensor, mask: Tensor, group: int) -> Tensor:
        return (scores.unflatten(2, (group, mask.shape[0])) + mask).flatten(2, 3)

    def _attend_head(self, layer: LayerPlan, head: int, q: Tensor, pos: Tensor) -> Tensor:
        keys, values = self.values[f"{layer.k}.h{head}"], self.values[f"{layer.v}.h{head}"]
        scales = [self._scale(name, head, keys.shape[1]) for name in (layer.k, layer.v)]
        zero = K_ZERO if keys.dtype == torch.uint8 else 0
        return op.attend_chunk(q, keys, scales[0], zero, values, scales[1], pos)

    def _scale(self, name: str, head: int, live: int) -> Tensor:
        """Scales [1, live] of an int8 buffer; ones for a float one."""
        view = f"{name}.scale.h{head}"
        return self.values[view] if view in self.values else torch.ones(1, live)


def _norm_rope(x: Tensor, weight: Tensor, eps: float, rope: Rope) -> Tensor:
    """[1, heads, T, D] normed per head and rotated."""
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return op.rope(normed, rope.cos, rope.sin)


def _parts(x: Tensor, count: int, size: int) -> Sequence[Tensor]:
    """[count*size, T, D] as `count` tensors [size, T, D]; one part costs no operator."""
    return x.split(size) if count > 1 else (x,)


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
