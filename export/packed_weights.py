"""Makes the modules of a net as a weight layout stores them: packed where it packs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edge_kv.errors import ExportError
from edge_kv.export.weight_file import StoredTensor, WeightLayout
from edge_kv.formats import GROUP, Format
from edge_kv.models.model import Weight
from edge_kv.nets import ops
from edge_kv.nets.weights import Holder, Norm, Rows, Stepped, Weights
from edge_kv.tensors import stored_shape


class _Packed(Holder):
    """A module over packed matrices."""

    def pack(self, name: str, t: StoredTensor, start: int, stop: int) -> Format:
        """A buffer `name` for rows start … stop-1 of a stored matrix, or for a whole stack."""
        assert t.format
        shape = stored_shape(t.format, t.spec.shape)
        if len(t.spec.shape) == 2:
            shape = t.format.shape(stop - start, t.spec.shape[-1])
            start //= GROUP
        region = f"{t.spec.name.removesuffix('.weight')}.packed"
        self.held[name] = Rows(region, start)
        self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))
        return t.format


class PackedLinear(_Packed):
    """x [T, in] -> [T, out] over a packed matrix, plus a bias where one is stored."""

    packed: Tensor
    bias: Tensor

    def __init__(self, t: StoredTensor, bias: bool, start: int, stop: int, step: float = 0.0):
        super().__init__()
        self.step = step  # of its inputs, where they are rounded to a fixed one
        self.format, self.rows = self.pack("packed", t, start, stop), stop - start
        self.cols, self.has_bias = t.spec.shape[-1], bias
        if bias:
            self.hold("bias", (stop - start,), Rows(f"{t.spec.name}.bias", start))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.linear_q(x, self.packed, self.rows, self.format.name, self.step)
        return out + self.bias if self.has_bias else out


class PackedEmbedding(_Packed):
    """Token rows of a packed table, which may be the LM head too."""

    packed: Tensor
    group = GROUP

    def __init__(self, t: StoredTensor):
        super().__init__()
        self.format = self.pack("packed", t, 0, t.spec.shape[0])
        self.width = t.spec.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = ops.embed_q(ids, self.packed, self.width, self.format.name)
        return rows


class PackedExperts(_Packed):
    """Stacked packed experts."""

    gate_up: Tensor
    down: Tensor

    def __init__(self, gate_up: StoredTensor, down: StoredTensor, act: str, limit: float):
        super().__init__()
        self.act, self.limit, self.width = act, limit, down.spec.shape[-1]
        named = (("gate_up", gate_up), ("down", down))
        self.formats = [self.pack(n, t, 0, t.spec.shape[0]).name for n, t in named]

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = ops.experts_q(
            x, index, weight, self.gate_up, self.down, self.width, *self.formats, self.act,
            self.limit,
        )  # fmt: skip
        return out


class _Glu(_Packed):
    """A gated product over three packed matrices, or two and a factor, as one operator."""

    gate: Tensor
    up: Tensor | None
    down: Tensor

    def __init__(
        self, gate: StoredTensor, up: StoredTensor | None, down: StoredTensor, act: str,
        limit: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.act, self.limit, self.width = act, limit, gate.spec.shape[0]
        self.register_buffer("up", None)
        named = (("gate", gate), ("up", up), ("down", down))
        self.formats = [
            self.pack(n, t, 0, t.spec.shape[0]).name if t is not None else "" for n, t in named
        ]

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        out: Tensor = ops.glu_q(
            x, self.gate, self.up, factor, self.down, self.width, *self.formats, self.act,
            self.limit,
        )  # fmt: skip
        return out


class _Norm(Norm):
    """A norm that native operators compute, with the addition of a residual in one."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.norm_rope(x, self.weight, None, None, self.eps, ops.HALVES)
        return out

    def add(self, residual: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = ops.norm_add(x, self.weight, residual, scale, self.eps)
        return out


class PackedWeights(Weights):
    """The modules of a net over a weight layout; an all-float layout yields the float modules.

    With `fused`, norms and gated products are one operator each, which a runtime must know.
    """

    def __init__(self, rows: Iterable[Weight], layout: WeightLayout, *, fused: bool = False):
        super().__init__(rows, layout.steps)
        self.layout, self.fused = layout, fused

    def linear(self, name: str, start: int = 0, stop: int | None = None) -> nn.Module:
        t = self.layout.by_name[name]
        if t.format is None:
            return super().linear(name, start, stop)
        stop = t.spec.shape[0] if stop is None else stop
        if start % GROUP:
            raise ExportError(f"{name}: a part begins at row {start}, no multiple of {GROUP}.")
        before, after = self.steps.get(name, (0.0, 0.0))
        made = PackedLinear(t, f"{name}.bias" in self, start, stop, before)
        return Stepped(made, 0.0, after) if after else made

    def embedding(self, name: str) -> nn.Module:
        t = self.layout.by_name[name]
        return PackedEmbedding(t) if t.format else super().embedding(name)

    def glu(self, at: str, act: str, limit: float = 0.0) -> nn.Module:
        packed = self._packed(f"{at}.gate", f"{at}.up", f"{at}.down")
        if not packed:
            return super().glu(at, act, limit)
        gate, up, down = packed
        return _Glu(gate, up, down, act, limit)

    def gate(self, at: str, act: str) -> nn.Module:
        packed = self._packed(f"{at}.gate", f"{at}.proj")
        if not packed:
            return super().gate(at, act)
        gate, proj = packed
        return _Glu(gate, None, proj, act)

    def _packed(self, *names: str) -> list[StoredTensor]:
        """These matrices, if they are to be one operator: all are packed, without a bias, and round
        no activations to steps of their own."""
        found = [self.layout.by_name[name] for name in names]
        own = [*(f"{name}.bias" for name in names if f"{name}.bias" in self), *self.steps]
        plain = all(t.format for t in found) and not any(name in own for name in names)
        return found if self.fused and plain else []

    def norm(self, name: str, eps: float) -> Norm:
        return _Norm(self.rows[name], eps) if self.fused else super().norm(name, eps)

    def experts(self, name: str, act: str, limit: float = 0.0) -> nn.Module:
        gate_up, down = (self.layout.by_name[f"{name}.{n}"] for n in ("gate_up", "down"))
        if bool(gate_up.format) != bool(down.format):
            raise ExportError(
                f"{name}: expert width {down.spec.shape[-1]} cannot be quantised in blocks; "
                "use --quant none."
            )
        if gate_up.format is None:
            return super().experts(name, act, limit)
        return PackedExperts(gate_up, down, act, limit)
