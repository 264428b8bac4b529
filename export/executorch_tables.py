"""The tables of a plan as buffers of an ExecuTorch program, and the operators of ours over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_kv.export import executorch_ops as op
from edge_kv.nets import ops
from edge_kv.nets.state import TORCH_DTYPES, Read
from edge_kv.plan import SCALE, Plan


def attribute(name: str) -> str:
    """What a table is called as an attribute of a module: "l3.k.scale" is "l3_k_scale"."""
    return name.replace(".", "_")


class Held(ABC):
    """Where the tables of a plan are found."""

    plan: Plan

    @abstractmethod
    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A table and its scales, None where it is not quantised."""

    def take(self, name: str, at: Tensor) -> Tensor:
        """Rows of an exact table: see `nets.state.State.take`."""
        values, _ = self.stored(name)
        # the runtime's remainder of a negative number is negative, as in C
        rows = values[torch.remainder(at.clamp_min(0), values.shape[0])]
        return torch.where((at >= 0)[..., None, None], rows, 0.0)


class PassedTables(Held):
    """Tables that a program is handed, to read."""

    def __init__(self, plan: Plan, tables: Sequence[Tensor]):
        self.plan = plan
        self.values = {t.name: v for t, v in zip(plan.tables, tables, strict=True)}

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.values[name], self.values.get(name + SCALE)


class Tables(nn.Module, Held):
    """Every table of a plan [slots, heads, dim], in its own type."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        for t in plan.tables:
            buffer = torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype])
            self.register_buffer(attribute(t.name), buffer, persistent=False)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        return getattr(self, attribute(name)), getattr(self, attribute(name + SCALE), None)


class NativeState:
    """`nets.state.State` over tables, in operators of ours."""

    def __init__(self, tables: Held):
        self.tables, self.take = tables, tables.take

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        op.put_in_place(*self.tables.stored(table), rows, start)

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        stride = self.tables.plan[table].stride
        picked: Tensor = ops.select(q, weight, pos, *self.tables.stored(table), k, stride)
        return picked

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        tables = self.tables
        return ops.attend_reads(q, pos, sink, reads, tables.stored, tables.plan, scale)
