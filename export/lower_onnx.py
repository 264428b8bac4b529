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

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _core as exporter
from torch.onnx._internal.exporter._registration import ONNXRegistry

from edge_kv import models
from edge_kv.errors import ExportError
from edge_kv.export.onnx_functions import OPSET, attach_functions, translation_table
from edge_kv.export.onnx_graph import EXACT, fold_views, make_exact, place, simplify
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.quiet import quiet_trace
from edge_kv.export.weight_file import WeightLayout
from edge_kv.manifest import (
    DRAFT,
    HIDDEN,
    Program,
    TensorIO,
    draft_outputs,
    live_axis,
    logits_shape,
    table_shape,
    tokens_axis,
)
from edge_kv.models.model import Model
from edge_kv.nets import make_net, ops
from edge_kv.nets.state import TORCH_DTYPES, Read
from edge_kv.nets.weights import Decoder, Drafter, Rows
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
    """ids [n], pos [1], rows, tables -> logits [n, vocab] ([vocab] without drafts), tables.

    With a drafter, the hidden states [n, width] that it takes up stand behind the logits.
    """

    def __init__(self, net: Any, plan: Plan, drafted: bool):
        super().__init__()
        self.net, self.plan, self.drafted = net, plan, drafted

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor | None, *tables: Tensor) -> Any:
        state = TableState(self.plan, tables)
        x = self.net(ids, pos, state, rows)
        logits = self.net.logits(x)
        hidden = [self.net.hidden(x)] if self.drafted else []
        return logits if self.plan.drafts else logits[0], *hidden, *state.values.values()


class _PrefillProgram(nn.Module):
    """ids [chunk], pos [1], rows, tables -> tables."""

    def __init__(self, net: Decoder, plan: Plan, drafted: bool):
        super().__init__()
        self.net, self.plan, self.drafted = net, plan, False

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor | None, *tables: Tensor) -> Any:
        state = TableState(self.plan, tables)
        self.net.prefill(ids, pos, state, rows)
        return tuple(state.values.values())


class _DraftProgram(nn.Module):
    """ids [1], pos [1], hidden [1, width], tables -> logits [n], hidden [1, width], tokens [n].

    Without the tokens where the logits are those of the whole vocabulary.
    """

    def __init__(self, net: Drafter, plan: Plan, scored: int):
        super().__init__()
        self.net, self.plan, self.scored = net, plan, scored

    def forward(self, ids: Tensor, pos: Tensor, hidden: Tensor, *tables: Tensor) -> Any:
        y = self.net(ids, hidden, pos, TableState(self.plan, tables))
        logits, tokens = self.net.logits(y)
        return logits, self.net.carry(y), *([] if tokens is None else [tokens])


PROGRAMS: dict[str, Any] = {"prefill": _PrefillProgram, "decode": _DecodeProgram}
Shape = tuple[int | str, ...]


class _OnMeta:
    """A net without memory for its weights, and what it computes of none: frequencies of ropes."""

    def __init__(self, config: Model, weights: PackedWeights):
        with torch.device("meta"):
            net: Any = make_net(config, weights)
        self.net: Any = net
        named = net.named_buffers(remove_duplicate=False)
        self.computed: dict[str, Tensor] = {n: b for n, b in named if not b.is_meta}
        net.to("meta")


def lower_onnx(
    config: Model, plan: Plan, layout: WeightLayout, folder: Path, weights: str,
    drafter: Model | None = None,
) -> dict[str, Program]:  # fmt: skip
    """Write `prefill.onnx`, `decode.onnx` and, of a drafter, `draft.onnx` into `folder`.

    They read the file `weights` beside them.

    Raises:
        ExportError: torch could not trace or translate the net.
    """
    stored = PackedWeights(models.weights(config, drafter), layout, fused=True)
    net, drafts = _OnMeta(config, stored), _OnMeta(drafter, stored) if drafter else None
    traced: dict[str, tuple[_OnMeta, Callable[[], ir.Model]]] = {
        name: (net, partial(_trace_program, build(net.net, plan, drafts is not None), config, name))
        for name, build in PROGRAMS.items()
    }
    if drafter and drafts:
        module = _DraftProgram(drafts.net, models.drafter_plan(drafter, plan), drafter.scored)
        traced[DRAFT] = drafts, partial(_trace_draft, module, config)
    programs = {}
    for name, (own, trace) in traced.items():
        try:
            model = trace()
        except Exception as e:
            raise ExportError(f"Lowering {name} to ONNX failed: {e}") from e
        _place_weights(model, own.net, own.computed, layout, folder, weights)
        ir.save(model, folder / f"{name}.onnx")
        make_exact(model)
        ir.save(model, folder / f"{name}{EXACT}.onnx")
        programs[name] = Program(
            file=f"{folder.name}/{name}.onnx",
            inputs=[_describe(v) for v in model.graph.inputs],
            outputs=[_describe(v) for v in model.graph.outputs],
        )
    return programs


def _example_tables(
    plan: Plan,
) -> tuple[list[Tensor], tuple[dict[int, str] | None, ...], dict[str, int]]:
    """Tables to trace with, their open axes, and the most that these grow to."""
    tables, axes, most = [], [], {}
    for t in plan.tables:
        axis = live_axis(t)
        slots = min(LIVE_STEP, t.slots) if axis else t.slots
        tables.append(torch.empty(slots, *t.row, dtype=TORCH_DTYPES[t.dtype], device="meta"))
        axes.append({0: axis} if axis else None)
        if axis:
            most[axis] = t.slots
    return tables, tuple(axes), most


def _trace_draft(module: _DraftProgram, config: Model) -> ir.Model:
    tables, axes, most = _example_tables(module.plan)
    with torch.device("meta"):
        args = (
            torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64),
            torch.empty(1, config.hidden),
        )  # fmt: skip
    inputs: dict[str, Shape] = {"ids": (1,), "pos": (1,), HIDDEN: (1, config.hidden)}
    inputs |= {t.name: table_shape(t) for t in module.plan.tables}
    made = draft_outputs(config.vocab, config.hidden, module.scored)
    outputs: dict[str, Shape] = {t.name: tuple(t.shape) for t in made}
    return _trace(module, (*args, *tables), (None, None, None, axes), most, inputs, outputs)


def _trace_program(module: _PrefillProgram | _DecodeProgram, config: Model, name: str) -> ir.Model:
    plan, rows, decode = module.plan, config.token_rows, name == "decode"
    axis = tokens_axis(name, plan)
    tables, axes, most = _example_tables(plan)
    most |= {"chunk": plan.chunk, "tokens": plan.drafts + 1}
    tokens = min(3, most[axis]) if axis else 1  # any example length: the axis is open
    grows = {0: axis} if axis else None
    with torch.device("meta"):
        args: list[Tensor | None] = [
            torch.empty(tokens, dtype=torch.int64), torch.empty(1, dtype=torch.int64), None
        ]  # fmt: skip
        layers = (rows.layers if decode else rows.prefill) if rows else 0
        if rows:
            args[2] = torch.empty(tokens, layers, rows.dim)
    shapes = (grows, None, grows if rows else None, axes)
    width = axis or 1
    inputs: dict[str, Shape] = {"ids": (width,), "pos": (1,)}
    if rows:
        inputs["ple"] = (width, layers, rows.dim)
    outputs: dict[str, Shape] = {"logits": logits_shape(plan, config.vocab)} if decode else {}
    if module.drafted:
        outputs[HIDDEN] = (width, config.hidden)
    inputs |= {t.name: table_shape(t) for t in plan.tables}
    outputs |= {f"{t.name}.out": table_shape(t) for t in plan.tables}
    return _trace(module, (*args, *tables), shapes, most, inputs, outputs)


def _trace(
    module: nn.Module, args: tuple[Any, ...], axes: tuple[Any, ...], most: dict[str, int],
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape],
) -> ir.Model:  # fmt: skip
    """`module` as an ONNX graph with its functions, tidied, with named inputs and outputs."""
    model = to_onnx(module, args, axes, most)
    attach_functions(model, lambda m, a, s: to_onnx(m, a, s, {}))
    simplify(model)
    fold_views(model)
    _name_values(model.graph.inputs, inputs)
    _name_values(model.graph.outputs, outputs)
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
        program = exporter.export(
            exported, registry=_registry(), opset_version=OPSET, optimize=False, verbose=False
        )
    return program.model


@cache
def _registry() -> ONNXRegistry:
    """How torch's operators and ours become nodes.

    `torch.onnx.export` makes one anew for each graph, by reading the source of 500 functions: a
    third of the time an export took, which traces up to twenty graphs.
    """
    made = ONNXRegistry.from_torchlib(opset_version=OPSET)
    for overload, translation in translation_table().items():
        made.register_op(overload, translation)
    return made


def _name_values(values: Sequence[ir.Value], named: Mapping[str, Shape]) -> None:
    """Give the inputs or outputs of a graph their names and shapes."""
    if len(values) != len(named):
        raise ExportError(f"The graph has {len(values)} values, {len(named)} are expected.")
    for value, (name, shape) in zip(values, named.items(), strict=True):
        value.name, value.shape = name, ir.Shape(shape)


def _place_weights(
    model: ir.Model, net: nn.Module, computed: dict[str, Tensor], layout: WeightLayout,
    folder: Path, weights: str,
) -> None:  # fmt: skip
    """Point every initializer at its rows in the weight file; small ones become constants.

    Two of the same rows become one: a runtime maps each by itself.
    """
    rows = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for name, held in getattr(module, "held", {}).items():
            rows[f"net.{path}.{name}"] = held
    placed: dict[tuple[Rows, tuple[int, ...]], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if name not in rows:
            value.const_value = ir.tensor(computed[name.removeprefix("net.")].numpy())
            continue
        assert value.shape is not None
        first = placed.setdefault((rows[name], value.shape.numpy()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]
            continue
        place(value, layout.regions[rows[name].name], rows[name].start, folder, weights)


def _describe(value: ir.Value) -> TensorIO:
    assert value.name and value.shape is not None and value.dtype is not None
    shape = [d if isinstance(d, int) else str(d) for d in value.shape]
    return TensorIO(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
