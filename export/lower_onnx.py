"""Lowers the decoder to ONNX: two programs, `prefill` and `decode`, over one external weight file.

What a program does with its state are calls of functions that come with it, made of standard
operators: onnxruntime inlines them, unless it was given native operators of the same names
(`runtime/native/onnx_operators.cpp`), which then run instead.

Graphs are traced on the meta device, so a full-size graph costs no weight memory; initializers
then become references into the weight file that `weight_file` streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edge_kv.artifact import Program, TensorIO
from edge_kv.config import ModelConfig
from edge_kv.errors import ExportError
from edge_kv.export.onnx_attention import K_ZERO, body, view_dtype
from edge_kv.export.onnx_graph import EXACT, make_exact, place, simplify
from edge_kv.export.onnx_ops import BODIES, DOMAIN, OPSET, TRANSLATIONS
from edge_kv.export.onnx_state import OnnxState
from edge_kv.export.quant_format import QuantFormat
from edge_kv.export.quiet import quiet_trace
from edge_kv.export.weight_file import WeightLayout
from edge_kv.kv_plan import APPEND, KVPlan, state_views
from edge_kv.model.binding import parameter_rows
from edge_kv.model.decoder import Decoder


class DecodeProgram(nn.Module):
    """ids [1], pos [1], ple [1, n_layers, dim], state views -> logits [vocab], state views."""

    def __init__(self, decoder: Decoder, plan: KVPlan):
        super().__init__()
        self.decoder, self.plan = decoder, plan

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None, *views: Tensor) -> Any:
        state = OnnxState(self.plan, list(views))
        return self.decoder.decode(ids, pos, ple, state), *state.outputs()


class PrefillProgram(nn.Module):
    """ids [chunk], pos [1], ple [chunk, n_own, dim], state views -> state views."""

    def __init__(self, decoder: Decoder, plan: KVPlan):
        super().__init__()
        self.decoder, self.plan = decoder, plan

    def forward(self, ids: Tensor, pos: Tensor, ple: Tensor | None, *views: Tensor) -> Any:
        state = OnnxState(self.plan, list(views))
        self.decoder.prefill(ids, pos, ple, state)
        return tuple(state.outputs())


PROGRAMS: dict[str, Callable[[Decoder, KVPlan], nn.Module]] = {
    "prefill": PrefillProgram,
    "decode": DecodeProgram,
}


def lower_onnx(
    config: ModelConfig, plan: KVPlan, layout: WeightLayout, folder: Path, weights: str
) -> dict[str, Program]:
    """Write `prefill.onnx` and `decode.onnx` into `folder`, over the file `weights` beside them.

    Raises:
        ExportError: torch could not trace or translate the decoder.
    """
    with torch.device("meta"):
        decoder = Decoder(config, plan, QuantFormat(layout)).eval()
    programs = {}
    for name, build in PROGRAMS.items():
        try:
            model = _trace(build(decoder, plan), plan, config, name)
        except Exception as e:
            raise ExportError(f"Lowering {name} to ONNX failed: {e}") from e
        _name_io(model, plan, name, has_ple=bool(config.ple_dim))
        simplify(model)
        _place_weights(model, decoder, config, layout, folder, weights)
        ir.save(model, folder / f"{name}.onnx")
        make_exact(model)
        ir.save(model, folder / f"{name}{EXACT}.onnx")
        programs[name] = Program(
            file=f"{folder.name}/{name}.onnx",
            inputs=[_describe(v) for v in model.graph.inputs],
            outputs=[_describe(v) for v in model.graph.outputs],
        )
    return programs


def _trace(module: nn.Module, plan: KVPlan, config: ModelConfig, name: str) -> ir.Model:
    decode = name == "decode"
    tokens = 1 if decode else 3  # any example length: the chunk is dynamic
    layers = config.n_layers if decode else config.n_own
    with torch.device("meta"):
        views = [
            torch.empty(
                [min(256, plan.ctx) if isinstance(d, str) else d for d in v.shape],
                dtype=view_dtype(v.buffer),
            )
            for v in state_views(plan)
        ]
        ple = torch.empty(tokens, layers, config.ple_dim) if config.ple_dim else None
        args = (
            torch.empty(tokens, dtype=torch.int64),
            torch.empty(1, dtype=torch.int64),
            ple,
            *views,
        )
    grows = None if decode or plan.chunk == 1 else {0: "chunk"}
    live = {1: "live"} if plan.ctx > 1 else None
    state = tuple(live if v.buffer.kind == APPEND else None for v in state_views(plan))
    shapes = (grows, None, grows if ple is not None else None, state)
    model = _to_onnx(module, args, shapes, plan)
    _attach_functions(model, config, plan, decode)
    return model


def _to_onnx(
    module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...], plan: KVPlan
) -> ir.Model:
    """`module` as an ONNX graph; `shapes` name the axes "chunk" and "live" of `args`."""
    dims = {
        "chunk": torch.export.Dim("chunk", min=1, max=plan.chunk),
        "live": torch.export.Dim("live", min=1, max=plan.ctx),
    }

    def named(axes: Any) -> Any:
        if isinstance(axes, tuple):
            return tuple(named(a) for a in axes)
        return axes and {axis: dims[name] for axis, name in axes.items()}

    with torch.device("meta"), torch.no_grad(), quiet_trace():
        exported = torch.export.export(module, args, dynamic_shapes=named(shapes))
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _attach_functions(model: ir.Model, config: ModelConfig, plan: KVPlan, decode: bool) -> None:
    """Give the model a body for every function of ours that it calls."""
    calls = {(n.op_type, n.overload): n for n in model.graph if n.domain == DOMAIN}
    for (name, overload), call in calls.items():
        if overload:
            given = BODIES[name, overload].clone()
            given.overload = overload
            model.functions[given.identifier()] = given
            continue
        with torch.device("meta"):
            module, args, shapes = body(name, config, plan, decode)
        made = _to_onnx(module, args, shapes, plan)
        _inline_constants(made.graph)
        attributes = [ir.Attr(a.name, a.type, None) for a in call.attributes.values()]
        function = ir.Function(DOMAIN, name, graph=made.graph, attributes=attributes)
        model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)


def _inline_constants(graph: ir.Graph) -> None:
    """Make every initializer a Constant node: a function has no initializers."""
    for value in list(graph.initializers.values()):
        assert value.const_value is not None
        constant = ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()


def _name_io(model: ir.Model, plan: KVPlan, name: str, *, has_ple: bool) -> None:
    views = state_views(plan)
    inputs = ["ids", "pos", *(["ple"] if has_ple else []), *(v.name for v in views)]
    outputs = [*(["logits"] if name == "decode" else []), *(f"{v.name}.out" for v in views)]
    shapes: dict[str, tuple[int | str, ...]] = {v.name: v.shape for v in views}
    shapes |= {f"{v.name}.out": v.shape for v in views}
    if name == "prefill":
        shapes["ids"] = ("chunk",)
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if len(values) != len(names):
            raise ExportError(f"The {name} graph has {len(values)} values, {len(names)} expected.")
        for value, new in zip(values, names, strict=True):
            value.name = new
            if new in shapes:
                value.shape = ir.Shape(shapes[new])
            elif new == "ple" and name == "prefill":
                assert value.shape is not None
                value.shape = ir.Shape(("chunk", *list(value.shape)[1:]))


def _place_weights(
    model: ir.Model, decoder: Decoder, config: ModelConfig, layout: WeightLayout, folder: Path,
    weights: str,
) -> None:  # fmt: skip
    """Point every initializer at its rows in the weight file; small ones become constants."""
    ropes = Decoder.rope_tables(config)
    for name, value in list(model.graph.initializers.items()):
        path = name.removeprefix("decoder.")
        if path.startswith("rope."):
            value.const_value = ir.tensor(ropes.get_buffer(path.removeprefix("rope.")).numpy())
            continue
        rows = parameter_rows(config, path)
        place(value, layout.regions[rows.region], rows.start, folder, weights)


def _describe(value: ir.Value) -> TensorIO:
    assert value.name and value.shape is not None and value.dtype is not None
    shape = [d if isinstance(d, int) else str(d) for d in value.shape]
    return TensorIO(name=value.name, dtype=value.dtype.name.lower(), shape=shape)


DETAILS = {"opset": OPSET, "k_zero_point": K_ZERO}
