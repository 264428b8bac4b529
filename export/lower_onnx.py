"""Lowers any net of `edge_kv.nets` to ONNX: two programs over one external weight file.

`prefill` takes a chunk and writes state; `decode` takes a token and the drafts behind it, writes
state and returns the logits of each. Both take every table of the plan as an input and return it as
an output of the same name with `.out` behind; a session binds the two to the same memory. A table
without a `keep` is bound as far as it is in use, so that the cost of a step follows the position
and not the context.

Graphs are traced on the meta device, so a full-size graph costs no weight memory; initializers
then become references into the weight file that `weight_file` streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edge_kv import models
from edge_kv.errors import ExportError
from edge_kv.export.onnx_functions import OPSET, attach_functions, translation_table
from edge_kv.export.onnx_graph import EXACT, make_exact, place, simplify
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.quiet import quiet_trace
from edge_kv.export.weight_file import WeightLayout
from edge_kv.manifest import (
    Program,
    TensorIO,
    live_axis,
    logits_shape,
    table_shape,
    tokens_axis,
)
from edge_kv.models.model import Model, TokenRows
from edge_kv.nets import make_net, ops
from edge_kv.nets.state import TORCH_DTYPES, Read
from edge_kv.nets.weights import Decoder
from edge_kv.plan import LIVE_STEP, SCALE, Plan

DETAILS = {"opset": OPSET}


class TableState:
    """State in a graph: tables as values; `put` replaces them by what the operator returns."""

    def __init__(self, plan: Plan, tables: Sequence[Tensor]):
        self.plan = plan
        self.values = {t.name: v for t, v in zip(plan.tables, tables, strict=True)}

    def put(self, table: str, rows: Tensor, start: Tensor) -> None:
        names = [table, *([table + SCALE] if table + SCALE in self.values else [])]
        written = ops.put(*self.stored(table), rows, start)
        self.values.update(zip(names, written, strict=True))

    def take(self, table: str, at: Tensor) -> Tensor:
        values = self.values[table]
        rows = values[torch.remainder(at, values.shape[0])]
        return torch.where((at >= 0)[..., None, None], rows, 0.0)

    def select(self, table: str, q: Tensor, weight: Tensor, pos: Tensor, k: int) -> Tensor:
        stride = self.plan[table].stride
        picked: Tensor = ops.select(q, weight, pos, *self.stored(table), k, stride)
        return picked

    def attend(
        self, q: Tensor, reads: Sequence[Read], pos: Tensor, scale: float,
        sink: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return ops.attend_reads(q, pos, sink, reads, self.stored, self.plan, scale)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A table's values and its scales."""
        return self.values[name], self.values.get(name + SCALE)


class _DecodeProgram(nn.Module):
    """ids [n], pos [1], rows, tables -> logits [n, vocab] ([vocab] without drafts), tables."""

    def __init__(self, net: Decoder, plan: Plan):
        super().__init__()
        self.net, self.plan = net, plan

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor | None, *tables: Tensor) -> Any:
        state = TableState(self.plan, tables)
        logits = self.net.logits(self.net(ids, pos, state, rows))
        return logits if self.plan.drafts else logits[0], *state.values.values()


class _PrefillProgram(nn.Module):
    """ids [chunk], pos [1], rows, tables -> tables."""

    def __init__(self, net: Decoder, plan: Plan):
        super().__init__()
        self.net, self.plan = net, plan

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor | None, *tables: Tensor) -> Any:
        state = TableState(self.plan, tables)
        self.net.prefill(ids, pos, state, rows)
        return tuple(state.values.values())


PROGRAMS: dict[str, Any] = {"prefill": _PrefillProgram, "decode": _DecodeProgram}


def lower_onnx(
    config: Model, plan: Plan, layout: WeightLayout, folder: Path, weights: str
) -> dict[str, Program]:
    """Write `prefill.onnx` and `decode.onnx` into `folder`, over the file `weights` beside them.

    Raises:
        ExportError: torch could not trace or translate the net.
    """
    with torch.device("meta"):
        net = make_net(config, PackedWeights(models.weights(config), layout, fused=True))
    assert isinstance(net, nn.Module)
    computed = {
        n: b for n, b in net.named_buffers(remove_duplicate=False) if not b.is_meta
    }  # frequencies of ropes
    net.to("meta")
    programs = {}
    for name, build in PROGRAMS.items():
        try:
            model = _trace_program(build(net, plan), plan, config.token_rows, name)
        except Exception as e:
            raise ExportError(f"Lowering {name} to ONNX failed: {e}") from e
        _name_io(model, plan, name, config.vocab, has_rows=config.token_rows is not None)
        simplify(model)
        _place_weights(model, net, computed, layout, folder, weights)
        ir.save(model, folder / f"{name}.onnx")
        make_exact(model)
        ir.save(model, folder / f"{name}{EXACT}.onnx")
        programs[name] = Program(
            file=f"{folder.name}/{name}.onnx",
            inputs=[_describe(v) for v in model.graph.inputs],
            outputs=[_describe(v) for v in model.graph.outputs],
        )
    return programs


def _trace_program(module: nn.Module, plan: Plan, rows: TokenRows | None, name: str) -> ir.Model:
    decode, axis = name == "decode", tokens_axis(name, plan)
    most = {"chunk": plan.chunk, "tokens": plan.drafts + 1}
    tokens = min(3, most[axis]) if axis else 1  # any example length: the axis is open
    grows = {0: axis} if axis else None
    with torch.device("meta"):
        args: list[Tensor | None] = [
            torch.empty(tokens, dtype=torch.int64), torch.empty(1, dtype=torch.int64), None
        ]  # fmt: skip
        if rows:
            args[2] = torch.empty(tokens, rows.layers if decode else rows.prefill, rows.dim)
        axes = []
        for t in plan.tables:
            axis = live_axis(t)
            slots = min(LIVE_STEP, t.slots) if axis else t.slots
            args.append(torch.empty(slots, *t.row, dtype=TORCH_DTYPES[t.dtype]))
            axes.append({0: axis} if axis else None)
            if axis:
                most[axis] = t.slots
    shapes = (grows, None, grows if rows else None, tuple(axes))
    model = to_onnx(module, tuple(args), shapes, most)
    attach_functions(model, lambda m, a, s: to_onnx(m, a, s, {}))
    return model


def to_onnx(
    module: nn.Module, args: tuple[Any, ...], axes: tuple[Any, ...], most: dict[str, int]
) -> ir.Model:
    """`module` as an ONNX graph; `axes` name the open axes of `args`, `most` bounds them."""
    dims: dict[str, Any] = {}

    def named(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(named(p) for p in part)
        for name in (part or {}).values():
            dims.setdefault(name, torch.export.Dim(name, min=1, max=most.get(name)))
        return part and {axis: dims[name] for axis, name in part.items()}

    with torch.device("meta"), torch.no_grad(), quiet_trace():
        exported = torch.export.export(module, args, dynamic_shapes=named(axes))
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _name_io(model: ir.Model, plan: Plan, name: str, vocab: int, *, has_rows: bool) -> None:
    tables = [t.name for t in plan.tables]
    inputs = ["ids", "pos", *(["ple"] if has_rows else []), *tables]
    outputs = [*(["logits"] if name == "decode" else []), *(f"{t}.out" for t in tables)]
    shapes: dict[str, tuple[int | str, ...]] = {}
    for t in plan.tables:
        shapes[t.name] = shapes[f"{t.name}.out"] = table_shape(t)
    shapes["ids"] = (tokens_axis(name, plan) or 1,)
    if name == "decode":
        shapes["logits"] = logits_shape(plan, vocab)
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if len(values) != len(names):
            raise ExportError(f"The {name} graph has {len(values)} values, {len(names)} expected.")
        for value, new in zip(values, names, strict=True):
            value.name = new
            if new == "ple":
                assert value.shape is not None
                value.shape = ir.Shape((*shapes["ids"], *list(value.shape)[1:]))
            elif new in shapes:
                value.shape = ir.Shape(shapes[new])


def _place_weights(
    model: ir.Model, net: nn.Module, computed: dict[str, Tensor], layout: WeightLayout,
    folder: Path, weights: str,
) -> None:  # fmt: skip
    """Point every initializer at its rows in the weight file; small ones become constants."""
    rows = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for name, held in getattr(module, "held", {}).items():
            rows[f"net.{path}.{name}"] = held
    for name, value in list(model.graph.initializers.items()):
        if name not in rows:
            value.const_value = ir.tensor(computed[name.removeprefix("net.")].numpy())
            continue
        place(value, layout.regions[rows[name].name], rows[name].start, folder, weights)


def _describe(value: ir.Value) -> TensorIO:
    assert value.name and value.shape is not None and value.dtype is not None
    shape = [d if isinstance(d, int) else str(d) for d in value.shape]
    return TensorIO(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
