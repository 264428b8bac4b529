"""Every model of `edge_kv.models` as ONNX programs against transformers, through a session.

One export a model. Prompts in mixed chunks, single tokens, rings that wrap, complete blocks,
rewinds, wrong continuations that are overwritten, snapshots into memory full of other rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_runs import BOUND, CHUNK, CTX, LENGTH, decoded, poison
from rich.console import Console
from tiny_models import tiny

from edge_kv import runtime
from edge_kv.artifact import read_artifact
from edge_kv.cli.report import artifact_data, print_artifact
from edge_kv.errors import RewindError, SnapshotError
from edge_kv.export import export_model
from edge_kv.manifest import UNFINISHED
from edge_kv.memory import predict_artifact, read_weights
from edge_kv.runtime import experts
from edge_kv.runtime.verify import verify

IDS = np.random.default_rng(1).integers(0, 96, LENGTH)


class Made:
    """One artifact and the logits transformers computes for `IDS`."""

    def __init__(self, name, folder, kv="f32", quant="none"):
        hf = tiny(name)
        hf.save_pretrained(folder / "hf")
        self.root = folder / "out"
        export_model(
            weights=str(folder / "hf"), ctx=CTX, chunk=CHUNK, kv=kv, quant=quant, out=self.root,
            open_session=runtime.load,
        )  # fmt: skip
        with torch.no_grad():
            self.expected = hf(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()

    def session(self, engine="onnx-stock"):
        return runtime.load(self.root, engine)


@pytest.fixture(scope="module", params=["qwen3", "laguna", "zaya-sliding", "deepseek_v4"])
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def decode(session, count, expected):
    """Decode the next `count` ids, in passes of every size; the largest |Δlogit|."""
    stop = session.pos + count
    return max(np.abs(row - expected[i]).max() for i, row in decoded(session, IDS, stop))


def prefill(session, count):
    session.prefill(IDS[session.pos : session.pos + count])


def test_programs_are_the_model(made, tmp_path):
    expected = made.expected
    with made.session() as session:
        for n in (8, 5, 1, 3):
            prefill(session, n)
        worst = decode(session, 13, expected)
        session.rewind(3)
        prefill(session, 8)
        session.prefill((IDS[session.pos : session.pos + 6] + 7) % 96)  # a wrong continuation
        session.rewind(6)
        worst = max(worst, decode(session, 18, expected))
        assert session.pos == 53
        session.snapshot(tmp_path / "x.kv")
        after = session.decode(int(IDS[53]))
    with made.session() as other:
        poison(other)
        other.restore(tmp_path / "x.kv")
        np.testing.assert_array_equal(other.decode(int(IDS[53])), after)
        other.rewind(2)
        worst = max(worst, decode(other, LENGTH - other.pos, expected))
        assert other.pos == LENGTH
    assert worst < BOUND


def test_the_manifest_says_what_the_programs_take(made):
    artifact = read_artifact(made.root)
    manifest = artifact.manifest
    tables = [t.name for t in artifact.plan.tables]
    for name, program in manifest.backends["onnx"].programs.items():
        assert [i.name for i in program.inputs] == ["ids", "pos", *tables]
        outputs = [f"{t}.out" for t in tables]
        assert [o.name for o in program.outputs] == ["logits"] * (name == "decode") + outputs
    assert manifest.parity["onnx"].lowering["max_kl"] < 1e-6
    assert artifact.tokens.vocab == 96
    assert manifest.identity.model != manifest.identity.plan
    list(artifact.check_digests())


def test_inspect_and_verify_know_every_model(made):
    artifact = read_artifact(made.root)
    data = artifact_data(artifact)
    assert data["model"]["layers"] == artifact.layers > 2
    assert [b["name"] for b in data["buffers"]] == [t.name for t in artifact.plan.tables]
    print_artifact(data, Console(width=200))
    planned = predict_artifact(artifact, 40)
    assert planned.touched == artifact.plan.touched(40)
    assert planned.peak > planned.touched + read_weights(artifact) > planned.touched
    with made.session() as session:
        assert verify(session).passed


def test_no_expert_is_unrolled_into_a_graph(made):
    import onnx

    model = onnx.load(made.root / "onnx" / "prefill.onnx", load_external_data=False)
    layers = len([n for n in model.graph.node if n.op_type == "attend"])
    experts = [n for n in model.graph.node if n.op_type == "experts_q"]
    assert len(experts) <= layers
    for function in model.functions:
        if function.name == "experts_q":
            assert len(function.node) < 40


def test_a_rewind_goes_as_far_as_the_shortest_table(made):
    with made.session() as session:
        prefill(session, 40)
        plan = session.plan
        reach = session.max_rewind
        assert plan.can_rewind(40 - reach, 40)
        if any(t.keep for t in plan.tables):
            assert reach < 40
            with pytest.raises(RewindError, match=f"reach back {reach}"):
                session.rewind(reach + 1)
        session.rewind(reach)
        session.rewind(session.pos)
        assert decode(session, 12, made.expected) < BOUND


@pytest.mark.usefixtures("compiler")
def test_a_bank_of_experts_follows_the_programs_that_come_and_go(made, monkeypatch):
    """Of an unfinished artifact one program is held, so weights lie where others lay before."""
    artifact = read_artifact(made.root)
    files = {
        n: f.model_copy(update={"sha256": UNFINISHED}) for n, f in artifact.manifest.files.items()
    }
    artifact.manifest = artifact.manifest.model_copy(update={"files": files})
    monkeypatch.setattr(experts, "bank_bytes", lambda *_: 1 << 20)
    with runtime.load(artifact, "onnx") as session:
        worst = 0.0
        for _ in range(3):
            prefill(session, 8)
            worst = max(worst, decode(session, 4, made.expected))
        assert bool(session.stats.expert_bank_bytes) == bool(artifact.manifest.needs.experts)
    assert worst < BOUND


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """Int8 state and int4 weights of a model with odd widths (rows of 48 stay float)."""
    return Made("llama-bias", tmp_path_factory.mktemp("rounded"), kv="int8")


def test_int8_state_stays_within_a_step_of_the_rows(rounded):
    artifact = read_artifact(rounded.root)
    assert {t.dtype for t in artifact.plan.tables} == {"int8", "f32"}
    with rounded.session() as session:
        prefill(session, 20)
        worst = decode(session, LENGTH - 20, rounded.expected)
    assert 1e-5 < worst < 0.1 * rounded.expected.std()


def test_native_operators_are_the_functions_over_rows_that_nobody_sees(rounded):
    """Over int8 rows, and with NaN in every float that was never written."""
    found = []
    for engine in ("onnx-stock", "onnx"):
        with rounded.session(engine) as session:
            if session.operators:
                for memory in session.state.values():
                    memory[:] = np.nan if memory.dtype.kind == "f" else 1
            prefill(session, 21)
            passes = [session.decode_many(IDS[at : at + 7]) for at in range(21, 42, 7)]
            found.append(
                np.concatenate(passes + [session.decode(int(i))[None] for i in IDS[42:50]])
            )
            session.rewind(9)
            found.append(session.decode_many(IDS[41:49]))
    np.testing.assert_allclose(found[2], found[0], atol=2e-4)
    np.testing.assert_allclose(found[3], found[1], atol=2e-4)


def test_snapshots_belong_to_one_model_and_one_plan(rounded, made, tmp_path):
    with made.session() as session:
        prefill(session, 5)
        session.snapshot(tmp_path / "x.kv")
    with rounded.session() as other, pytest.raises(SnapshotError, match="another model"):
        other.restore(tmp_path / "x.kv")
