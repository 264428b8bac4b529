"""Native operators in place of an ONNX program's functions: the same numbers, less work."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from edge_kv import runtime
from edge_kv.artifact import read_artifact
from edge_kv.cli import app
from edge_kv.cli.export_screen import print_summary
from edge_kv.errors import RuntimeFault
from edge_kv.export import export_model
from edge_kv.runtime import base, native_library
from edge_kv.runtime.onnx_session import OnnxSession, _Bound, create_engine
from edge_kv.runtime.ort import onnxruntime as ort

IDS = np.random.default_rng(3).integers(0, 512, 400)


def logits(root, engine, threads=2):
    """Prompts of every kind: across chunks, ring wraps, a rewind, and single steps between."""
    found = []
    with runtime.load(root, engine, threads=threads) as session:
        session.prefill(IDS[:70])
        found += [session.decode(int(i)) for i in IDS[70:80]]
        session.prefill(IDS[80:81])
        session.rewind(5)
        found += [session.decode(int(i)) for i in IDS[76:90]]
        session.prefill(IDS[90:393])
        found += [session.decode(int(i)) for i in IDS[393:]]
        state = {name: rows.copy() for name, rows in session.state.items()}
    return np.stack(found), state


@pytest.fixture(scope="module", params=["none f32", "none f16", "none int8"])
def float_artifact(request, tmp_path_factory):
    """Float weights, so that all there is between the engines is how they attend."""
    quant, kv = request.param.split()
    root = tmp_path_factory.mktemp(kv) / "tiny"
    export_model(
        model="tiny", ctx=512, chunk=32, quant=quant, kv=kv, out=root, open_session=runtime.load
    )
    return root, kv


def test_native_operators_store_and_attend_as_the_functions_do(float_artifact):
    root, kv = float_artifact
    (native, native_state), (stock, stock_state) = (logits(root, e) for e in ("onnx", "onnx-stock"))
    # A rounded row may fall on the other side of a half: int8 and f16 then differ by a step.
    assert np.abs(native - stock).max() < {"f32": 1e-4, "f16": 1e-2, "int8": 0.1}[kv]
    for name, rows in stock_state.items():
        difference = np.abs(native_state[name].astype(np.float64) - rows.astype(np.float64))
        step = {"float32": 1e-4, "float16": 4e-3, "uint8": 1, "int8": 1}[rows.dtype.name]
        assert difference.max() <= step, name
        if rows.dtype.itemsize == 1:
            assert (difference > 0).mean() < 0.01, name


def test_threads_do_not_change_what_native_operators_compute(tiny_artifact):
    one, two = (logits(tiny_artifact, "onnx", threads)[0] for threads in (1, 2))
    assert np.abs(one - two).max() < 0.05 * one.std()


def test_quantised_weights_decode_as_well_as_with_stock_operators(tiny_artifact):
    (native, _), (stock, _) = (logits(tiny_artifact, e) for e in ("onnx", "onnx-stock"))
    assert np.abs(native - stock).mean() < 0.02 * stock.std()
    assert (native.argmax(-1) == stock.argmax(-1)).mean() > 0.9


def test_no_function_is_left_to_onnxruntime(tiny_artifact, tmp_path):
    """The optimised programs hold our operators, and none of what the functions are made of."""
    artifact = read_artifact(tiny_artifact)
    library = native_library.build_onnx_operators()
    for name, program in artifact.backend("onnx").programs.items():
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        create_engine(artifact.path(program.file), 1, 3, options, library)
        model = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False)
        ours = {n.op_type for n in model.graph.node if n.domain == "edge_kv"}
        theirs = {n.op_type for n in model.graph.node if n.domain != "edge_kv"}
        assert {"linear_q", "embed_q", "norm_rope", "put", "attend"} <= ours
        assert not theirs & {"MatMulNBits", "ScatterND", "Softmax", "MatMul", "Loop"}


def test_the_head_is_one_product_with_the_table_that_embeds(tiny_artifact):
    artifact = read_artifact(tiny_artifact)
    path = artifact.path(artifact.backend("onnx").programs["decode"].file)
    graph = onnx.load(path, load_external_data=False).graph
    (last,) = (n for n in graph.node if "logits" in n.output)
    (embeds,) = (n for n in graph.node if n.op_type == "embed_q")
    given = {a.name: onnx.helper.get_attribute_value(a) for a in last.attribute}
    assert last.op_type == "linear_q" and last.input[1] == embeds.input[1]
    assert (given["rows"], given["cap"]) == (artifact.tokens.vocab, 30.0)
    outside = [{e.key: e.value for e in t.external_data} for t in graph.initializer]
    places = [e["offset"] for e in outside if e]
    assert len(set(places)) == len(places)


def test_programs_from_before_results_had_steps_and_caps_run(tiny_artifact, tmp_path):
    """Attributes that came later count as 0."""
    artifact = read_artifact(tiny_artifact)
    program = artifact.backend("onnx").programs["prefill"]
    model = onnx.load(artifact.path(program.file), load_external_data=False)
    later = {"out_step", "cap", "gate_step", "up_step", "down_step"}
    for node in model.graph.node:
        late = later | ({"step"} if node.op_type == "glu_q" else set())
        if node.op_type in ("linear_q", "glu_q"):
            kept = [a for a in node.attribute if a.name not in late]
            assert len(kept) < len(node.attribute)
            del node.attribute[:]
            node.attribute.extend(kept)
    shutil.copy(artifact.path(program.file).parent / "weights.bin", tmp_path)
    onnx.save(model, tmp_path / "prefill.onnx")
    library = native_library.build_onnx_operators()
    states = []
    with OnnxSession(artifact, threads=1) as session:
        session.prefill(IDS[:20])
        rows = session._ple.rows(IDS[:20], session._bound["prefill"].ple_layers)
        for path in (artifact.path(program.file), tmp_path / "prefill.onnx"):
            engine = create_engine(path, 1, 3, None, library)
            _Bound(session, "prefill", program, engine).run(IDS[:20], 0, rows)
            states.append({name: table[:20].copy() for name, table in session.state.items()})
    for name, table in states[0].items():
        np.testing.assert_array_equal(states[1][name], table)


def test_without_a_compiler_the_functions_run(tiny_artifact, monkeypatch):
    def no_compiler():
        raise RuntimeFault("no compiler")

    want, _ = logits(tiny_artifact, "onnx-stock")
    monkeypatch.setattr(native_library, "build_onnx_operators", no_compiler)
    with OnnxSession(read_artifact(tiny_artifact), threads=2) as session:
        assert session.operators is None
    got, _ = logits(tiny_artifact, "onnx")
    np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(base, "build_onnx_operators", no_compiler)
    assert base.planned_base("onnx") is None
    done = CliRunner().invoke(app, ["run", str(tiny_artifact), "a", "--ram-limit", "9g"])
    assert done.exit_code == 1 and "none for onnx without its native operators" in done.stderr


@pytest.mark.usefixtures("compiler")
def test_without_a_compiler_plan_says_that_it_is_of_another_run(
    tiny_artifact, monkeypatch, tmp_path
):
    monkeypatch.setattr(native_library, "_shipped", lambda machine: None)
    assert not base.lacks_plan("onnx")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not base.lacks_plan("executorch")
    done = CliRunner().invoke(app, ["plan", "--model", "e2b", "--ctx", "4k"])
    said = " ".join(done.stderr.split())
    assert done.exit_code == 0 and "this machine" not in done.stdout
    assert "Whether it fits this machine is not planned: There is no C++ compiler" in said
    lines = []
    print_summary(read_artifact(tiny_artifact), 3.0, lines.append)
    assert any("No planned memory: There is no C++ compiler" in line for line in lines)
    assert not any("tokens in use" in line for line in lines)


def put(content, library):
    """A library as `ship` leaves it: its digest lies beside it."""
    library.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    library.with_name(f"{library.name}.sha256").write_text(digest)
    native_library._shipped.cache_clear()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of a wheel's libraries, and no compiler to fall back on."""
    monkeypatch.setattr(native_library, "SHIPPED", tmp_path)
    native_library._shipped.cache_clear()
    yield tmp_path
    native_library._shipped.cache_clear()


def test_a_shipped_library_is_taken_and_nothing_compiled(shipped, monkeypatch, tiny_artifact):
    built = native_library.build_onnx_operators()
    name = native_library._shipped_name(platform.machine())
    put(built.read_bytes(), shipped / name)
    monkeypatch.setattr(native_library.shutil, "which", lambda name: None)
    monkeypatch.setenv("EDGE_KV_CACHE", str(shipped / "cache"))
    assert native_library.build_onnx_operators() == shipped / name
    with OnnxSession(read_artifact(tiny_artifact), threads=1) as session:
        assert session.operators == shipped / name


@pytest.mark.parametrize(
    "fault", ["of other sources", "cut off", "of another machine", "for another system"]
)
def test_a_shipped_library_that_does_not_fit_is_left_alone(shipped, fault, caplog):
    built = native_library.build_onnx_operators()
    name = native_library._shipped_name(platform.machine())
    other = next(m for m in native_library.SHIPPED_FOR if m != platform.machine())
    names = {
        "of other sources": f"edge_kv_onnx-{platform.machine()}-0123456789abcdef.so",
        "cut off": name,
        "for another system": name,
        "of another machine": native_library._shipped_name(other),
    }
    put(built.read_bytes(), shipped / names[fault])
    if fault == "cut off":
        os.truncate(shipped / name, 1000)
    if fault == "for another system":
        put(b"\x7fELF of something else", shipped / name)
    native_library._shipped.cache_clear()
    caplog.set_level("INFO")
    assert native_library.build_onnx_operators() == built
    assert ("cannot be loaded here" in caplog.text) == (fault == "for another system")
