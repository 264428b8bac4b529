"""The ExecuTorch backend: its ops against the static state, its weights, and a program that ran."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from edge_kv import models
from edge_kv.artifact import read_artifact, sha256_file
from edge_kv.errors import ArtifactError, ConfigError, ExportError, RewindError, RuntimeFault
from edge_kv.export import export_model
from edge_kv.export import lower_executorch as lowering
from edge_kv.export.backends import BACKENDS
from edge_kv.export.executorch_portable import PortableEmbedding
from edge_kv.export.executorch_xnnpack import XnnpackLayout, XnnpackLinear, XnnpackNorm, sigmoids
from edge_kv.export.packed_weights import PackedEmbedding, PackedLinear
from edge_kv.export.rounding import round_rows
from edge_kv.export.weight_file import (
    Journal,
    StoredTensor,
    StoredWeights,
    WeightLayout,
    write_weights,
)
from edge_kv.formats import FORMATS, pack
from edge_kv.manifest import PlanEntry
from edge_kv.models.gemma import Attention, Config
from edge_kv.models.model import EMBED, FLOAT, LINEAR, Rope, Row, Weight
from edge_kv.models.random_source import RandomSource
from edge_kv.nets.weights import Norm
from edge_kv.parity import divergence
from edge_kv.progress import Silent
from edge_kv.runtime import load, native_library
from edge_kv.runtime.verify import verify
from edge_kv.tensors import weight_formats

CTX, CHUNK = 192, 16

CONFIG = Config(
    vocab=512,
    hidden=64,
    layers=3,
    max_ctx=1024,
    pattern="SFF",
    window=24,
    sliding=Attention(4, 2, 16, Rope(1e4, 16, 8)),
    full=Attention(4, 1, 32, Rope(1e6, 32, 4)),
    mlp_width=96,
    shared_mlp_width=128,
    shared=1,
    ple_dim=32,
    softcap=30.0,
)


def test_layout_is_what_xnnpack_takes():
    layout = XnnpackLayout(models.weights(CONFIG), weight_formats("int4"))
    rows = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    for name in ("int4-f16", "int8-row"):
        q, error = layout.quantise(rows, FORMATS[name])
        scales = torch.from_numpy(q.row_scales if q.block_scales is None else q.block_scales)
        assert (scales > 0).all()
        if name == "int4-f16":
            scales = scales.to(torch.float32)
            assert torch.equal(scales, scales.to(torch.bfloat16).to(torch.float32))
        _, signed = round_rows(rows, FORMATS[name])
        assert signed * 0.99 < error < signed * 1.3  # positive scales cost little
    used = {t.format.name for t in layout.tensors if t.format}
    assert used == {"int4-f16", "int8-row"}


def packed_module(name, rows, cols, embed=False):
    """A packed linear or token table of random rows that XNNPACK could multiply by."""
    spec = Weight("w", (rows, cols), EMBED if embed else LINEAR)
    layout = XnnpackLayout([spec], {spec.kind: name})
    t = StoredTensor(spec, FORMATS[name])
    module = PackedEmbedding(t) if embed else PackedLinear(t, False, 0, rows)
    q, _ = layout.quantise(torch.randn(rows, cols), FORMATS[name])
    module.packed = torch.from_numpy(pack(FORMATS[name], q))
    return module


@pytest.mark.parametrize("name", ["int4-f16", "int8-row"])
@torch.no_grad()
def test_xnnpack_linear_is_the_packed_linear_up_to_8_bit_activations(name):
    torch.manual_seed(1)
    plain = packed_module(name, 96, 128)
    x = torch.randn(5, 128)
    error = XnnpackLinear(plain)(x) - plain(x)
    assert error.square().mean().sqrt() < 0.01 * plain(x).std()
    whole = torch.randint(-127, 128, (5, 128)).float()
    whole[:, 0], whole[:, 1] = -128, 127  # activations that 8 bits hold exactly
    torch.testing.assert_close(XnnpackLinear(plain)(whole), plain(whole), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_activations_become_the_sigmoids_that_they_are():
    class Gates(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.gelu(x, approximate="tanh"), torch.nn.functional.silu(x)

    x = torch.linspace(-30, 30, 4001)
    program = torch.export.export(Gates(), (x,))
    sigmoids(program)
    used = {str(node.target) for node in program.graph.nodes}
    assert "aten.sigmoid.default" in used and not used & {"aten.gelu.default", "aten.silu.default"}
    for got, want in zip(program.module()(x), Gates()(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["int4-f16", "int8-row"])
@torch.no_grad()
def test_portable_embedding_is_the_packed_embedding(name):
    torch.manual_seed(2)
    source = packed_module(name, 96, 64, embed=True)
    ids = torch.tensor([5, 0, 95, 5])
    assert torch.equal(PortableEmbedding(source)(ids), source(ids))


@torch.no_grad()
def test_xnnpack_norm_is_the_norm():
    norm = Norm(Weight("w", (64,), FLOAT), 1e-6)
    norm.weight.data = torch.rand(64) + 0.5
    x = torch.randn(3, 7, 64) * 100
    torch.testing.assert_close(XnnpackNorm(norm)(x), norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("laguna-xs2", "a mixture of experts"), ("zaya1-8b", "a mixture of experts"),
     ("deepseek-v4-flash", "a mixture of experts or a choice of blocks or mixed residual streams "
      "or attention with sinks or to two tables at once")],
)  # fmt: skip
def test_portable_programs_name_what_they_lack(name, lacks):
    """At full size, before anything is read; native programs have it all."""
    config = models.get_row(name).config
    BACKENDS["executorch"].check(config, "native")
    with pytest.raises(ExportError, match=f"no operators for {lacks}, which.*--attention native"):
        BACKENDS["executorch"].check(config, "portable")


def test_portable_programs_take_dense_models():
    for name in ("e2b", "llama3.2-1b", "qwen3-0.6b", "smollm2-135m"):
        BACKENDS["executorch"].check(models.get_row(name).config, "portable")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("edge_kv.export.backends.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"executorch, which is not installed.*edge-kv\[execu"):
        BACKENDS["executorch"].check(CONFIG, "native")


def exported(tmp_path_factory, attention, backends=("executorch",)):
    """A small random model, exported through the whole pipeline once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # a pytest-xdist worker
    root = shared / "-".join((*backends, attention))
    with FileLock(f"{root}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_kv.export.executorch_portable.BLOCK", 64)  # three to a table
        if not root.exists():
            patch.setitem(models.ROWS, "small", Row(CONFIG, "", "for tests"))
            export_model(
                model="small", weights="random:1", ctx=CTX, chunk=CHUNK, backends=backends,
                attention=attention, out=root, open_session=load,
            )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return exported(tmp_path_factory, "native")


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return exported(tmp_path_factory, "portable")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return exported(tmp_path_factory, "native", ("executorch", "onnx"))


RUNS = [("native", "executorch"), ("portable", "executorch"), ("portable", "executorch-python")]


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]} on {run[1]}")
def case(request, tmp_path_factory):
    """(artifact directory, engine): every attention on every engine that runs it."""
    attention, engine = request.param
    return exported(tmp_path_factory, attention), engine


def ids_for(n, seed=3):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, n)


def logits_of(session, ids, chunks):
    at = 0
    for n in chunks:
        session.prefill(ids[at : at + n])
        at += n
    return np.stack([session.decode(int(i)) for i in ids[at:]])


def test_native_artifact_keeps_its_weights_outside_of_the_program(root):
    manifest = read_artifact(root).manifest
    backend = manifest.backends["executorch"]
    assert backend.files == ["executorch/model.pte", "executorch/weights.bin"]
    assert {p.name for p in root.rglob("*") if p.is_file()} == {
        "manifest.json", "model.pte", "weights.bin", "ple.bin", "verify.npz",
    }  # fmt: skip
    assert (root / "executorch/model.pte").stat().st_size < 64 << 10
    layout = WeightLayout(models.weights(CONFIG), weight_formats("int4"))
    assert (root / "executorch/weights.bin").stat().st_size == layout.bytes
    assert manifest.parity["executorch"].lowering["max_kl"] < 1e-6


def test_portable_artifact_holds_one_program_and_no_other_weights(portable):
    manifest = read_artifact(portable).manifest
    assert manifest.backends["executorch"].files == ["executorch/model.pte"]
    assert {p.name for p in portable.rglob("*") if p.is_file()} == {
        "manifest.json", "model.pte", "ple.bin", "verify.npz",
    }  # fmt: skip
    # The weights once, the rows of the token table beside the head, and room for the graphs.
    layout = XnnpackLayout(models.weights(CONFIG), weight_formats("int4"))
    assert (portable / "executorch/model.pte").stat().st_size < 1.2 * layout.bytes + (150 << 10)


def test_both_backends_share_one_weight_file(both):
    manifest = read_artifact(both).manifest
    assert [str(p.relative_to(both)) for p in both.rglob("weights*")] == ["onnx/weights.bin"]
    files = [{f for f in b.files if "weights" in f} for b in manifest.backends.values()]
    assert files == [{"onnx/weights.bin"}] * 2
    ids = ids_for(CTX)
    logits = []
    for engine in ("executorch", "onnx"):
        with load(both, engine, threads=1) as session:
            assert verify(session).passed
            session.reset()
            logits.append(logits_of(session, ids, [16] * 11))
    # The same integers and the same kernels: what rounds differs in the last bits.
    assert divergence(*logits).max_kl < 1e-3


def test_delegates_stay_few(root, portable):
    """Each layer's attention cuts the graph once; anything more is an operator XNNPACK lost.

    The look-up of tokens in stock operators is one of its own.
    """
    details = read_artifact(portable).manifest.backends["executorch"].details
    assert details["attention"] == "portable"
    assert 0 < details["delegates"]["decode"] <= CONFIG.layers + 3
    assert 0 < details["delegates"]["prefill"] <= CONFIG.owners + 3
    details = read_artifact(root).manifest.backends["executorch"].details
    assert details["attention"] == "native" and not any(details["delegates"].values())


@pytest.mark.parametrize("attention", ["native", "portable"])
def test_what_lean_lowering_leaves_out_leaves_no_trace(attention, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_kv.export.executorch_portable.BLOCK", 16)  # a loop, not one block
    config = replace(CONFIG, layers=1, pattern="F", shared=0, vocab=64)
    plan = models.plan(config, ctx=64, chunk=8, kv="int8")
    formats = weight_formats("int4")
    layout = BACKENDS["executorch"].layout(models.weights(config), formats, attention)
    weights = StoredWeights(layout, tmp_path / "weights.bin")
    source = RandomSource(config, 1, formats)
    write_weights(source, layout, weights.path, Journal(tmp_path / "journal"), Silent())
    programs = []
    for around in (lowering.lean, nullcontext):
        monkeypatch.setattr(lowering, "lean", around)
        path = tmp_path / "model.pte"
        lowering.lower_executorch(
            config, plan, weights, path, facts={}, attention=attention,
            delegate=attention == "portable",
        )  # fmt: skip
        programs.append(path.read_bytes())
    assert programs[0] == programs[1]


def test_portable_program_needs_stock_operators_only(portable):
    """Every operator is registered in the stock runtime, and state is planned once, in place."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.extension.pybindings import _C

    artifact = read_artifact(portable)
    data = (portable / "executorch/model.pte").read_bytes()
    stock, arenas = set(_C._get_operator_names()), []
    for method in deserialize_pte_binary(data).program.execution_plan[:2]:
        assert method.name in ("prefill", "decode")
        used = {f"{o.name}.{o.overload}" if o.overload else o.name for o in method.operators}
        assert used <= stock and {d.id for d in method.delegates} == {"XnnpackBackend"}
        assert "aten::index_put_" in used and "aten::index_put.out" not in used
        arenas.append(method.non_const_buffer_sizes[1:])
    state = sum(-(-b.bytes // 16) * 16 for b in artifact.plan.tables)
    assert [state_bytes for _, state_bytes in arenas] == [state, state]


def test_native_program_is_refused_by_the_stock_runtime(root):
    with pytest.raises(ArtifactError, match=r"use --engine executorch, or export with --attention"):
        load(root, "executorch-python")


def test_stock_runtime_is_quiet_pins_no_pages_and_keeps_its_rights(portable, capfd):
    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return [x for x in lines if x.startswith(("VmLck", "CapEff", "CapPrm"))]

    before = held(), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with load(portable, "executorch-python"):
        assert (held(), resource.getrlimit(resource.RLIMIT_MEMLOCK)) == before
    assert capfd.readouterr().err == ""


def test_stock_runtime_without_torch_is_one_sentence(portable, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(RuntimeFault, match=r"needs torch and executorch .*; run: pip install"):
        load(portable, "executorch-python")


def test_state_is_the_plans_and_lives_in_the_program(case):
    root, engine = case
    artifact = read_artifact(root)
    with load(artifact, engine, threads=1) as session:
        assert {n: a.shape for n, a in session.state.items()} == {
            t.name: t.shape for t in artifact.plan.tables
        }
        assert not any(a.any() for a in session.state.values())
        session.prefill(ids_for(5))
        scales = session.state["l1.k.scale"]
        assert (scales[:5] > 0).all() and not scales[5:].any()
        end = max(a.ctypes.data + a.nbytes for a in session.state.values())
        begin = min(a.ctypes.data for a in session.state.values())
        assert end - begin == artifact.plan.bytes


def test_chunks_wraps_and_rewinds_do_not_change_the_logits(case):
    root, engine = case
    ids = ids_for(CTX)
    with load(root, engine, threads=2) as session:
        want = logits_of(session, ids, [16] * 11)
        session.reset()
        # other chunk sizes round activations the same way: only summation orders differ
        got = logits_of(session, ids, [1, 7, 16, 3, 16, 16, 16, 16, 1, 16, 16, 16, 16, 16, 4])
        assert divergence(want, got).max_kl < 1e-3
        session.rewind(4)
        again = np.stack([session.decode(int(i)) for i in ids[-4:]])
        np.testing.assert_allclose(again, got[-4:], atol=1e-5)
        with pytest.raises(RewindError):
            session.rewind(CTX - 5)


def test_snapshot_restores_bit_equal_logits_in_another_session(case, tmp_path):
    root, engine = case
    ids = ids_for(80)
    with load(root, engine) as session:
        session.prefill(ids[:60])
        session.snapshot(tmp_path / "s")
        want = [session.decode(int(i)) for i in ids[60:]]
    with load(root, engine) as session:
        session.prefill(ids_for(30, seed=9))
        session.restore(tmp_path / "s")
        assert session.pos == 60
        got = [session.decode(int(i)) for i in ids[60:]]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("both", ("onnx", "executorch")),
        ("both", ("executorch", "onnx-stock")),
        ("portable", ("executorch", "executorch-python")),
        ("portable", ("executorch-python", "executorch")),
    ],
)
def test_another_engine_goes_on_from_a_snapshot(name, engines, request, tmp_path):
    """Past two wraps of the rings, behind a rewind; the same rows, other sums."""
    root, ids = request.getfixturevalue(name), ids_for(100)
    taken, other = engines
    with load(root, taken, threads=1) as session:
        session.prefill(ids[:95])
        session.rewind(3)
        session.snapshot(tmp_path / "s", note={"of": taken})
        want = logits_of(session, ids[92:], [2])
    with load(root, other, threads=1) as session:
        assert session.restore(tmp_path / "s") == {"of": taken}
        assert session.tokens == tuple(ids[:92])
        got = logits_of(session, ids[92:], [2])
    assert divergence(want, got).max_kl < 1e-3


def changed(root, to, change=lambda manifest: None, **files):
    """A copy of an artifact with other files and an edited manifest whose digests are right."""
    copy = shutil.copytree(root, to)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name, data in files.items():
        path = copy / "executorch" / name.replace("_", ".")
        path.write_bytes(data)
        entry = {"size": len(data), "sha256": sha256_file(path)}
        manifest["files"][f"executorch/{path.name}"] = entry
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_sessions_of_one_process_read_their_own_weights(root, tmp_path):
    data = bytearray((root / "executorch/weights.bin").read_bytes())
    layout = WeightLayout(models.weights(CONFIG), weight_formats("int4"))
    at = layout.regions["layers.0.attn.q.packed"].offset
    data[at : at + 256] = bytes(256)
    other = changed(root, tmp_path / "other", weights_bin=bytes(data))
    ids = ids_for(40)
    want = []
    for path in (root, other):
        with load(path, "executorch") as session:
            want.append(logits_of(session, ids, [16]))
    assert divergence(*want).max_abs > 1e-3
    with load(root, "executorch") as first, load(other, "executorch") as second:
        for session in (first, second):
            session.prefill(ids[:16])
        for i, token in enumerate(ids[16:]):
            for session, logits in zip((first, second), want, strict=True):
                np.testing.assert_array_equal(session.decode(int(token)), logits[i])


def test_sessions_of_other_thread_counts_live_side_by_side(root):
    ids = ids_for(60)
    with load(root, "executorch", threads=1) as one:
        want = logits_of(one, ids, [16, 16])
        for threads in (2, 1, 2):
            with load(root, "executorch", threads=threads) as other:
                np.testing.assert_array_equal(logits_of(other, ids, [16, 16]), want)
                one.reset()
                np.testing.assert_array_equal(logits_of(one, ids, [16, 16]), want)


@pytest.mark.parametrize("engine", ["executorch", "executorch-python"])
def test_portable_sessions_of_other_thread_counts_are_refused(portable, engine, monkeypatch):
    monkeypatch.setattr("edge_kv.runtime.threads.usable_cpus", lambda: 2)
    with load(portable, "executorch", threads=1) as one:
        want = one.decode(3)
        with pytest.raises(RuntimeFault, match="a portable program on 1 threads"):
            load(portable, engine, threads=2)
        with load(portable, engine, threads=1) as other:
            other.decode(3)
        one.reset()
        np.testing.assert_array_equal(one.decode(3), want)
    with load(portable, engine, threads=2) as other:
        other.decode(3)


def test_weights_that_are_not_the_programs_are_refused(root, tmp_path):
    data = (root / "executorch/weights.bin").read_bytes()
    for name, bad in (("cut", data[:-4096]), ("long", data + bytes(4096)), ("empty", b"")):
        copy = changed(root, tmp_path / name, weights_bin=bad)
        with pytest.raises(ArtifactError, match=r"ExecuTorch cannot load .*weights") as e:
            load(copy, "executorch")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "key",
    ["f32[64]@9999999999", "f32[64]@18446744073709551615", "f32[65]@4096", "u8[64]@4096",
     "f32[64]@4097", "f32[64", "f32[]@0", "f32[4294967296]@0", "f16[64]@0",
     "f32[64,64,64,64,64,64,64,64,64]@0"],
)  # fmt: skip
def test_regions_outside_of_the_file_and_of_other_shapes_are_refused(root, tmp_path, key):
    """Whatever a program names is compared with the file and with the tensor it is for."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    file = deserialize_pte_binary((root / "executorch/model.pte").read_bytes())
    for plan in file.program.execution_plan:
        for value in plan.values:
            info = getattr(value.val, "extra_tensor_info", None)
            if info and info.fully_qualified_name.startswith("f32[64]@"):
                info.fully_qualified_name = key
    copy = changed(root, tmp_path / "c", model_pte=bytes(serialize_pte_binary(file)))
    with pytest.raises(ArtifactError, match="ExecuTorch cannot load"):
        load(copy, "executorch")


def test_verify_knows_whose_programs_an_engine_runs(case):
    root, engine = case
    with load(root, engine) as session:
        assert session.engine == engine and session.backend == "executorch"
        assert verify(session).passed


def test_torch_is_never_imported_and_the_log_stays_clean(root):
    code = f"""
import sys
from edge_kv.runtime import load
with load({str(root)!r}, "executorch") as session:
    session.prefill(range(20))
    assert len(session.decode(3)) == {CONFIG.vocab}
assert not {{"torch", "executorch", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_damaged_program_is_one_sentence(case, tmp_path):
    root, engine = case
    data = (root / "executorch/model.pte").read_bytes()
    half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    for name, bad in (("noise", b"\xff" * len(data)), ("half", half)):
        copy = changed(root, tmp_path / name, model_pte=bad)
        with pytest.raises(ArtifactError, match=r"ExecuTorch cannot load .*model.pte: ") as e:
            load(copy, engine)
        assert "\n" not in str(e.value)
    (copy / "executorch/model.pte").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.pte has SHA-256"):
        load(copy, engine)


def set_plan(**asked):
    def change(manifest):
        ctx, chunk, kv = (manifest["plan"][k] for k in ("ctx", "chunk", "kv"))
        plan = models.plan(CONFIG, **{"ctx": ctx, "chunk": chunk, "kv": kv, **asked})
        manifest["plan"] = json.loads(PlanEntry.of(plan).model_dump_json())

    return change


def set_input(which, shape):
    def change(manifest):
        decode = manifest["backends"]["executorch"]["programs"]["decode"]
        decode["inputs"][which]["shape"] = shape

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_plan(ctx=128), "the manifest disagree about|its table l1.k is int8"),
        (set_plan(kv="f32"), "the manifest disagree about|its table l1.k is int8"),
        (set_plan(chunk=8), "the manifest disagree about"),
        (set_input(2, [1, 2, 32]), "disagree about 'decode input float 1"),
        (lambda m: m["ple"].update(dim=0), "ple.dim"),
        (lambda m: m["ple"].update(n_layers=2), "per-layer rows"),
        (lambda m: m.update(ple=None), "per-layer rows"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_program_is_refused(case, tmp_path, change, message):
    root, engine = case
    copy = changed(root, tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=message):
        load(copy, engine)


def test_weights_outside_of_the_artifact_are_refused(root, tmp_path):
    def change(manifest):
        manifest["backends"]["executorch"]["details"]["weights"] = "../weights.bin"

    with pytest.raises(ArtifactError, match=r"does not list the weights '../weights.bin'"):
        load(changed(root, tmp_path / "copy", change), "executorch")


def test_missing_compiler_and_wheel_are_one_sentence(root, monkeypatch, tmp_path):
    native_library.load_library.cache_clear()
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(native_library.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeFault, match=r"no C\+\+ compiler"):
        load(root, "executorch")
    monkeypatch.setattr(native_library, "version", lambda name: "1.4.0")
    with pytest.raises(RuntimeFault, match=r"needs executorch 1.5.1, not 1.4.0; run: pip"):
        load(root, "executorch")
    monkeypatch.undo()
    native_library.load_library.cache_clear()


def test_broken_compiler_is_one_sentence(root, monkeypatch, tmp_path):
    native_library.load_library.cache_clear()
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeFault, match="does not compile") as e:
        load(root, "executorch")
    assert "\n" not in str(e.value) and not list((tmp_path / "native").glob("*.so"))
    native_library.load_library.cache_clear()
