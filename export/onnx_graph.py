"""What every ONNX program goes through after its trace: tidied, weights placed, a float variant."""

from __future__ import annotations

from itertools import chain
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_kv.export.weight_file import Region

IR_VERSION = 11
EXACT = ".exact"  # suffix of the variant with float kernels, which only the parity gate runs
INLINE_BYTES = 1024  # constants below this live in the graph, where the optimiser can see them
IR_DTYPES = {"f32": ir.DataType.FLOAT, "u8": ir.DataType.UINT8, "i64": ir.DataType.INT64}


def simplify(model: ir.Model) -> None:
    """Remove what is there twice or unused, and what tracing left to read for people."""
    model.ir_version = IR_VERSION
    for run in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        run(model)
    model.opset_imports.setdefault("com.microsoft", 1)


def fold_views(model: ir.Model) -> None:
    """Give an initializer the shape in which a graph reshapes it, if it uses it in no other.

    Left to onnxruntime, every program would hold a reshaped copy of its own on the heap.
    """
    for value in model.graph.initializers.values():
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx != 0:
            continue
        view = uses[0].node.outputs[0]
        if view.shape is None or not view.shape.is_static() or view.is_graph_output():
            continue
        value.shape = view.shape
        view.replace_all_uses_with(value)
    passes.RemoveUnusedNodesPass()(model)


def place(value: ir.Value, region: Region, start: int, folder: Path, weights: str) -> None:
    """Point an initializer at its rows of `region` in the file `weights` beside `folder`'s program.

    A small one becomes a constant of the graph.
    """
    assert value.name and value.shape is not None
    shape, dtype = value.shape.numpy(), IR_DTYPES[region.dtype]
    external = ir.ExternalTensor(
        location=weights,
        offset=region.offset + start * region.row_bytes,
        length=prod(shape) * dtype.bitwidth // 8,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=value.name,
        base_dir=str(folder),
    )
    value.const_value = external
    if external.nbytes <= INLINE_BYTES:
        value.const_value = ir.tensor(external.numpy().copy(), name=value.name)


def make_exact(model: ir.Model) -> None:
    """Let quantised matrices multiply in float: what is left against PyTorch is the lowering."""
    graphs = [model.graph, *(f.graph for f in model.functions.values())]
    for node in chain.from_iterable(graphs):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
