"""Evaluation: perplexity, divergence and the worst tokens, against figures made by hand."""

import json

import numpy as np
import pytest
from fake_artifact import VOCAB, NumpySession, Toy, oracle, write_artifact
from typer.testing import CliRunner

from edge_kv.artifact import read_artifact
from edge_kv.cli import app
from edge_kv.errors import PromptError
from edge_kv.runtime.evaluate import WORST, evaluate, windows


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    root = write_artifact(tmp_path_factory.mktemp("eval") / "a", programs=False)
    return NumpySession(read_artifact(root))


def log_p(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def by_hand(session, cuts):
    """Log-probabilities before each predicted token, and those tokens, without any session."""
    toy = Toy.of(session.artifact)
    targets = [t for cut in cuts for t in cut[1:]]
    rows = [
        log_p(oracle(toy, session.plan, cut[: i + 1])) for cut in cuts for i in range(len(cut) - 1)
    ]
    return np.stack(rows), targets


def test_windows_begin_with_the_start_token_and_predict_every_token_once():
    assert list(windows(range(10, 17), 2, 4)) == [
        [2, 10, 11, 12], [2, 13, 14, 15], [2, 16]
    ]  # fmt: skip
    assert list(windows(range(10, 15), None, 3)) == [[10, 11, 12], [13, 14]]
    assert list(windows([], 2, 4)) == []


def test_perplexity_is_that_of_the_model_alone(session):
    ids = np.random.default_rng(0).integers(5, VOCAB, 40).tolist()
    seen = []
    found = evaluate(session, ids, bos=2, window=16, on_token=lambda *at: seen.append(at))
    rows, targets = by_hand(session, list(windows(ids, 2, 16)))
    losses = -rows[np.arange(len(targets)), targets]
    assert (found.tokens, found.windows, found.window) == (40, 3, 16)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert found.against is None and seen[-1] == (40, 40) and len(seen) == 40


def test_windows_are_no_longer_than_the_context(session):
    ids = np.random.default_rng(1).integers(5, VOCAB, 100).tolist()
    found = evaluate(session, ids, bos=2, window=4096)
    assert found.window == session.plan.ctx == 64 and found.windows == 2


def test_divergence_and_worst_tokens_against_a_reference(session):
    ids = np.random.default_rng(2).integers(5, VOCAB, 30).tolist()
    cuts = list(windows(ids, 2, 16))
    rows, targets = by_hand(session, cuts)
    noise = np.random.default_rng(3).normal(size=rows.shape)
    floats = np.stack([log_p(r) for r in rows + noise])
    given = iter(floats)

    def reference(cut):
        return [next(given).astype(np.float32) + 7 for _ in cut[1:]]  # a constant changes nothing

    found = evaluate(session, ids, bos=2, window=16, reference=reference).against
    kl = (np.exp(floats) * (floats - rows)).sum(-1)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-3)
    assert found.top1 == pytest.approx((floats.argmax(-1) == rows.argmax(-1)).mean())
    expected = np.exp(-floats[np.arange(len(targets)), targets].mean())
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert [m.at for m in found.worst] == np.argsort(-kl)[:WORST].tolist()
    assert [m.token for m in found.worst] == [targets[m.at] for m in found.worst]
    assert all(m.reference_likeliest == floats[m.at].argmax() for m in found.worst)


def test_a_text_without_tokens_is_refused(session):
    with pytest.raises(PromptError, match="0 tokens has nothing to predict"):
        evaluate(session, [], bos=2)


def run(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def test_command_compares_with_the_checkpoint_it_was_made_from(exact_artifact, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("And it came to pass in those days, that the waters were abated. " * 2)
    args = (exact_artifact, "--text", text, "--tokens", 20, "--threads", 1, "--against")
    weights = "edge_kv/data/tiny"
    result = run(*args, weights, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["tokens"] == 20 and data["checkpoint"] == weights
    # Floats on both sides: another order of summation is all that differs.
    assert data["against"]["mean_kl"] < 1e-6 and data["against"]["top1"] == 1
    assert data["perplexity"] == pytest.approx(data["against"]["perplexity"], rel=1e-4)
    assert len(data["against"]["worst"]) == WORST and data["against"]["worst"][0]["text"]
    shown = run(*args, weights)
    assert "Perplexity" in shown.stdout and "Float checkpoint" in shown.stdout
    assert run(exact_artifact, "--text", tmp_path / "none").exit_code == 1
