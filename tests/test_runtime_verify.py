"""verify: the stored reference logits, computed again on this machine."""

import json

import numpy as np
import pytest
from fake_artifact import VOCAB, NumpySession, edit_manifest, write_artifact

from edge_kv.artifact import read_artifact, sha256_file
from edge_kv.errors import ArtifactError
from edge_kv.runtime.onnx_session import OnnxSession
from edge_kv.runtime.verify import verify


def replace_vectors(root, **arrays):
    """Change arrays of verify.npz and let the manifest know."""
    path = root / "verify.npz"
    with np.load(path) as old:
        np.savez(path, **{**old, **arrays})
    files = json.loads((root / "manifest.json").read_text())["files"]
    files["verify.npz"] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    edit_manifest(root, files=files)


@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_an_untouched_artifact_passes(tmp_path, kv):
    steps = []
    with OnnxSession(read_artifact(write_artifact(tmp_path / "a", kv=kv)), threads=1) as session:
        session.prefill([1, 2, 3])
        parity = verify(session, lambda done, total: steps.append((done, total)))
    assert parity.passed and parity.top1 == 1 and parity.max_abs < 1e-4
    assert steps == [(i, 13) for i in range(1, 14)] and parity.steps == 13


def test_other_logits_fail_with_their_divergence(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False, drafts=0)
    with np.load(root / "verify.npz") as arrays:
        logits = arrays["logits"].copy()
    shifted = logits.copy()
    shifted[:, 0] += 3
    replace_vectors(root, logits=shifted)
    parity = verify(NumpySession(read_artifact(root)))
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (shifted.astype(float), logits))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kl = (p * np.log(p / q)).sum(-1)
    assert not parity.passed and abs(parity.max_abs - 3) < 1e-3
    np.testing.assert_allclose([parity.mean_kl, parity.max_kl], [kl.mean(), kl.max()], rtol=1e-3)


def test_a_constant_added_to_all_logits_is_the_same_distribution(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    with np.load(root / "verify.npz") as arrays:
        replace_vectors(root, logits=arrays["logits"] + 5)
    parity = verify(NumpySession(read_artifact(root)))
    assert parity.passed and parity.max_abs > 4.9


def test_passes_of_several_tokens_that_differ_fail(tmp_path):
    session = NumpySession(read_artifact(write_artifact(tmp_path / "a", programs=False)))
    decode = session._run_decode

    def shifted(ids, pos):
        logits = decode(ids, pos)
        logits[2:, 0] += 3
        return logits

    session._run_decode = shifted
    parity = verify(session)
    assert not parity.passed and parity.max_kl > 10 * parity.mean_kl > 0


def test_nan_does_not_pass(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    session = NumpySession(read_artifact(root))
    session._run_decode = lambda ids, pos: np.full((len(ids), VOCAB), np.nan, np.float32)
    assert not verify(session).passed


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": np.zeros((2, 3), np.float32)}, "are .* logits for 13 steps"),
        ({"prompt": np.int64(30)}, "for 0 steps"),
        ({"prompt": np.int64(-1)}, "logits for 31 steps"),
        ({"ids": np.array(["a", "b"])}, "cannot be read"),
        ({"ids": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_vectors_that_make_no_sense(tmp_path, arrays, message):
    root = write_artifact(tmp_path / "a", programs=False)
    replace_vectors(root, **arrays)
    with pytest.raises(ArtifactError, match=message):
        verify(NumpySession(read_artifact(root)))


def test_missing_or_broken_vectors(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    artifact = read_artifact(root)
    path = root / "verify.npz"
    path.write_bytes(b"PK\3\4" + bytes(path.stat().st_size - 4))
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify(NumpySession(artifact))
    edit_manifest(root, parity={})
    with pytest.raises(ArtifactError, match="no reference vectors"):
        verify(NumpySession(read_artifact(root)))
