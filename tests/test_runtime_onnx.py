"""OnnxSession over a hand-made artifact: binding in place, prefix views, rewinds, bad files."""

import numpy as np
import pytest
from fake_artifact import VOCAB, Toy, edit_manifest, oracle, write_artifact

from edge_kv.artifact import read_artifact
from edge_kv.errors import ArtifactError, ConfigError, RewindError, RuntimeFault
from edge_kv.manifest import UNFINISHED
from edge_kv.runtime.onnx_session import OnnxSession


def ids_for(n, seed=3):
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def check(session, toy, ids):
    """Feed `ids`, the last ones in one pass."""
    n = min(len(ids), session.drafts + 1)
    session.prefill(ids[:-n])
    got = session.decode_many(ids[-n:])
    for i, row in enumerate(got):
        want = oracle(toy, session.plan, session.tokens[: session.pos - n + i + 1])
        np.testing.assert_allclose(row, want, rtol=2e-5, atol=2e-5)
    session.rewind(1)
    np.testing.assert_allclose(session.decode(ids[-1]), got[-1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("ple", [True, False])
def test_logits_equal_the_oracle_past_ring_wraps_and_live_steps(tmp_path, kv, ple):
    artifact = read_artifact(write_artifact(tmp_path / "a", ctx=600, chunk=7, kv=kv, ple=ple))
    toy = Toy.of(artifact)
    with OnnxSession(artifact, threads=1) as session:
        for n in (1, 2, 9, 30, 210, 4, 3, 260, 81):  # 600 in all; live is 256, 512, then 600
            check(session, toy, ids_for(n, seed=n))
        assert session.pos == 600


def test_state_is_updated_in_place(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    with OnnxSession(artifact, threads=1) as session:
        session.prefill(ids_for(12))
        session.decode(5)
        rows = Toy.of(artifact).rows(np.array([5]), 1)
        np.testing.assert_array_equal(session.state["l1.k"][12], rows[0])


def test_an_unfinished_artifact_is_held_one_program_at_a_time(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    files = {
        n: f.model_copy(update={"sha256": UNFINISHED}) for n, f in artifact.manifest.files.items()
    }
    artifact.manifest = artifact.manifest.model_copy(update={"files": files})
    toy = Toy.of(artifact)
    with OnnxSession(artifact, threads=1) as session:
        for n, held in ((12, "decode"), (9, "decode")):
            check(session, toy, ids_for(n, seed=n))
            assert list(session._bound) == [held]
        session.prefill(ids_for(3))
        assert list(session._bound) == ["prefill"]


def test_rewind_and_other_continuations_match_the_oracle(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    toy = Toy.of(artifact)
    with OnnxSession(artifact, threads=1) as session:
        check(session, toy, ids_for(20))
        session.rewind(2)
        check(session, toy, ids_for(2, seed=9))
        with pytest.raises(RewindError, match="reach back"):
            session.rewind(9)
        session.reset()
        check(session, toy, ids_for(11, seed=4))


def test_logits_are_a_fresh_array_each_time(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    with OnnxSession(artifact, threads=1) as session:
        first = session.decode(1)
        kept = first.copy()
        second = session.decode(2)
        assert not np.shares_memory(first, second)
        np.testing.assert_array_equal(first, kept)
        assert first.dtype == np.float32 and first.shape == (VOCAB,)


def test_closed_session_says_so(tmp_path):
    session = OnnxSession(read_artifact(write_artifact(tmp_path / "a")), threads=1)
    session.close()
    session.close()
    with pytest.raises(RuntimeFault, match="closed"):
        session.decode(1)


def test_threads_below_one_are_refused(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    with pytest.raises(ConfigError, match="threads 0"):
        OnnxSession(artifact, threads=0)


def test_graph_that_is_not_onnx_is_one_sentence(tmp_path):
    root = write_artifact(tmp_path / "a")
    path = root / "onnx/decode.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"decode.onnx has SHA-256") as e:
        OnnxSession(read_artifact(root), threads=1)
    assert "\n" not in str(e.value)


def test_graph_of_another_plan_is_refused(tmp_path):
    root = write_artifact(tmp_path / "a")
    other = read_artifact(write_artifact(tmp_path / "b", ple=False))
    backends = other.manifest.model_dump(mode="json")["backends"]
    for name in ("prefill", "decode"):
        (root / f"onnx/{name}.onnx").write_bytes((other.root / f"onnx/{name}.onnx").read_bytes())
    files = read_artifact(other.root).manifest.model_dump(mode="json")["files"]
    files["ple.bin"] = {"size": (root / "ple.bin").stat().st_size, "sha256": "0" * 64}
    edit_manifest(root, backends=backends, files=files)
    with pytest.raises(ArtifactError, match="per-layer rows"):
        read_artifact(root)


def test_graph_of_another_window_is_refused(tmp_path):
    root = write_artifact(tmp_path / "a")
    other = read_artifact(write_artifact(tmp_path / "b", window=6)).manifest
    edit_manifest(root, plan=other.plan.model_dump(mode="json"))
    with pytest.raises(ArtifactError, match=r"has 'l0.k' as \[7, 2, 4\], its plan has \[8, 2, 4"):
        OnnxSession(read_artifact(root), threads=1)


def test_manifest_and_graph_must_agree(tmp_path):
    root = write_artifact(tmp_path / "a")
    backends = read_artifact(root).manifest.model_dump(mode="json")["backends"]
    backends["onnx"]["programs"]["decode"]["inputs"][0]["dtype"] = "int8"
    edit_manifest(root, backends=backends)
    with pytest.raises(ArtifactError, match="disagree about 'ids'"):
        OnnxSession(read_artifact(root), threads=1)


def test_engine_that_was_not_exported_is_named(tmp_path):
    artifact = read_artifact(write_artifact(tmp_path / "a", programs=False))
    with pytest.raises(ArtifactError, match="no programs for 'onnx'"):
        OnnxSession(artifact, threads=1)
