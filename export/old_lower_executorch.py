"""Lowers the decoder to ExecuTorch: one `.pte` with the methods `prefill` and `decode`.

Both methods mutate one set of buffers, which memory planning puts into an arena of its own, of just
the bytes that the KV plan counts. A native program is of operators of ours over weights that stay
in the weight file. A portable one holds its weights: linears and elementwise chains become XNNPACK
delegates, what lies between two of them (attention, token look-up, rotary angles) stays in the
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn

from edge_kv.artifact import Program, TensorIO
from edge_kv.config import ModelConfig
from edge_kv.errors import ExportError
from edge_kv.export.executorch_lean import lean
from edge_kv.export.executorch_native import (
    decoder_place,
    fakes,
    for_engine,
    weight_keys,
    weights_outside,
)
from edge_kv.export.lower_executorch import (
    StatePlanning,
    check_state,
    count_delegates,
    write_program,
)
from edge_kv.export.old_executorch_portable import PortableState, for_any_runtime
from edge_kv.export.old_executorch_state import (
    NativeState,
    PrefillState,
    StateBuffers,
    StoringState,
)
from edge_kv.export.old_executorch_weights import for_xnnpack
from edge_kv.export.quant_format import QuantFormat
from edge_kv.export.quiet import quiet
from edge_kv.export.weight_file import StoredWeights
from edge_kv.kv_plan import KVPlan
from edge_kv.model.binding import load_parameters
from edge_kv.model.decoder import Attention, Decoder

ATTENTION = f"{Attention.__module__}.{Attention.__qualname__}"


@dataclass(frozen=True)
class AttentionLowering:
    """A lowering of attention: its state over (buffers, most tokens of a step), what else it
    replaces in a decoder, and whether the weights stay outside of the program."""

    state: Callable[[StateBuffers, int], StoringState]
    replace: Callable[[nn.Module], None]
    outside: bool


ATTENTIONS = {
    "native": AttentionLowering(lambda buffers, tokens: NativeState(buffers), for_engine, True),
    "portable": AttentionLowering(PortableState, for_any_runtime, False),
}


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """XNNPACK for all it takes but what a state does, which would be a dozen pieces a layer."""

    def get_matched_nodes_from_configs(self, program: Any) -> Any:
        found = super().get_matched_nodes_from_configs(program)
        return [nodes for nodes in found if not any(map(_of_state, nodes))]


def _of_state(node: Any) -> bool:
    """Whether a node was traced in an attention but in none of its projections."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    return bool(modules) and modules[-1][1] == ATTENTION


class DecodeMethod(nn.Module):
    """ids [1], pos [1], ple [1, n_layers, dim] -> logits [vocab]."""

    def __init__(self, decoder: Decoder, state: StateBuffers, attention: AttentionLowering):
        super().__init__()
        self.decoder, self.state, self.attention = decoder, state, attention

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        return self.decoder.decode(ids, pos, ple, self.attention.state(self.state, 1))


class PrefillMethod(nn.Module):
    """ids [chunk], pos [1], ple [chunk, n_own, dim] -> the position after them, [1]."""

    def __init__(self, decoder: Decoder, state: StateBuffers, attention: AttentionLowering):
        super().__init__()
        self.decoder, self.state, self.attention = decoder, state, attention

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None = None) -> Tensor:
        inner = self.attention.state(self.state, self.state.chunk)
        state = PrefillState(inner, self.decoder.config.n_own - 1)
        self.decoder.prefill(ids, pos, ple, state)
        assert state.end is not None
        return state.end


def lower_executorch(
    config: ModelConfig, plan: KVPlan, weights: StoredWeights, path: Path, *, facts: dict[str, int],
    attention: str, delegate: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write the `.pte` at `path`; returns the backend's manifest details.

    `attention` is a key of ATTENTIONS. With `delegate`, which is for portable programs, XNNPACK
    takes what it can; else their linears multiply float activations, and what is left against
    PyTorch is the lowering. `facts` are integers for a runner that reads no model.

    Raises:
        ExportError: ExecuTorch cannot lower this model, or it plans state that is not the plan's.
    """
    lowering = ATTENTIONS[attention]
    try:
        with quiet(), lean():
            exported = _export(config, plan, weights, lowering, delegate=delegate)
            keys = {}
            if lowering.outside:
                keys = weight_keys(exported, decoder_place(config), weights.layout)
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
    check_state({b.name: b.bytes for b in plan.buffers}, planning)
    return {"attention": attention, "delegates": delegates}


def _export(
    config: ModelConfig, plan: KVPlan, weights: StoredWeights, lowering: AttentionLowering,
    *, delegate: bool,
) -> dict[str, Any]:  # fmt: skip
    """Both methods over a decoder of stored weights, or of fakes where they stay outside."""
    ropes = Decoder.rope_tables(config)
    with fakes() if lowering.outside else nullcontext():
        with nullcontext() if lowering.outside else torch.device("meta"):
            decoder = Decoder(config, plan, QuantFormat(weights.layout)).eval()
        decoder.rope = ropes
        if not lowering.outside:
            load_parameters(decoder, config, weights.read)
        if delegate:
            for_xnnpack(decoder)
        lowering.replace(decoder)
        return _trace(decoder, plan, config, lowering)


def programs(config: ModelConfig, plan: KVPlan, file: str) -> dict[str, Program]:
    """The manifest's description of both methods; state is inside and has no inputs."""

    def inputs(tokens: int | str, layers: int) -> list[TensorIO]:
        listed = [
            TensorIO(name="ids", dtype="int64", shape=[tokens]),
            TensorIO(name="pos", dtype="int64", shape=[1]),
        ]
        if config.ple_dim:
            shape = [tokens, layers, config.ple_dim]
            listed.append(TensorIO(name="ple", dtype="float", shape=shape))
        return listed

    return {
        "prefill": Program(
            file=file,
            inputs=inputs("chunk" if plan.chunk > 1 else 1, config.n_own),
            outputs=[TensorIO(name="end", dtype="int64", shape=[1])],
        ),
        "decode": Program(
            file=file,
            inputs=inputs(1, config.n_layers),
            outputs=[TensorIO(name="logits", dtype="float", shape=[config.vocab_size])],
        ),
    }


def _trace(
    decoder: Decoder, plan: KVPlan, config: ModelConfig, attention: AttentionLowering
) -> dict[str, Any]:
    state = StateBuffers(plan)
    chunk = torch.export.Dim("chunk", min=1, max=plan.chunk)
    exported = {}
    for name, method, tokens, layers in (
        ("prefill", PrefillMethod, min(3, plan.chunk), config.n_own),
        ("decode", DecodeMethod, 1, config.n_layers),
    ):
        args = [torch.zeros(tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
        grows = {0: chunk} if tokens > 1 else None
        shapes: dict[str, Any] = {"ids": grows, "pos": None}
        if config.ple_dim:
            args.append(torch.zeros(tokens, layers, config.ple_dim))
            shapes["ple"] = grows
        with torch.no_grad():
            exported[name] = torch.export.export(
                method(decoder, state, attention).eval(), tuple(args), dynamic_shapes=shapes,
                strict=False,
            )  # fmt: skip
    return exported
