"""Drafts on real engines: greedy text is plain text, samples are drawn as the model says.

The programs of tiny are as they ship, with 4-bit weights, 8-bit activations and an 8-bit state;
those of families whose state has other tables are all in floats. What is refused is then behind
wraps of rings, edges of blocks that were complete, and tails of convolutions.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import tiny_models

from edge_kv import runtime
from edge_kv.export import export_model
from edge_kv.parity import lead
from edge_kv.runtime.generation import Trace, generate
from edge_kv.runtime.speculation import Guess, Speculation

CTX, CHUNK = 200, 16  # windows of 64: rings of 79 slots wrap twice
ENGINES = ("onnx", "executorch")
SHIPPED = {"model": "tiny", "quant": "int4", "kv": "int8"}
FLOATS = {"quant": "none", "kv": "f32"}


def exported(folder, **how):
    return export_model(
        ctx=CTX, chunk=CHUNK, calibration="none", backends=ENGINES, out=folder / "made",
        open_session=runtime.load, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("drafts"), **SHIPPED)


@pytest.fixture(scope="module", params=["tiny", *tiny_models.FEWEST])
def made(request, tmp_path_factory):
    if request.param == "tiny":
        return request.getfixturevalue("shipped")
    folder = tmp_path_factory.mktemp(request.param)
    cut = tiny_models.tiny(request.param, **tiny_models.FEWEST[request.param])
    cut.save_pretrained(folder / "hf")
    return exported(folder, weights=str(folder / "hf"), **FLOATS)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def session(made, engine):
    with runtime.load(made, engine, threads=1) as opened:
        yield opened


def drawn(session, count=21):
    """A prompt of random ids, the same at every call."""
    return np.random.default_rng(2).integers(3, session.artifact.tokens.vocab, count).tolist()


class Forced:
    """Guesses what `choose` says of every length of the history."""

    costly = False
    kinds = (0.5,)

    def __init__(self, choose):
        self.choose = choose

    def begin(self, history):
        pass

    def guess(self, history, most):
        ids = tuple(self.choose(len(history) + i) for i in range(most))
        return Guess(ids, (0,) * most)


def often_right(text, seed):
    """Three of four drafts are what comes; others are any id."""
    rng = np.random.default_rng(seed)

    def choose(at):
        wrong = at >= len(text) or rng.random() < 0.25
        return int(rng.integers(max(text))) if wrong else text[at]

    return Forced(choose)


def assert_plain(session, text, plain, ties):
    """`text` is `plain`, or leaves it at a choice that was counted as one of two right ones."""
    if text == plain:
        return
    at = next(i for i, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b)
    assert ties, f"differs at {at}, where no tie was counted"
    session.reset()
    session.prefill(plain[: at - 1])
    logits = session.decode(plain[at - 1])
    assert lead(logits, plain[at]) < session.rounding, f"differs at {at}, which is no tie"


@pytest.fixture(scope="module")
def plain(session):
    """A prompt and all ids that fit behind it, decoded one by one."""
    return said(session, drawn(session), "off")


def said(session, prompt, drafts, trace=None):
    """The prompt and all ids that fit behind it."""
    session.reset()
    new = CTX - len(prompt)
    return [*prompt, *generate(session, prompt, max_new_tokens=new, drafts=drafts, trace=trace)]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_greedy_text_is_plain_text(session, plain, count):
    """To the end of the context: over wraps of the rings and refused drafts behind them."""
    trace = Trace()
    text = said(session, drawn(session), Speculation(often_right(plain, count), fixed=count), trace)
    assert len(text) == CTX and trace.drafted > trace.accepted > CTX // 5
    assert_plain(session, text, plain, trace.ties)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_what_the_text_drafts_is_taken_and_refused(session, count):
    """A prompt that says itself again, three ids changed: its continuation is guessed from it."""
    prompt = drawn(session, 40)
    prompt += [*prompt[:20], *drawn(session, 3), *prompt[20:32]]
    plain, trace = said(session, prompt, "off"), Trace()
    text = said(session, prompt, count, trace)
    assert 0 < trace.accepted < trace.drafted
    assert_plain(session, text, plain, trace.ties)


@pytest.mark.parametrize("at", [22, 63, 64, 80, 150])
def test_a_text_goes_on_after_a_snapshot_and_a_rewind(session, plain, tmp_path, at):
    """Taken amid drafts that were refused; other text stands in between."""
    ties = 0

    def go_on(history, until):
        nonlocal ties
        trace = Trace()
        ids = generate(
            session, history, max_new_tokens=until - len(history), trace=trace,
            drafts=Speculation(often_right(plain, at), fixed=5),
        )  # fmt: skip
        found = [*history, *ids]
        ties += trace.ties
        return found

    session.reset()
    text = go_on(drawn(session), at)
    session.snapshot(tmp_path / "s")
    list(generate(session, drawn(session)[::-1], max_new_tokens=90, drafts=3))
    session.restore(tmp_path / "s")
    text = go_on(text, min(at + 40, CTX))
    session.rewind(14)
    text = go_on(text[: session.pos + 1], CTX)
    assert_plain(session, text, plain, ties)


def shares(logits, temperature):
    """Probability of each of the three likeliest ids."""
    best = np.argsort(-logits, kind="stable")[:3]
    p = np.exp((logits[best] - logits[best[0]]).astype(np.float64) / temperature)
    return dict(zip(best.tolist(), p / p.sum(), strict=True))


def pairs(session, prompt, temperature):
    """Probability of every pair of ids behind the prompt, by plain decoding."""
    session.reset()
    session.prefill(prompt[:-1])
    found = {}
    for first, p in shares(session.decode(prompt[-1]), temperature).items():
        for second, q in shares(session.decode(first), temperature).items():
            found[first, second] = p * q
        session.rewind(1)
    return found


def distance(counts, expected, samples):
    """Pearson's chi-square of the counts, and the value that one run in ten thousand exceeds
    (Wilson and Hilferty's approximation)."""
    likely = {pair: p for pair, p in expected.items() if p * samples >= 5}
    rest = max(1 - sum(likely.values()), 1e-9)
    others = samples - sum(counts.get(pair, 0) for pair in likely)
    found = sum((counts.get(c, 0) - p * samples) ** 2 / (p * samples) for c, p in likely.items())
    found += (others - rest * samples) ** 2 / max(rest * samples, 1.0)
    freedom = len(likely)
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + NormalDist().inv_cdf(1 - 1e-4) * spread**0.5) ** 3
    return found, limit


@pytest.fixture(scope="module")
def tiny(shipped, engine):
    with runtime.load(shipped, engine, threads=1) as opened:
        yield opened


def test_samples_are_drawn_as_the_model_says(tiny):
    """Pairs of ids, the second of which comes from behind a draft wherever the first was one."""
    session, prompt = tiny, drawn(tiny)
    samples, temperature = 500, 1.5
    expected = pairs(session, prompt, temperature)
    rng = np.random.default_rng(8)
    firsts, seconds = (sorted({pair[i] for pair in expected}) for i in (0, 1))
    # Drafts of even chances among what may come: right as often as not, whatever is likeliest.
    forced = Forced(lambda at: int(rng.choice(firsts if at == len(prompt) else seconds)))
    drafts, counts, drafted, accepted = Speculation(forced, fixed=1), {}, 0, 0
    for seed in range(samples):
        trace = Trace()
        pair = tuple(generate(
            session, prompt, max_new_tokens=2, temperature=temperature, top_k=3, seed=seed,
            drafts=drafts, trace=trace,
        ))  # fmt: skip
        counts[pair] = counts.get(pair, 0) + 1
        drafted, accepted = drafted + trace.drafted, accepted + trace.accepted
    assert set(counts) <= set(expected)
    assert samples // 5 < accepted < drafted == samples
    found, limit = distance(counts, expected, samples)
    assert found < limit
    found, limit = distance(counts, pairs(session, prompt, 1.0), samples)
    assert found > limit  # the counts are enough to tell another distribution
