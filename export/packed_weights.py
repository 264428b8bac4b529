"""Makes the modules of a net as a weight layout stores them: packed where it packs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """x [T, in] -> [T, out] over a packed matrix, plus a bias where one is stored.

    `steps` are those of its input and output, where they are rounded to fixed ones; outputs are
    bounded by a `cap` above 0.
    """

    packed: Tensor
    bias: Tensor

    def __init__(
        self, t: StoredTensor, bias: bool, start: int, stop: int,
        steps: tuple[float, float] = (0.0, 0.0), cap: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.ends = (*steps, cap)
        self.format, self.rows = self.pack("packed", t, start, stop), stop - start
        self.cols, self.has_bias = t.spec.shape[-1], bias
        if bias:
            self.hold("bias", (stop - start,), Rows(f"{t.spec.name}.bias", start))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.linear_q(x, self.packed, self.rows, self.format.name, *self.ends)
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
        limit: float, steps: Sequence[float],
    ):  # fmt: skip
        super().__init__()
        self.act, self.limit, self.width = act, limit, gate.spec.shape[0]
        self.steps = steps  # as `ops.glu_q` takes them
        self.register_buffer("up", None)
        named = (("gate", gate), ("up", up), ("down", down))
        self.formats = [
            self.pack(n, t, 0, t.spec.shape[0]).name if t is not None else "" for n, t in named
        ]

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        out: Tensor = ops.glu_q(
            x, self.gate, self.up, factor, self.down, self.width, *self.formats, self.act,
            self.limit, *self.steps,
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
        bias = f"{name}.bias" in self
        if self.fused and not bias:
            return PackedLinear(t, False, start, stop, (before, after))
        made = PackedLinear(t, bias, start, stop, (before, 0.0))
        return Stepped(made, 0.0, after) if after else made

    def head(self, name: str = "", cap: float = 0.0) -> nn.Module:
        name = name or self.head_name
        t = self.layout.by_name[name]
        if not (self.fused and t.format) or f"{name}.bias" in self:
            return super().head(name, cap)
        return PackedLinear(t, False, 0, t.spec.shape[0], self.steps.get(name, (0.0, 0.0)), cap)

    def embedding(self, name: str) -> nn.Module:
        t = self.layout.by_name[name]
        return PackedEmbedding(t) if t.format else super().embedding(name)

    def glu(self, at: str, act: str, limit: float = 0.0) -> nn.Module:
        made = self._glu(f"{at}.gate", f"{at}.up", f"{at}.down", act, limit)
        return made or super().glu(at, act, limit)

    def gate(self, at: str, act: str) -> nn.Module:
        return self._glu(f"{at}.gate", None, f"{at}.proj", act, 0.0) or super().gate(at, act)

    def _glu(self, gate: str, up: str | None, down: str, act: str, limit: float) -> _Glu | None:
        """These matrices as one operator, if they can be: all are packed, none has a bias, and gate
        and up take the same input."""
        names = [name for name in (gate, up, down) if name]
        found = {name: self.layout.by_name[name] for name in names}
        plain = all(t.format and f"{name}.bias" not in self for name, t in found.items())
        (step, gate_step), (up_in, up_step), (down_step, out_step) = (
            self.steps.get(name or gate, (0.0, 0.0)) for name in (gate, up, down)
        )
        if not (self.fused and plain and step == up_in):
            return None
        steps = (step, gate_step, up_step, down_step, out_step)
        return _Glu(found[gate], found[up] if up else None, found[down], act, limit, steps)

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
