"""Makes the modules of a net as a weight layout stores them: packed where it packs."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from edge_kv.errors import ExportError
from edge_kv.export.weight_file import StoredTensor, WeightLayout
from edge_kv.models.model import Weight
from edge_kv.nets import ops
from edge_kv.nets.weights import Holder, Rows, Weights


class _Packed(Holder):
    """A module over packed integers and their scales, held as two buffers each."""

    def pack(
        self, name: str, t: StoredTensor, layout: WeightLayout, start: int, stop: int,
        flat: bool = False,
    ) -> None:  # fmt: skip
        """Buffers `name`packed and `name`scales for rows start … stop-1 of a stored tensor.

        `flat`: the blocks of a row lie in one axis.
        """
        for part in ("packed", "scales"):
            region = layout.regions[f"{t.spec.name}.{part}"]
            shape = (stop - start, *([prod(region.shape[1:])] if flat else region.shape[1:]))
            dtype = torch.uint8 if region.dtype == "u8" else torch.float32
            self.held[name + part] = Rows(region.name, start)
            self.register_buffer(name + part, torch.empty(shape, dtype=dtype))


class PackedLinear(_Packed):
    """x [T, in] -> [T, out] over packed integers, plus a bias where one is stored."""

    packed: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, t: StoredTensor, layout: WeightLayout, bias: bool, start: int, stop: int):
        super().__init__()
        self.bits, self.block = t.bits, t.block
        self.pack("", t, layout, start, stop)
        self.has_bias = bias
        if bias:
            self.hold("bias", (stop - start,), Rows(f"{t.spec.name}.bias", start))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.linear_q(x, self.packed, self.scales, self.bits, self.block)
        return out + self.bias if self.has_bias else out


class PackedEmbedding(_Packed):
    """Token rows of a packed table, which may be the LM head too."""

    packed: Tensor
    scales: Tensor

    def __init__(self, t: StoredTensor, layout: WeightLayout):
        super().__init__()
        self.bits, self.block = t.bits, t.block
        self.pack("", t, layout, 0, t.spec.shape[0], flat=True)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = ops.embed_q(ids, self.packed, self.scales, self.bits, self.block)
        return rows


class PackedExperts(_Packed):
    """Stacked packed experts."""

    def __init__(
        self, gate_up: StoredTensor, down: StoredTensor, layout: WeightLayout, act: str,
        limit: float,
    ):  # fmt: skip
        super().__init__()
        self.bits, self.act, self.limit = gate_up.bits, act, limit
        for name, t in (("gate_up_", gate_up), ("down_", down)):
            self.pack(name, t, layout, 0, t.spec.shape[0])

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = ops.experts_q(
            x, index, weight, self.gate_up_packed, self.gate_up_scales,
            self.down_packed, self.down_scales, self.bits, self.act, self.limit,
        )  # fmt: skip
        return out


class PackedWeights(Weights):
    """The modules of a net over a weight layout; an all-float layout yields the float modules."""

    def __init__(self, rows: Iterable[Weight], layout: WeightLayout):
        super().__init__(rows)
        self.layout = layout

    def linear(self, name: str, start: int = 0, stop: int | None = None) -> nn.Module:
        t = self.layout.by_name[name]
        if t.bits == 32:
            return super().linear(name, start, stop)
        stop = t.spec.shape[0] if stop is None else stop
        return PackedLinear(t, self.layout, f"{name}.bias" in self, start, stop)

    def embedding(self, name: str) -> nn.Module:
        t = self.layout.by_name[name]
        return super().embedding(name) if t.bits == 32 else PackedEmbedding(t, self.layout)

    def experts(self, name: str, act: str, limit: float = 0.0) -> nn.Module:
        gate_up, down = (self.layout.by_name[f"{name}.{n}"] for n in ("gate_up", "down"))
        if gate_up.bits != down.bits:
            raise ExportError(
                f"{name}: expert width {down.spec.shape[-1]} cannot be quantised in blocks; "
                "use --quant none."
            )
        if gate_up.bits == 32:
            return super().experts(name, act, limit)
        return PackedExperts(gate_up, down, self.layout, act, limit)
