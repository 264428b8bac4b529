"""Lowers any net of `edge_kv.nets` to a native ExecuTorch program over the weight file.

The tables of a plan are buffers of the program, which `put_in_place` writes; everything else is
what the net computes, in operators of `nets.ops` and stock ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn

from edge_kv import models
from edge_kv.errors import ExportError
from edge_kv.export import executorch_ops as op
from edge_kv.export.executorch_lean import lean
from edge_kv.export.executorch_native import NativeLinear, fakes, weight_keys, weights_outside
from edge_kv.export.executorch_state import attribute
from edge_kv.export.lower_executorch import StatePlanning, check_state, write_program
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.quiet import quiet_trace
from edge_kv.export.weight_file import WeightLayout
from edge_kv.models.model import Model
from edge_kv.nets import make_net, ops
from edge_kv.nets.state import TORCH_DTYPES, Read
from edge_kv.nets.weights import Decoder, Linear, Rows, holders, replace
from edge_kv.plan import SCALE, Plan

PLE = "ple.embed"  # the weight whose rows are fed from outside


class TableBuffers(nn.Module):
    """The tables of a plan under names that a module may have."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        for t in plan.tables:
            buffer = torch.zeros(t.slots, *t.row, dtype=TORCH_DTYPES[t.dtype])
            self.register_buffer(attribute(t.name), buffer, persistent=False)

    def find(self, name: str) -> Tensor | None:
        found: Tensor | None = getattr(self, attribute(name), None)
        return found

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A table and its scales."""
        table = self.find(name)
        assert table is not None
        return table, self.find(name + SCALE)


class BufferState:
    """`nets.state.State` over `TableBuffers`."""

    def __init__(self, tables: TableBuffers):
        self.tables = tables

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        op.put_in_place(*self.tables.stored(table), rows, start)

    def take(self, table: str, at: Tensor) -> Tensor:
        values, _ = self.tables.stored(table)
        # the runtime's remainder of a negative number is negative, as in C
        rows = values[torch.remainder(at.clamp_min(0), values.shape[0])]
        return torch.where((at >= 0)[..., None, None], rows, 0.0)

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        stride = self.tables.plan[table].stride
        picked: Tensor = ops.select(q, weight, pos, *self.tables.stored(table), k, stride)
        return picked

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        operands: list[Tensor | None] = []
        for read in reads:
            operands += [*self.tables.stored(read.keys), *self.tables.stored(read.values)]
            operands.append(read.picked)
        operands += [None] * (10 - len(operands))  # the operator takes two reads
        tables = [self.tables.plan[read.keys] for read in reads]
        out: Tensor = ops.attend(
            q, pos, sink, *operands, scale, [t.stride for t in tables], [t.keep for t in tables]
        )
        return out


class _Decode(nn.Module):
    """ids [1], pos [1], ple [1, layers, dim] -> logits [vocab]."""

    def __init__(self, net: Decoder, state: TableBuffers):
        super().__init__()
        self.net, self.state = net, state

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        return self.net.logits(self.net(ids, pos, BufferState(self.state), ple))[0]


class _Prefill(nn.Module):
    """ids [chunk], pos [1], ple [chunk, layers that own state, dim] -> the position after, [1]."""

    def __init__(self, net: Decoder, state: TableBuffers):
        super().__init__()
        self.net, self.state = net, state

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        self.net.prefill(ids, pos, BufferState(self.state), ple)
        return pos + ids.shape[0]


class _NetLinear(nn.Module):
    """`nets.weights.Linear` on the engine's own threads; rows may have any leading axes."""

    def __init__(self, source: Linear):
        super().__init__()
        self.product, self.bias = NativeLinear(source), source.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def lower_net_executorch(
    config: Model, plan: Plan, layout: WeightLayout, path: Path, *, facts: dict[str, int]
) -> None:
    """Write a `.pte` with the methods `prefill` and `decode` at `path`.

    Raises:
        ExportError: ExecuTorch cannot lower this net, or it plans state that is not the plan's.
    """
    try:
        with quiet_trace(), lean():
            exported, keys = _export(config, plan, layout)
            edge = to_edge(
                exported,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods=dict(facts),
            )
            planning = StatePlanning(alloc_graph_input=False, share_mutable_buffers=True)
            with weights_outside():
                program = edge.to_executorch(
                    ExecutorchBackendConfig(
                        run_reinplace_pass=True,
                        emit_mutable_buffer_names=True,
                        external_constants=lambda node: keys.get(node.name),
                        memory_planning_pass=planning,
                        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                    )
                )
            write_program(program, path)
    except ExportError:
        raise
    except Exception as e:
        raise ExportError(f"Lowering to ExecuTorch failed: {e}") from e
    check_state({t.name: t.bytes for t in plan.tables}, planning)


def _export(
    config: Model, plan: Plan, layout: WeightLayout
) -> tuple[dict[str, Any], dict[str, str]]:
    """Both methods over fakes, and the keys of their weights."""
    rows = models.weights(config)
    with torch.device("meta"):
        net = make_net(config, PackedWeights(rows, layout))
    assert isinstance(net, nn.Module)
    ple = next((row.shape for row in rows if row.name == PLE), None)
    chunk = torch.export.Dim("chunk", min=1, max=plan.chunk)
    exported = {}
    with fakes(), torch.no_grad():
        held: dict[str, Rows] = {}
        for name, module in net.named_modules():
            for leaf, at in getattr(module, "held", {}).items():
                held[f"net.{name}.{leaf}"] = at
        for holder in holders(net):
            for leaf in holder.held:
                old: Tensor = getattr(holder, leaf)
                replace(holder, leaf, torch.empty(old.shape, dtype=old.dtype))
        _replace_linears(net, held)
        state = TableBuffers(plan)
        for name, build, tokens in (
            ("prefill", _Prefill, min(3, plan.chunk)),
            ("decode", _Decode, 1),
        ):
            grows = {0: chunk} if tokens > 1 else None
            shapes: dict[str, Any] = {"ids": grows, "pos": None}
            args = [torch.zeros(tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
            if ple:
                layers: int = config.layers
                width = ple[1] // layers
                fed = getattr(config, "owners", layers) if name == "prefill" else layers
                args.append(torch.zeros(tokens, fed, width))
                shapes["ple"] = grows
            exported[name] = torch.export.export(
                build(net, state).eval(), tuple(args), dynamic_shapes=shapes, strict=False
            )
    return exported, weight_keys(exported, held.get, layout)


def _replace_linears(module: nn.Module, held: dict[str, Rows], at: str = "net.") -> None:
    """Put products with float weights on native operators; what they hold gets its new path."""
    for name, child in list(module.named_children()):
        path = f"{at}{name}."
        if type(child) is Linear:
            setattr(module, name, _NetLinear(child))
            held[f"{path}product.weight"] = held[f"{path}weight"]
        else:
            _replace_linears(child, held, path)
