"""The shape of the ONNX programs: their contract, state in place, and work that ignores ctx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_kv import runtime
from edge_kv.artifact import read_artifact
from edge_kv.export import export_model
from edge_kv.kv_plan import state_views
from edge_kv.runtime.onnx_session import WARNING, OnnxSession, _Bound
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
        rows = session._ple.rows(np.array([5]), artifact.config.n_layers)
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


def test_state_is_written_in_place(artifacts, capfd):
    """onnxruntime warns when it has to copy a buffer before TensorScatter; it must not."""
    with OnnxSession(read_artifact(artifacts[512]), log_severity=WARNING) as session:
        session.prefill(np.arange(100))
        session.decode(7)
        session.prefill(np.arange(300))
        session.decode(7)
    assert "in-place" not in capfd.readouterr().err


def test_a_copied_state_would_be_reported(artifacts, capfd):
    """The warning the test above relies on does appear when outputs are other memory."""
    artifact = read_artifact(artifacts[512])
    options = ort.SessionOptions()
    options.log_severity_level = WARNING
    program = artifact.root / artifact.backend("onnx").programs["decode"].file
    engine = ort.InferenceSession(str(program), options, providers=["CPUExecutionProvider"])
    types = {"float": np.float32, "uint8": np.uint8, "int8": np.int8, "int64": np.int64}
    feed = {
        i.name: np.zeros(
            [256 if d == "live" else d for d in i.shape], types[i.type[len("tensor(") : -1]]
        )
        for i in engine.get_inputs()
    }
    engine.run(None, feed)
    assert "in-place" in capfd.readouterr().err


def test_graph_manifest_and_plan_agree(artifacts):
    artifact = read_artifact(artifacts[512])
    views = state_views(artifact.plan)
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
        assert [i.name for i in state] == [v.name for v in views]
        assert [tuple(i.shape) for i in state] == [v.shape for v in views]
        assert [o.name for o in program.outputs if o.name != "logits"] == [
            f"{v.name}.out" for v in views
        ]
        assert ("logits" in [o.name for o in program.outputs]) == (name == "decode")


def test_prefill_leaves_the_sharing_layers_and_the_head_out(artifacts):
    artifact = read_artifact(artifacts[512])
    names = {}
    for name, program in artifact.backend("onnx").programs.items():
        model = onnx.load(artifact.path(program.file), load_external_data=False)
        names[name] = {i.name for i in model.graph.initializer}
    own = artifact.config.n_own
    for i in range(artifact.config.n_layers):
        held = any(f"layers.{i}." in n for n in names["prefill"])
        assert held == (i < own), i
        assert any(f"layers.{i}." in n for n in names["decode"])
    # the last owner only writes its rows: its MLP and output projection are dead code here
    assert not any(f"layers.{own - 1}.mlp" in n for n in names["prefill"])
    assert not any(f"layers.{own - 1}.attn.o_proj" in n for n in names["prefill"])
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


def test_every_process_writes_the_same_functions():
    """onnxscript keeps a loop's variables in a set: the hash seed must leave no trace."""
    code = (
        "from edge_kv.export.onnx_ops import attend_blocks as f; import sys;"
        "sys.stdout.buffer.write(f.to_function_proto().SerializeToString(deterministic=True))"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]
    assert b"Loop" in made[0]
