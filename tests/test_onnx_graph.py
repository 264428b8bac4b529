"""The shape of the ONNX programs: their contract, and work that ignores ctx."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edge_kv import models, runtime
from edge_kv.artifact import read_artifact
from edge_kv.export import export_model
from edge_kv.export.onnx_graph import fold_views
from edge_kv.manifest import table_shape
from edge_kv.runtime.onnx_session import OnnxSession, _Bound
from edge_kv.runtime.ort import onnxruntime as ort


@pytest.fixture(scope="module")
def artifacts(tiny_artifact, tmp_path_factory):
    """The same model at two context lengths: {ctx: directory}."""
    long = tmp_path_factory.mktemp("ctx") / "long"
    export_model(
        model="tiny", ctx=32_768, chunk=32, calibration="none", out=long, open_session=runtime.load
    )
    return {512: tiny_artifact, 32_768: long}


def profile(root: Path, pos: int, folder: Path) -> list[dict]:
    """Kernel events of one decoded token at `pos`, bound as the runtime binds it."""
    artifact = read_artifact(root)
    program = artifact.backend("onnx").programs["decode"]
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    engine = ort.InferenceSession(
        str(artifact.path(program.file)), options, providers=["CPUExecutionProvider"]
    )
    with OnnxSession(artifact) as session:
        session.prefill(np.full(pos, 5))
        rows = session._ple.rows(np.array([5]), artifact.layers)
        _Bound(session, "decode", program, engine).run(np.array([5]), pos, rows)
    events = json.loads(Path(engine.end_profiling()).read_text())
    return [e for e in events if e.get("name", "").endswith("_kernel_time")]


def test_work_per_token_does_not_grow_with_ctx(artifacts, tmp_path):
    """Every kernel reads and writes as many bytes at ctx 32768 as at ctx 512."""

    def work(root):
        sizes = ("activation_size", "output_size", "parameter_size")
        return [
            (e["args"]["op_name"], *(int(e["args"][s]) for s in sizes))
            for e in profile(root, 100, tmp_path)
        ]

    small, large = work(artifacts[512]), work(artifacts[32_768])
    assert len(small) > 100
    assert small == large


def test_graph_manifest_and_plan_agree(artifacts):
    artifact = read_artifact(artifacts[512])
    tables = artifact.plan.tables
    for name, program in artifact.backend("onnx").programs.items():
        model = onnx.load(artifact.path(program.file), load_external_data=False)
        for ours, theirs in (
            (program.inputs, model.graph.input),
            (program.outputs, model.graph.output),
        ):
            assert [i.name for i in ours] == [v.name for v in theirs]
            shapes = [
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in theirs
            ]
            assert [list(i.shape) for i in ours] == shapes
        state = [i for i in program.inputs if i.name not in ("ids", "pos", "ple")]
        assert [i.name for i in state] == [t.name for t in tables]
        assert [tuple(i.shape) for i in state] == [table_shape(t) for t in tables]
        assert [o.name for o in program.outputs if o.name != "logits"] == [
            f"{t.name}.out" for t in tables
        ]
        assert ("logits" in [o.name for o in program.outputs]) == (name == "decode")


def test_prefill_leaves_the_sharing_layers_and_the_head_out(artifacts):
    artifact = read_artifact(artifacts[512])
    names = {}
    for name, program in artifact.backend("onnx").programs.items():
        model = onnx.load(artifact.path(program.file), load_external_data=False)
        names[name] = {i.name for i in model.graph.initializer}
    own = models.get_row("tiny").config.owners
    for i in range(artifact.layers):
        held = any(f"layers.{i}." in n for n in names["prefill"])
        assert held == (i < own), i
        assert any(f"layers.{i}." in n for n in names["decode"])
    # the last owner only writes its rows: its MLP and output projection are dead code here
    assert not any(f"layers.{own - 1}.mlp" in n for n in names["prefill"])
    assert not any(f"layers.{own - 1}.attn.out." in n for n in names["prefill"])
    assert not any("head." in n for n in names["prefill"])


def test_no_graph_value_is_as_large_as_ctx_squared_or_a_rope_table(artifacts):
    """All constants in the graph are small: masks and angles are computed from pos."""
    artifact = read_artifact(artifacts[32_768])
    for program in artifact.backend("onnx").programs.values():
        path = artifact.path(program.file)
        assert path.stat().st_size < 2 << 20
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            assert 32_768 not in tensor.dims


def test_an_initializer_that_is_only_reshaped_takes_that_shape():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 2] y, float[4, 2] z)
        <float[2, 2, 2] once = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] twice = {1, 2, 3, 4, 5, 6, 7, 8},
         int64[2] shape = {4, 2}, float[4, 2] a, float[4, 2] b, float[8] c> {
            a = Reshape(once, shape)
            b = Reshape(twice, shape)
            c = Add(twice, twice)
            y = MatMul(x, a)
            z = Reshape(c, shape)
        }"""
    )
    fold_views(model)
    kept = model.graph.initializers
    assert kept["once"].shape == (4, 2)
    assert kept["twice"].shape == (8,)
    assert [node.op_type for node in model.graph] == ["Add", "MatMul", "Reshape"]
