"""Lowers any net to ExecuTorch: one `.pte` with the methods `prefill` and `decode`.

Both methods mutate one set of tables, which memory planning puts into an arena of its own, of just
the bytes that the plan counts. A native program is of operators of ours over weights that stay in
the weight file. A portable one holds its weights: linears and elementwise chains become XNNPACK
delegates, what lies between two of them (attention, token look-up, rotary angles) stays in the
graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn

from edge_kv import models
from edge_kv.errors import ExportError
from edge_kv.export.executorch_fuse import fuse
from edge_kv.export.executorch_lean import lean
from edge_kv.export.executorch_native import fakes, weight_keys, weights_outside
from edge_kv.export.executorch_portable import TRACED, PortableState, replace_embeddings
from edge_kv.export.executorch_tables import NativeState, PassedTables, Tables, attribute
from edge_kv.export.executorch_xnnpack import for_xnnpack, sigmoids
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.quiet import quiet_trace
from edge_kv.export.weight_file import StoredWeights
from edge_kv.manifest import (
    DRAFT,
    HIDDEN,
    Program,
    TensorIO,
    draft_outputs,
    logits_shape,
    tokens_axis,
)
from edge_kv.models.model import Model
from edge_kv.nets import make_net
from edge_kv.nets.state import TORCH_DTYPES, State
from edge_kv.nets.weights import Decoder, Drafter, Rows, holders, load, replace
from edge_kv.plan import Plan

INPLACE_WRITE = "aten.index_put_.default"
_TYPES = {"f32": "float", "f16": "float16", "int8": "int8"}  # as manifests name them
STATE_ALIGNMENT = 16  # ExecuTorch aligns every planned tensor to this many bytes


@dataclass(frozen=True)
class Attention:
    """How programs attend: their state over (tables, most tokens of a step), and whether their
    weights stay outside."""

    state: Callable[[Tables, int], State]
    outside: bool


ATTENTIONS = {
    "native": Attention(lambda tables, tokens: NativeState(tables), outside=True),
    "portable": Attention(PortableState, outside=False),
}


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """XNNPACK for all it takes but what a state does, which would be a dozen pieces a layer."""

    def get_matched_nodes_from_configs(self, program: Any) -> Any:
        found = super().get_matched_nodes_from_configs(program)
        return [nodes for nodes in found if not any(map(_of_state, nodes))]


def _of_state(node: Any) -> bool:
    """Whether a node was traced in an attention, which every net calls so, but in no part of it."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    return bool(modules) and str(modules[-1][1]).endswith(".Attention")


class StatePlanning(MemoryPlanningPass):  # type: ignore[misc]
    """Plans the state once: the result of an in-place write is the buffer it wrote to."""

    def run(self, graph_module: Any, graph_signature: Any = None) -> Any:
        written = {}
        for node in graph_module.graph.nodes:
            if getattr(node.target, "__name__", "") == INPLACE_WRITE:
                written[id(node.meta["spec"])] = node.args[0].meta["spec"]
                node.meta["spec"] = node.args[0].meta["spec"]
            elif node.op == "output":
                specs = node.meta["spec"]
                node.meta["spec"] = type(specs)(written.get(id(s), s) for s in specs)
        return super().run(graph_module, graph_signature)


class _Decode(nn.Module):
    """ids [n], pos [1], ple [n, layers, dim] -> logits [n, vocab] ([vocab] without drafts).

    With a drafter, the hidden states [n, width] that it takes up stand behind the logits.
    """

    def __init__(self, net: Any, tables: Tables, attention: Attention, drafted: bool):
        super().__init__()
        self.net, self.state, self.attention = net, tables, attention
        self.drafted = drafted

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Any:
        drafts = self.state.plan.drafts
        state = self.attention.state(self.state, drafts + 1)
        x = self.net(ids, pos, state, ple)
        logits = self.net.logits(x)
        logits = logits if drafts else logits[0]
        return (logits, self.net.hidden(x)) if self.drafted else logits


class _Prefill(nn.Module):
    """ids [chunk], pos [1], ple [chunk, layers, dim] -> the position after them, [1]."""

    def __init__(self, net: Decoder, tables: Tables, attention: Attention, drafted: bool):
        super().__init__()
        self.net, self.state, self.attention = net, tables, attention

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        state = self.attention.state(self.state, self.state.plan.chunk)
        self.net.prefill(ids, pos, state, ple)
        return pos + ids.shape[0]


class _Draft(nn.Module):
    """ids [1], pos [1], hidden [1, width], tables -> logits [n], hidden [1, width], tokens [n].

    The tables are the state that the other methods own, handed in: a method that writes none of
    its buffers would hold constants in their place.
    """

    def __init__(self, net: Drafter, plan: Plan):
        super().__init__()
        self.drafter, self.plan = net, plan

    def forward(self, ids: Tensor, pos: Tensor, hidden: Tensor, *tables: Tensor) -> Any:
        state = NativeState(PassedTables(self.plan, tables))
        y = self.drafter(ids, hidden, pos, state)
        logits, tokens = self.drafter.logits(y)
        return logits, self.drafter.carry(y), *([] if tokens is None else [tokens])


METHODS: dict[str, Any] = {"prefill": _Prefill, "decode": _Decode}


def lower_executorch(
    config: Model, plan: Plan, weights: StoredWeights, path: Path, *, facts: dict[str, int],
    attention: str, delegate: bool, drafter: Model | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the `.pte` at `path`; returns the backend's manifest details.

    `attention` is a key of ATTENTIONS. With `delegate`, which is for portable programs, XNNPACK
    takes what it can; else their linears multiply float activations, and what is left against
    PyTorch is the lowering. A `drafter` becomes the method `draft` of a native program. `facts`
    are integers for a runner that reads no manifest.

    Raises:
        ExportError: ExecuTorch cannot lower this net, or it plans state that is not the plan's.
    """
    try:
        with quiet_trace(), lean():
            exported, keys = _export(
                config, plan, weights, ATTENTIONS[attention], delegate, drafter
            )
            # XNNPACK knows a linear as what it is; else it becomes a product by a transpose.
            kept = [torch.ops.aten.linear.default] if delegate else []
            edge = to_edge(
                exported,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, preserve_ops=kept),
                constant_methods=dict(facts),
            )
            if delegate:
                edge = edge.to_backend({name: Partitioner() for name in exported})
            delegates = {name: count_delegates(edge.exported_program(name)) for name in exported}
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
    return {"attention": attention, "delegates": delegates}


def programs(
    config: Model, plan: Plan, file: str, drafter: Model | None = None
) -> dict[str, Program]:
    """The manifest's description of all methods; state is inside, and only `draft` is handed it."""
    fed = config.token_rows

    def placed(tokens: int | str) -> list[TensorIO]:
        return [
            TensorIO(name="ids", dtype="int64", shape=[tokens]),
            TensorIO(name="pos", dtype="int64", shape=[1]),
        ]

    def inputs(tokens: int | str, layers: int) -> list[TensorIO]:
        if fed is None:
            return placed(tokens)
        ple = TensorIO(name="ple", dtype="float", shape=[tokens, layers, fed.dim])
        return [*placed(tokens), ple]

    width = tokens_axis("decode", plan) or 1
    logits = TensorIO(name="logits", dtype="float", shape=[*logits_shape(plan, config.vocab)])
    hidden = TensorIO(name=HIDDEN, dtype="float", shape=[width, config.hidden])
    made = {
        "prefill": Program(
            file=file,
            inputs=inputs(tokens_axis("prefill", plan) or 1, fed.prefill if fed else 0),
            outputs=[TensorIO(name="end", dtype="int64", shape=[1])],
        ),
        "decode": Program(
            file=file,
            inputs=inputs(width, fed.layers if fed else 0),
            outputs=[logits, hidden] if drafter else [logits],
        ),
    }
    if drafter:
        made[DRAFT] = Program(
            file=file,
            inputs=[
                *placed(1),
                TensorIO(name=HIDDEN, dtype="float", shape=[1, config.hidden]),
                *(
                    TensorIO(name=t.name, dtype=_TYPES[t.dtype], shape=[*t.shape])
                    for t in models.drafter_plan(drafter, plan).tables
                ),
            ],
            outputs=draft_outputs(config.vocab, config.hidden, drafter.scored),
        )
    return made


def _export(
    config: Model, plan: Plan, weights: StoredWeights, attention: Attention, delegate: bool,
    drafter: Model | None,
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """All methods traced, and the keys of weights that stay outside."""
    rows = models.weights(config, drafter)
    with torch.device("meta"):
        packed = PackedWeights(rows, weights.layout, fused=attention.outside)
        net: Any = make_net(config, packed)
        drafts: Any = make_net(drafter, packed) if drafter else None
    held: dict[str, Rows] = {
        f"{above}.{name}.{leaf}": rows
        for above, of in (("net", net), ("drafter", drafts))
        if of is not None
        for name, module in of.named_modules()
        for leaf, rows in getattr(module, "held", {}).items()
    }
    if not attention.outside:
        load(net, weights.read)
        replace_embeddings(net)
        if delegate:
            for_xnnpack(net)
        return _trace(config, plan, net, attention, drafted=False), {}
    with fakes():
        for holder in (*holders(net), *(holders(drafts) if drafts is not None else ())):
            for leaf in holder.held:
                old: Tensor = getattr(holder, leaf)
                replace(holder, leaf, torch.empty(old.shape, dtype=old.dtype))
        exported = _trace(config, plan, net, attention, drafted=drafter is not None)
        if drafter:
            exported[DRAFT] = _trace_draft(config, models.drafter_plan(drafter, plan), drafts)
        return exported, weight_keys(exported, held.get, weights.layout)


def _trace_draft(config: Model, plan: Plan, net: Drafter) -> Any:
    tables = [torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in plan.tables]
    ids, pos = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    args = (ids, pos, torch.zeros(1, config.hidden), *tables)
    with torch.no_grad():
        program = torch.export.export(_Draft(net, plan).eval(), args, strict=False)
    fuse(program)
    return program


def _trace(
    config: Model, plan: Plan, net: Decoder, attention: Attention, *, drafted: bool
) -> dict[str, Any]:
    tables, fed = Tables(plan), config.token_rows
    most = {"prefill": plan.chunk, "decode": plan.drafts + 1}
    exported = {}
    for name, method in METHODS.items():
        tokens, axis = min(3, most[name]), tokens_axis(name, plan)
        grows = {0: torch.export.Dim(axis, min=1, max=most[name])} if axis else None
        args = [torch.zeros(tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
        shapes: dict[str, Any] = {"ids": grows, "pos": None}
        if fed is not None:
            layers = fed.layers if name == "decode" else fed.prefill
            args.append(torch.zeros(tokens, layers, fed.dim))
            shapes["ple"] = grows
        with torch.no_grad():
            program = torch.export.export(
                method(net, tables, attention, drafted).eval(), tuple(args), dynamic_shapes=shapes,
                strict=False,
            )  # fmt: skip
        if attention.outside:
            fuse(program)
        else:
            sigmoids(program)
            program = program.run_decompositions(TRACED)
        exported[name] = program
    return exported


def count_delegates(program: Any) -> int:
    """Delegate calls of a method: export time and scheduling overhead grow with them."""
    return sum(
        n.op == "call_function" and getattr(n.target, "__name__", "") == "executorch_call_delegate"
        for n in program.graph.nodes
    )


def check_state(planned: dict[str, int], planning: Any) -> None:
    """Refuse any byte of state that is not the plan's: bytes by table.

    Raises:
        ExportError: ExecuTorch planned another size, or a table that the plan lacks.
    """
    specs = {name: next(iter(found)) for name, found in planning.state.mutable_buffers.items()}
    for name, size in planned.items():
        spec = specs.pop(f"state.{attribute(name)}", None)
        if spec is None or spec.allocated_memory != -(-size // STATE_ALIGNMENT) * STATE_ALIGNMENT:
            raise ExportError(
                f"ExecuTorch planned {0 if spec is None else spec.allocated_memory} bytes for "
                f"{name}, the plan has {size}; please report this config."
            )
    if specs:
        raise ExportError(f"ExecuTorch planned state that the plan lacks: {sorted(specs)[0]}.")


def write_program(program: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as f:
        program.write_to_file(f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)
