"""The decoder's state in an ONNX graph: views as values, one function call per store and attend.

The functions are made of standard operators (`onnx_attention`), which is what a stock onnxruntime
runs; the native operators of `runtime/native` stand in for them by name where they are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kv.export import onnx_ops as op
from edge_kv.kv_plan import RING, KVPlan, LayerPlan, state_views
from edge_kv.model.state import HeadNorms, Rope


class OnnxState:
    """State views as graph values; a write replaces the value by what the function returns."""

    def __init__(self, plan: KVPlan, views: list[Tensor]):
        self.values = {v.name: t for v, t in zip(state_views(plan), views, strict=True)}

    def outputs(self) -> list[Tensor]:
        """The written state, in `state_views` order."""
        return list(self.values.values())

    def attend_own(
        self, layer: LayerPlan, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, rope: Rope,
        pos: Tensor,
    ) -> Tensor:  # fmt: skip
        assert norms.k is not None
        parts = _heads(layer, k), _heads(layer, v)
        for h, (keys, values) in enumerate(zip(*parts, strict=True)):
            raw = (keys, values, norms.k, rope.cos, rope.sin, pos)
            names = _views(layer, h, self.values)
            views = [self.values[n] for n in names]
            written: tuple[Tensor, ...]
            if len(views) == 4:
                written = op.store_rows_int8(*raw, *views, norms.v, norms.eps)
            else:
                written = op.store_rows(*raw, *views, layer.kind == RING, norms.v, norms.eps)
            self.values.update(zip(names, written, strict=True))
        return self.attend_shared(layer, q, norms, rope, pos)

    def attend_shared(
        self, layer: LayerPlan, q: Tensor, norms: HeadNorms, rope: Rope, pos: Tensor
    ) -> Tensor:
        out = []
        for h, part in enumerate(_heads(layer, q)):
            views = [self.values[n] for n in _views(layer, h, self.values)]
            keys, values, *scales = views
            k_scale, v_scale = scales or (None, None)
            out.append(
                op.attend_rows(
                    part, norms.q, rope.cos, rope.sin, pos, keys, values, k_scale, v_scale,
                    layer.window, norms.eps, layer.scale,
                )
            )  # fmt: skip
        return torch.cat(out, -1) if len(out) > 1 else out[0]


def _heads(layer: LayerPlan, x: Tensor) -> tuple[Tensor, ...]:
    """Raw projections [T, heads*D] as one call takes them: a ring all heads, an append one."""
    whole = layer.kind == RING or layer.kv_heads == 1
    return (x,) if whole else tuple(x.chunk(layer.kv_heads, -1))


def _views(layer: LayerPlan, head: int, known: dict[str, Tensor]) -> list[str]:
    """Names of the views that one call reads or writes: k, v and, where they are int8, scales."""
    if layer.kind == RING:
        return [layer.k, layer.v]
    names = [f"{n}.h{head}" for n in (layer.k, layer.v)]
    scales = [f"{n}.scale.h{head}" for n in (layer.k, layer.v)]
    return names + [n for n in scales if n in known]
