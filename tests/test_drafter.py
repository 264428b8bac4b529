"""A drafter in an artifact: its program on each engine against PyTorch, what the gate and `verify`
make of a wrong one, what sessions keep for it, what is counted for it, and what is refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_assistant import Pair
from test_cli import good, invoke

from edge_kv import models, runtime
from edge_kv.artifact import read_artifact, sample_of, sha256_file
from edge_kv.errors import ArtifactError, ConfigError, ParityError, RuntimeFault
from edge_kv.export import export_model, gate, lower_onnx, pipeline
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    write_weights,
)
from edge_kv.models.sources import Paired, open_drafter, open_model
from edge_kv.needs import count_needs, read_by_draft
from edge_kv.nets.oracle import oracle, oracle_drafts, table_values
from edge_kv.nets.weights import Weights
from edge_kv.parity import draft_divergence
from edge_kv.progress import Silent
from edge_kv.runtime.generation import Trace, generate
from edge_kv.runtime.speculation import Assistant, Speculation
from edge_kv.runtime.verify import verify
from edge_kv.tensors import weight_formats

CTX, CHUNK = 200, 16  # windows of 64: rings of 79 slots wrap twice
ENGINES = ("onnx", "onnx-stock", "executorch")
NEAR = 1e-3  # of float weights and float state, after a dozen layers and four drafts


def export(root, **how):
    return export_model(
        model="tiny", assistant="random:1", ctx=CTX, chunk=CHUNK, calibration="none", out=root,
        open_session=runtime.load, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny with a drafter of random weights, all in floats."""
    root = tmp_path_factory.mktemp("floats") / "made"
    return export(root, kv="f32", quant="none", backends=("onnx", "executorch"))


@pytest.fixture(scope="module")
def pair():
    row = models.get_row("tiny")
    target = open_model(row, None, {})
    return Pair(target, open_drafter("random:1", row.config, {})[1], CTX, CHUNK)


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_drafts_are_those_of_pytorch(made, pair, engine):
    """Bursts before and behind the window, after prompts in chunks, refused drafts and rewinds."""
    ids = np.random.default_rng(4).integers(0, 2048, CTX)
    with runtime.load(made, engine) as session:
        assert session.has_drafter and session.hidden is None
        for depth in (1, 20, 64, 65, 130, 190):
            session.prefill(ids[session.pos : depth - 1])
            assert session.hidden is None
            session.decode(int(ids[depth - 1]))
            kept = session.hidden.copy()
            session.decode_many(ids[depth : depth + 4])  # refused
            session.rewind(4)
            assert session.hidden is None
            session.rewind(1)
            session.decode_many(ids[depth - 1 : depth + 3])
            session.rewind(3)
            np.testing.assert_allclose(session.hidden, kept, atol=NEAR)
            pair.state.tables.update(
                {n: torch.full_like(t, torch.nan) for n, t in pair.state.tables.items()}
            )
            for at in range(0, depth, CHUNK):
                part = torch.from_numpy(ids[at : min(at + CHUNK, depth)])
                hidden, _ = pair.feed(part, at)
            np.testing.assert_allclose(session.hidden, hidden[-1], atol=NEAR)
            token, carry = int(ids[depth]), session.hidden
            rows = {name: table.copy() for name, table in session.state.items()}
            for wanted, best in pair.burst(token, hidden[-1:], depth, 4):
                drafted = session.draft(token, carry)
                np.testing.assert_allclose(
                    drafted.logits, wanted[torch.from_numpy(drafted.tokens)], atol=NEAR
                )
                assert drafted.token == best
                token, carry = drafted.token, drafted.hidden
            assert session.pos == depth
            for name, table in session.state.items():
                np.testing.assert_array_equal(table, rows[name])
    assert session.stats.draft_runs == 24 and session.stats.draft_seconds > 0


@torch.no_grad()
def test_drafts_over_stored_integers(tmp_path, pair):
    """Four-bit weights and eight-bit state: the programs as they ship against what they store."""
    root = export(tmp_path / "packed", quant="int4", kv="int8")
    rows = models.weights(pair.target.config, pair.config)
    layout = WeightLayout(rows, read_artifact(root).manifest.quant.formats)
    stored = StoredWeights(layout, root / "onnx" / "weights.bin")
    packed = Pair(
        pair.target, pair.drafter, CTX, CHUNK, "int8", (PackedWeights(rows, layout), stored.read)
    )
    ids = np.random.default_rng(5).integers(0, 2048, 90)
    for at in range(0, 89, CHUNK):
        hidden, _ = packed.feed(torch.from_numpy(ids[at : min(at + CHUNK, 89)]), at)
    with runtime.load(root, "onnx") as session:
        session.prefill(ids[:88])
        session.decode(int(ids[88]))
        assert np.corrcoef(session.hidden, hidden[-1])[0, 1] > 0.99
        token, carry = int(ids[89]), session.hidden
        for wanted, best in packed.burst(token, hidden[-1:], 89, 3):
            drafted = session.draft(token, carry)
            same = np.isin(drafted.tokens, np.flatnonzero(wanted > wanted.min()))
            logits, asked = drafted.logits[same], wanted[drafted.tokens][same]
            assert same.mean() > 0.7  # clusters at the edge of the chosen ones may change places
            assert np.corrcoef(logits, asked)[0, 1] > 0.98
            token, carry = best, drafted.hidden


# --- the gate and verify -------------------------------------------------------------------------


def layout_of(root):
    config = models.get_row("tiny").config
    rows = models.weights(config, models.official_drafter(config).config)
    return rows, WeightLayout(rows, read_artifact(root).manifest.quant.formats)


def roll_rows(path, layout, name):
    """Put the rows of a float weight in a file into another order."""
    region = layout.regions[name]
    rows = np.memmap(path, np.float32, "r+", region.offset, region.shape)
    rows[:] = np.roll(rows, len(rows) // 2, 0)
    rows.flush()


@pytest.fixture
def damaged(made, tmp_path):
    """`made` with the rows of one matrix of the drafter in another order, and digests to match."""
    root = tmp_path / "damaged"
    shutil.copytree(made, root)
    path = root / "onnx" / "weights.bin"
    roll_rows(path, layout_of(made)[1], "draft.layers.1.mlp.down")
    manifest = json.loads((root / "manifest.json").read_text())
    digests = {"sha256": sha256_file(path), "sample": sample_of(path)}
    manifest["files"]["onnx/weights.bin"].update(digests)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_judges_the_drafter(made, damaged, engine):
    """A device whose drafts are others fails, though what the model says is right."""
    with runtime.load(made, engine) as session:
        parity = verify(session)
    assert parity.passed and parity.draft.drafts == 9 and parity.draft.max_abs < 0.01
    assert parity.draft.top1 == parity.draft.common == 1.0
    with runtime.load(damaged, engine) as session:
        found = verify(session)
        # The drafter is asked at the same places and leaves what the model says alone.
        assert session.stats.draft_runs == 9 and found.max_abs == parity.max_abs
    assert not found.passed and not found.draft.passed
    assert found.draft.max_kl > 10 * found.draft.limit_kl


def test_the_command_line_tells_of_the_drafter(made, damaged):
    assert "drafts of its assistant: max |Δlogit|" in good("verify", made).stdout
    data = json.loads(good("verify", made, "--json").stdout)
    assert data["draft"]["drafts"] == 9 and data["passed"]
    result = invoke("verify", damaged)
    assert result.exit_code == 1 and "drafts of its assistant: max" in result.stderr
    shown = good("inspect", made).stdout
    assert "drafts, lowering" in shown and "not recorded" not in shown


def test_artifacts_from_before_the_drafter_was_judged_run_and_say_so(made, tmp_path):
    root = tmp_path / "old"
    shutil.copytree(made, root)
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["parity"].values():
        del entry["draft"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with runtime.load(root, "onnx") as session:
        assert len(list(generate(session, range(9, 19), max_new_tokens=4, drafts=2))) == 4
        assert session.stats.draft_runs and verify(session).draft is None
    assert "no reference drafts are recorded" in good("verify", root).stdout
    assert "was not recorded" in good("inspect", root).stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("draft_logits"),
        lambda a: a.update(draft_logits=a["draft_logits"][:, :7]),
        lambda a: a.update(draft_tokens=a["draft_tokens"].astype(np.float32)),
        lambda a: a.update(draft_steps=a["draft_steps"] + 20),
        lambda a: a.update(draft_steps=a["draft_steps"][::-1]),
        lambda a: a.update(draft_steps=np.zeros(0, np.int32)),
        lambda a: a.update(draft_steps=np.array([["x"]])),
        lambda a: a.pop("draft_tokens"),
    ],
)
def test_reference_drafts_that_make_no_sense(made, tmp_path, change):
    root = tmp_path / "edited"
    shutil.copytree(made, root)
    with np.load(root / "verify.npz") as held:
        arrays = dict(held)
    change(arrays)
    np.savez(root / "verify.npz", **arrays)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["verify.npz"]["size"] = (root / "verify.npz").stat().st_size
    (root / "manifest.json").write_text(json.dumps(manifest))
    with (
        runtime.load(root, "onnx") as session,
        pytest.raises(ArtifactError, match=r"reference vectors.*export again"),
    ):
        verify(session)


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_the_gate_refuses_a_wrong_drafter_on_both_engines(made, damaged, pair, engine):
    """The programs over weights in another order, against the drafter as it is stored."""
    plan = read_artifact(made).plan
    run = gate.plan_run(plan, 2048, None, drafter=True)

    def answers(root):
        with runtime.load(root, engine) as session:
            return gate.replay(session, run)

    right, wrong = answers(made), answers(damaged)
    np.testing.assert_array_equal(right.logits, wrong.logits)
    weights, read = Weights(models.weights(pair.target.config, pair.config)), reads(pair)
    of = oracle(
        pair.target.config, weights, read, torch.from_numpy(run.ids),
        token_values=table_values(pair.target.config, pair.target.read),
    )  # fmt: skip
    places = [range(run.prompt + b.start, run.prompt + b.stop) for b in run.bursts]
    wanted = oracle_drafts(pair.config, weights, read, of, places)

    def judged(drafts):
        return gate.judge_drafts(
            plan, exact=drafts, shipped=drafts, stored=wanted, source=wanted, lossless=True,
            moved=lambda: wanted,
        )  # fmt: skip

    assert judged(right.drafts)["lowering"]["max_abs"] < NEAR
    with pytest.raises(ParityError, match="The exported drafter differs from the assistant"):
        judged(wrong.drafts)


def reads(pair):
    return lambda name, a, b: torch.from_numpy(pair.source(name).read(name, a, b))


def test_an_export_with_a_wrong_program_leaves_nothing(tmp_path, monkeypatch):
    """A drafter that is lowered with another way of taking itself up."""
    made = lower_onnx.make_net

    def wrong(config, weights):
        net = made(config, weights)
        if models.is_drafter(config):
            inner = net.carry
            net.carry = lambda y: -inner(y)
        return net

    monkeypatch.setattr(lower_onnx, "make_net", wrong)
    with pytest.raises(ParityError, match="The exported drafter differs from the assistant"):
        export(tmp_path / "a", kv="int8", quant="int4")
    assert not list(tmp_path.iterdir())


def test_an_export_with_wrong_weights_leaves_nothing(tmp_path, monkeypatch):
    """A matrix of the drafter that was written in another order: the programs agree with it."""

    def written(source, layout, path, *rest):
        write_weights(source, layout, path, *rest)
        roll_rows(path, layout, "draft.layers.2.attn.q")

    monkeypatch.setattr(pipeline, "write_weights", written)
    with pytest.raises(ParityError, match="The stored weights of the drafter are not those"):
        export(tmp_path / "a", kv="f32", quant="none")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "least"), [("int4", 0.99), ("int8", 0.999)])
def test_every_matrix_of_the_drafter_counts(tmp_path, pair, scheme, least):
    """Stored as float weights are, it is that drafter; with the rows of any one matrix in another
    order it is not, by the limit of the gate."""
    target = pair.target.config
    drafter = open_drafter("random:1", target, {})[1]  # drawn in floats
    whole, rows = Paired(pair.target, drafter), models.weights(target, pair.config)
    layout = WeightLayout(rows, weight_formats(scheme))
    path = tmp_path / "weights.bin"
    write_weights(whole, layout, path, Journal(tmp_path / "journal"), Silent())
    ids = torch.from_numpy(np.random.default_rng(6).integers(0, 2048, 90))
    packed, stored = PackedWeights(rows, layout), StoredWeights(layout, path)
    of = oracle(target, packed, stored.read, ids, token_values=table_values(target, whole.read))
    places = [range(at, at + 3) for at in (66, 75, 87)]
    drafts = oracle_drafts(pair.config, packed, stored.read, of, places)

    def agreement(changed=""):
        def read(name, a, b):
            values = torch.from_numpy(whole.read(name))
            return (values.roll(len(values) // 2, 0) if name == changed else values)[a:b]

        found = oracle_drafts(pair.config, Weights(rows), read, of, places)
        common = draft_divergence(found, drafts).common
        return gate.agreement(found, drafts) if common >= gate.COMMON_TOKENS else 0.0

    assert agreement() > least
    matrices = [w.name for w in models.weights(pair.config) if len(w.shape) == 2]
    assert len(matrices) == 24
    for name in (*matrices, "draft.order"):
        assert agreement(name) < gate.AGREEMENT_OF_DRAFTS, name


def test_a_state_that_is_taken_up_has_no_hidden_state(made, tmp_path):
    with runtime.load(made, "onnx") as session:
        session.prefill(range(10, 14))
        session.decode(14)
        assert session.hidden.shape == (128,)
        copy = session.copy()
        session.snapshot(tmp_path / "s")
        session.put_back(copy)
        assert session.hidden is None
        session.decode(15)
        session.restore(tmp_path / "s")
        assert session.hidden is None
        with pytest.raises(RuntimeFault, match="nothing was fed"):
            session.reset()
            session.draft(3, np.zeros(128, np.float32))


def test_the_manifest_says_what_a_draft_reads(made):
    manifest = read_artifact(made).manifest
    target = models.get_row("tiny").config
    drafter = models.official_drafter(target).config
    assert manifest.drafter.width == target.hidden
    assert manifest.drafter.read == read_by_draft(drafter, "none") > 0
    assert manifest.made["drafter"]["reads"] == [2, 2, 2, 3]
    alone, both = count_needs(target, "none"), count_needs(target, "none", drafter=drafter)
    added = sum(4 * w.elements for w in models.weights(drafter)) + 4 * target.vocab  # order: i64
    assert both.weight_file - alone.weight_file == both.dense - alone.dense == added
    assert both.read_weights == alone.read_weights and both.prefill == alone.prefill
    read = manifest.backends["onnx"].programs["draft"]
    tables = {f"l{i}.{n}" for i in (2, 3) for n in "kv"}
    assert {t.name for t in read.inputs} == {"ids", "pos", "hidden", *tables}


def test_every_published_pair_is_counted():
    for name in ("e2b", "e4b", "12b", "26b-a4b", "31b"):
        target = models.get_row(name).config
        drafter = models.official_drafter(target).config
        plan = models.plan(target, ctx=4096)
        read = models.drafter_plan(drafter, plan).tables
        assert {t.writer for t in read} == set(drafter.reads)
        assert len(read) == 6  # two of each, and scales of the int8 ones
        share = read_by_draft(drafter) / count_needs(target).read_weights
        assert share < 0.15


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m["drafter"].update(width=96), "'hidden'"),
        (lambda m: m["backends"]["onnx"]["programs"]["draft"]["outputs"].pop(), "disagree"),
        (
            lambda m: m["backends"]["onnx"]["programs"]["draft"].update(file="onnx/decode.onnx"),
            "disagree",
        ),
        (lambda m: m["drafter"].update(width=0), "not a valid manifest"),
    ],
)
def test_edited_manifests_are_refused(made, tmp_path, change, what):
    root = tmp_path / "edited"
    shutil.copytree(made, root)
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=what):
        runtime.load(root, "onnx").close()


def test_an_artifact_without_a_drafter_says_so(tmp_path, made):
    root = tmp_path / "plain"
    shutil.copytree(made, root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["drafter"] = None
    (root / "manifest.json").write_text(json.dumps(manifest))
    with runtime.load(root, "onnx") as session:
        session.decode(5)
        assert not session.has_drafter and session.hidden is None
        with pytest.raises(RuntimeFault, match="has no drafter for engine onnx"):
            session.draft(3, np.zeros(128, np.float32))


def test_what_is_not_of_this_target_is_refused_early(tmp_path):
    wanted = {"ctx": 64, "out": tmp_path / "x", "open_session": runtime.load}
    with pytest.raises(ConfigError, match="No assistant is known"):
        export_model(model="gemma3-270m", weights="random", assistant="random", **wanted)
    with pytest.raises(ConfigError, match="do not check drafts"):
        export_model(
            model="tiny", assistant="random", backends=("executorch",), attention="portable",
            **wanted,
        )  # fmt: skip
    other = replace(models.get_row("tiny").config, hidden=64)
    with pytest.raises(ConfigError, match="No assistant is known"):
        open_drafter("random", other, {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_text_with_its_drafts_is_plain_text(made, engine, monkeypatch):
    """Greedy ids are those of plain decoding, whether none of the drafts are right or all."""
    prompt, new = list(range(100, 130)), 45

    def said(session, drafts, trace=None):
        session.reset()
        return list(generate(session, prompt, max_new_tokens=new, drafts=drafts, trace=trace))

    with runtime.load(made, engine) as session:
        plain = said(session, "off")
        assert session.stats.draft_runs == 0
        trace = Trace()
        assert said(session, Speculation(Assistant(session), fixed=3), trace) == plain
        assert session.stats.draft_runs == trace.drafted > new  # but for the first pass
        run, bursts = session._run_draft, []

        def right(token, hidden, pos):
            """The drafter's answer, all of its candidates being the token that will come."""
            draft = run(token, hidden, pos)
            bursts.append(pos)
            place = pos - len(prompt) + bursts.count(pos)
            comes = (plain + [0] * 9)[place]
            return replace(draft, tokens=np.full(len(draft.logits), comes))

        monkeypatch.setattr(session, "_run_draft", right)
        trace = Trace()
        assert said(session, Speculation(Assistant(session), fixed=3), trace) == plain
        assert trace.drafted == trace.accepted and trace.passes <= 2 + new // 4


@pytest.mark.parametrize("drafts", [1, 4, 7, "auto"])
@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_the_text_drafts_beside_the_drafter(made, engine, drafts):
    """Where a prompt has been said before, the text is asked, else the drafter; ids stay plain."""
    rng = np.random.default_rng(8)
    fresh, said_before = rng.integers(5, 2048, 40).tolist(), [7, *range(300, 340)] * 2
    with runtime.load(made, engine) as session:
        for prompt, copied in ((fresh, False), (said_before[:-8], True)):
            trace = Trace()
            session.reset()
            plain = list(generate(session, prompt, max_new_tokens=40, drafts="off"))
            before, runs = session.stats.drafted_tokens, session.stats.draft_runs
            session.reset()
            found = generate(session, prompt, max_new_tokens=40, drafts=drafts, trace=trace)
            assert list(found) == plain
            assert session.stats.drafted_tokens - before == trace.drafted
            if drafts != "auto":  # how many that feeds is a matter of time
                by_the_model = session.stats.draft_runs - runs
                assert 0 < by_the_model <= trace.drafted - copied
