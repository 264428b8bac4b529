"""generate: stops, limits, prefix reuse, and what a full context does."""

import numpy as np
import pytest
from fake_artifact import VOCAB, NumpySession, oracle, write_artifact

from edge_kv.artifact import read_artifact
from edge_kv.errors import ConfigError, ContextFullError, PromptError
from edge_kv.runtime import generate, generation, load
from edge_kv.runtime.generation import Trace, feed
from edge_kv.runtime.session import CHECKPOINTS, bytes_of
from edge_kv.runtime.speculation import Guess, PromptLookup, Speculation


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate") / "a"
    return read_artifact(write_artifact(root, programs=False, verify=False))


@pytest.fixture
def session(artifact):
    return NumpySession(artifact)


def naive(session, ids, n, stop=()):
    """Greedy continuation from scratch by the stateless oracle."""
    ids = list(ids)
    out = []
    while len(out) < n and len(ids) <= session.plan.ctx:
        token = int(oracle(session.toy, session.plan, ids).argmax())
        if token in stop:
            break
        out.append(token)
        ids.append(token)
    return out


def test_greedy_equals_the_oracle(session):
    assert list(generate(session, [2, 9, 40, 77], max_new_tokens=20)) == naive(
        session, [2, 9, 40, 77], 20
    )


def test_the_last_prompt_token_is_decoded_and_the_last_new_one_is_not_fed(session):
    out = list(generate(session, [2, 9, 40], max_new_tokens=3))
    assert session.tokens == (2, 9, 40, *out[:-1])
    assert session.stats.prefill_tokens == 2 and session.stats.decode_tokens == 3


def test_stop_ids_end_it_and_are_not_yielded(session):
    prompts = ([2, 9, 40, n] for n in range(VOCAB))
    prompt, free = next((p, f) for p in prompts if len(set(f := naive(session, p, 20))) > 1)
    stop = next(t for t in free if t != free[0])
    got = list(generate(session, prompt, max_new_tokens=20, stop=[stop]))
    assert got == free[: free.index(stop)] and got


def test_no_tokens_wanted_no_work_done(session):
    assert list(generate(session, [2], max_new_tokens=0)) == []
    assert session.stats.decode_tokens == session.pos == 0


def test_sampling_is_seeded_by_the_call(session):
    def draw(seed):
        session.reset()
        return list(generate(session, [2, 9], max_new_tokens=12, temperature=5.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)


def test_a_longer_prompt_reuses_what_was_read(session):
    first = [2, *range(10, 30)]
    out = list(generate(session, first, max_new_tokens=5))
    second = [*first, *out, 90, 91, 92]
    before = session.stats.prefill_tokens
    assert list(generate(session, second, max_new_tokens=5)) == naive(session, second, 5)
    assert session.stats.prefill_tokens - before == 3  # the last reply token and all but 92


def test_a_prompt_that_differs_late_rewinds(session):
    first = [2, *range(10, 30)]
    list(generate(session, first, max_new_tokens=1))
    second = [*first[:-1], 99]
    before = session.stats.prefill_tokens
    assert list(generate(session, second, max_new_tokens=4)) == naive(session, second, 4)
    assert session.stats.prefill_tokens == before


def test_a_prompt_that_differs_too_early_starts_over(session):
    first = [2, *range(10, 30)]
    list(generate(session, first, max_new_tokens=1))
    second = [2, *range(10, 20), 5, *range(21, 30)]
    before = session.stats.prefill_tokens
    assert list(generate(session, second, max_new_tokens=4)) == naive(session, second, 4)
    assert session.stats.prefill_tokens - before == len(second) - 1


def test_the_same_prompt_again_costs_one_step(session):
    prompt = [2, *range(10, 30)]
    want = list(generate(session, prompt, max_new_tokens=1))
    before = session.stats.prefill_tokens
    assert list(generate(session, prompt, max_new_tokens=1)) == want
    assert session.stats.prefill_tokens == before


def test_full_context_stops(session):
    prompt = list(range(60))
    out = list(generate(session, prompt, max_new_tokens=50))
    assert out == naive(session, prompt, 50) and len(out) == 5  # 64 - 60, and one not fed
    assert session.pos == 64


def test_full_context_errors_when_asked_to(session):
    tokens = generate(session, range(62), max_new_tokens=50, on_full="error")
    assert len([next(tokens), next(tokens), next(tokens)]) == 3
    with pytest.raises(ContextFullError, match="context of 64 tokens is full after 3 new ones"):
        next(tokens)


def test_full_context_slides_and_says_what_it_forgot(session):
    slides = []
    prompt = list(range(60))
    out = list(
        generate(
            session, prompt, max_new_tokens=80, on_full="slide", keep_first=4,
            on_slide=slides.append,
        )
    )  # fmt: skip
    assert len(out) == 80 and len(slides) == 3
    first = slides[0]
    assert (first.kept_first, first.forgotten, first.kept_last) == (4, 31, 30)
    history = prompt + out[:5]
    kept = history[:4] + history[-30:]
    assert out[5:12] == naive(session, kept, 7)
    assert session.tokens[:4] == (0, 1, 2, 3)


def test_prompt_longer_than_the_context(session):
    with pytest.raises(ContextFullError, match="prompt has 65 tokens, the context 64"):
        generate(session, range(65), max_new_tokens=1)
    slides = []
    out = list(
        generate(session, range(100), max_new_tokens=3, on_full="slide", on_slide=slides.append)
    )
    assert out == naive(session, [0, *range(69, 100)], 3) and slides[0].forgotten == 68


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ids": []}, PromptError, "prompt is empty"),
        ({"on_full": "slid"}, ConfigError, "Did you mean 'slide'"),
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens -1"),
        ({"on_full": "slide", "keep_first": 63}, ConfigError, "keep_first 63"),
        ({"top_p": 7}, ConfigError, "top_p 7"),
    ],
)
def test_arguments_are_checked_before_any_work(session, kwargs, error, message):
    arguments = {"ids": [1], "max_new_tokens": 1, **kwargs}
    with pytest.raises(error, match=message):
        generate(session, arguments.pop("ids"), **arguments)


def test_ids_out_of_range_leave_the_session_clean(session):
    with pytest.raises(PromptError, match="outside 0"):
        list(generate(session, [1, VOCAB, 2], max_new_tokens=1))
    assert session.pos == 0


def test_stopping_half_way_leaves_a_session_that_goes_on(session):
    tokens = generate(session, [2, 3, 4], max_new_tokens=50)
    some = [next(tokens) for _ in range(4)]
    tokens.close()
    prompt = [2, 3, 4, *some, 11]
    assert list(generate(session, prompt, max_new_tokens=4)) == naive(session, prompt, 4)


def test_real_engine_agrees_with_the_oracle(tmp_path):
    root = write_artifact(tmp_path / "a", kv="int8")
    with load(root, threads=1) as session, NumpySession(read_artifact(root)) as toy:
        got = list(generate(session, [2, 9, 40, 77], max_new_tokens=40))
        assert got == naive(toy, [2, 9, 40, 77], 40)
        np.testing.assert_array_equal(session.tokens, [2, 9, 40, 77, *got[:-1]])


def test_engine_typo(artifact):
    with pytest.raises(ConfigError, match=r"Unknown engine 'onx'. Did you mean 'onnx'"):
        load(artifact, engine="onx")


@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_go_back_to_what_was_read(session, seed):
    """Random conversations that branch: what is decoded is the oracle's, whatever was reused."""
    rng = np.random.default_rng(seed)
    history = [2]
    reused = read = 0
    for _ in range(30):
        cut = int(rng.integers(1, len(history) + 1))
        history = [*history[:cut], *rng.integers(5, VOCAB, int(rng.integers(1, 12))).tolist()][:60]
        marks = rng.integers(1, len(history) + 1, 2).tolist()
        held = feed(session, history, marks)
        assert session.tokens == tuple(history) and held <= len(history)
        reused, read = reused + held, read + len(history) - held
        token = int(rng.integers(5, VOCAB))
        wanted = oracle(session.toy, session.plan, [*history, token])
        np.testing.assert_allclose(session.decode(token), wanted, atol=1e-4)
        if rng.random() < 0.2:
            session.reset()
    assert reused > read / 4


def test_a_checkpoint_beats_starting_over(session):
    head, tail = list(range(10, 30)), list(range(40, 60))
    feed(session, head + tail, [len(head)])
    assert feed(session, [*head, 99], ()) == len(head)
    assert feed(session, head + tail, ()) == len(head)  # its rows are there still
    session.reset()
    assert feed(session, head, ()) == len(head)
    assert feed(session, [7, 8, 9], ()) == 0
    assert feed(session, head, ()) == 0  # overwritten


def test_checkpoints_are_few_and_keep_the_first(session):
    feed(session, list(range(10, 60)), range(5, 50, 5))
    kept = [len(c.tokens) for c in session._checkpoints]
    assert len(kept) == CHECKPOINTS and kept[0] == 5 and kept[-1] == 45
    rings = [b for b in session.plan.tables if b.keep]
    for c in session._checkpoints:
        assert sum(map(len, c.rows)) <= sum(b.bytes for b in rings)


def test_long_prompts_keep_rings_on_the_way_and_turns_come_first(session, monkeypatch):
    monkeypatch.setattr(generation, "CHECKPOINT_TOKENS", 8)
    prompt = [2, *range(10, 61)]
    feed(session, prompt, [len(prompt)])
    kept = [len(c.tokens) for c in session._checkpoints]
    assert len(kept) == CHECKPOINTS and kept[-1] == len(prompt)
    branch = [*prompt[:45], 200, 201]  # the long turn goes on otherwise
    held = feed(session, branch, [len(branch)])
    assert held == max(k for k in kept if k <= 45) > 8
    wanted = oracle(session.toy, session.plan, [*branch, 9])
    np.testing.assert_allclose(session.decode(9), wanted, atol=1e-4)
    session.reset()
    for turn in (10, 20):
        feed(session, prompt[:turn], [turn])
    feed(session, prompt, [len(prompt)])  # what is read on the way takes no turn's place
    assert [len(c.tokens) for c in session._checkpoints] == [10, 20, len(prompt)]
    session.reset()
    feed(session, [5, *prompt[1:]])  # none without a turn: nobody comes back
    assert not session.own_checkpoints()


def test_a_cancelled_prompt_stops_between_chunks_and_keeps_what_it_read(session):
    prompt = [2, *range(10, 60)]
    asked = []

    def cancelled():
        asked.append(session.pos)
        return len(asked) > 3

    trace = Trace()
    assert list(generate(session, prompt, max_new_tokens=5, cancelled=cancelled, trace=trace)) == []
    chunk = session.plan.chunk
    assert trace.finish == "cancelled" and list(session.tokens) == prompt[: 3 * chunk]
    before = session.stats.prefill_tokens
    assert list(generate(session, prompt, max_new_tokens=5)) == naive(session, prompt, 5)
    assert session.stats.prefill_tokens - before == len(prompt) - 1 - 3 * chunk


def test_a_cancelled_reply_ends_after_its_token(session):
    trace, out = Trace(), []
    for token in generate(
        session, [2, 9], max_new_tokens=50, cancelled=lambda: len(out) == 4, trace=trace
    ):
        out.append(token)
    assert len(out) == 4 and trace.finish == "cancelled"


def test_a_copy_brings_back_rows_and_checkpoints(session):
    first, other = [2, *range(10, 40)], [2, *range(90, 140)]
    feed(session, first, [20])
    kept = session.copy()
    assert bytes_of([kept]) == session.copy_bytes() > 0
    feed(session, other)
    session.put_back(kept)
    assert list(session.tokens) == first
    assert list(generate(session, first, max_new_tokens=5)) == naive(session, first, 5)
    session.put_back(kept)
    branch = [*first[:20], 5, 6, 7]
    assert session.reusable(branch) == 20  # far behind what the rings rewind
    assert list(generate(session, branch, max_new_tokens=5)) == naive(session, branch, 5)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """An artifact whose passes take up to seven drafts."""
    root = tmp_path_factory.mktemp("drafts") / "a"
    return read_artifact(write_artifact(root, chunk=9, drafts=7, programs=False, verify=False))


class Peeks:
    """A drafter that knows what will come, and is wrong now and then."""

    costly = False
    kinds = (0.5,)

    def __init__(self, rng, text):
        self.rng, self.text, self.at = rng, text, 0

    def begin(self, history):
        pass

    def guess(self, history, most):
        self.at = max(self.at, len(history))
        ids = list(self.text[len(history) : len(history) + most])
        if ids and self.rng.random() < 0.5:
            ids[int(self.rng.integers(len(ids)))] = int(self.rng.integers(VOCAB))
        return Guess(tuple(ids), (0,) * len(ids))


class Multiples:
    """Allows ids whose sum so far, with them, is no multiple of three; no more as the end nears."""

    def __init__(self):
        self.total = 0
        self.lefts = []

    def mask(self, logits, left):
        self.lefts.append(left)
        ids = self.total + np.arange(len(logits))
        return np.where((ids % 3 != 0) | (left < 3), logits, np.float32(-np.inf))

    def accept(self, token):
        self.total += token

    def possible(self, ids):
        sums = self.total + np.cumsum(ids)
        return next((i for i, s in enumerate(sums) if s % 3 == 0), len(ids))


def schedule(rng):
    """Arguments of a few calls that go on from each other, and after how many ids each is left."""
    calls = []
    for _ in range(5):
        letters = rng.integers(5, VOCAB, 4)
        greedy = rng.random() < 0.4
        logprobs = int(rng.integers(3)) if rng.random() < 0.4 else None
        calls.append((
            rng.choice(letters, int(rng.integers(1, 40))).tolist(),
            {
                "max_new_tokens": int(rng.integers(0, 70)),
                "temperature": 0.0 if greedy else float(rng.choice([0.05, 0.7])),
                "top_k": int(rng.choice([0, 3])),
                "top_p": float(rng.choice([1.0, 0.8])),
                "repetition_penalty": float(rng.choice([1.0, 1.0, 1.3])),
                "frequency_penalty": float(rng.choice([0.0, 0.0, 0.6])),
                "presence_penalty": float(rng.choice([0.0, 0.0, 0.9])),
                "seed": int(rng.integers(100)),
                "stop": set(rng.integers(5, VOCAB, int(rng.integers(0, 12))).tolist()),
                "on_full": str(rng.choice(["stop", "slide", "error"])),
                "logit_bias": {int(letters[0]): 1.5} if rng.random() < 0.3 else None,
                "suppress": {int(letters[1])} if rng.random() < 0.3 else (),
                "logprobs": logprobs,
                "checkpoints": {3},
            },
            rng.random() < 0.3,  # constrained
            int(rng.integers(1, 40)) if rng.random() < 0.3 else None,  # cancelled after so many
            int(rng.integers(1, 40)) if rng.random() < 0.3 else None,  # closed after so many
        ))  # fmt: skip
    return calls


def carried_out(session, calls, drafts_of):
    """What each call gave, how it ended, and what the session then held."""
    results, history = [], [2]
    for n, (turn, arguments, constrained, cancelled, closed) in enumerate(calls):
        trace, slides, out = Trace(), [], []
        constraint = Multiples() if constrained else None
        prompt = [*history, *turn][: session.plan.ctx - 3]
        tokens = generate(
            session, prompt, **arguments, trace=trace, on_slide=slides.append, keep_first=2,
            constraint=constraint, drafts=drafts_of(n, prompt),
            cancelled=(lambda out=out, most=cancelled: len(out) >= most) if cancelled else None,
        )  # fmt: skip
        try:
            for token in tokens:
                out.append(token)
                if len(out) == closed:
                    tokens.close()
        except ContextFullError as e:
            trace.finish = str(e)
        history = [*prompt, *out][: int(session.plan.ctx * 0.7)]
        results.append({
            "prompt": prompt, "ids": out, "finish": trace.finish, "logprobs": trace.logprobs,
            "slides": slides, "tokens": session.tokens, "lefts": constraint and constraint.lefts,
            "trace": trace,
        })  # fmt: skip
    return results


def assert_same(plain, drafted):
    for a, b in zip(plain, drafted, strict=True):
        for name in ("ids", "finish", "slides", "tokens", "lefts"):
            assert a[name] == b[name], name
        for p, q in zip(a["logprobs"], b["logprobs"], strict=True):
            assert p.id == q.id and [i for i, _ in p.top] == [i for i, _ in q.top]
            np.testing.assert_allclose(p.logprob, q.logprob, atol=1e-5)
            np.testing.assert_allclose([v for _, v in p.top], [v for _, v in q.top], atol=1e-5)


@pytest.mark.parametrize("seed", range(24))
def test_drafts_change_nothing_but_the_passes(drafting, seed):
    """Sampling, stops, limits, slides, constraints, cancelling: as without drafts."""
    calls = schedule(np.random.default_rng(seed))
    plain = carried_out(NumpySession(drafting), calls, lambda n, prompt: "off")
    rng = np.random.default_rng(seed)

    def peeking(n, prompt):
        slid = bool(plain[n]["slides"])
        text = [] if slid else [*prompt, *plain[n]["ids"], 7, 8]
        return Speculation(Peeks(rng, text), fixed=int(rng.integers(1, 8)))

    lookup = Speculation(PromptLookup(drafting.plan.ctx))
    session = NumpySession(drafting)
    for drafts_of in (peeking, lambda n, prompt: 7, lambda n, prompt: lookup):
        session.reset()
        drafted = carried_out(session, calls, drafts_of)
        assert_same(plain, drafted)
        for one in drafted:
            trace = one["trace"]
            assert trace.drafted >= trace.accepted >= 0
            assert trace.passes + trace.accepted >= len(one["ids"])


def test_what_was_right_costs_no_pass(drafting):
    session = NumpySession(drafting)
    prompt = [2, 9, 40, 77]
    plain = list(generate(session, prompt, max_new_tokens=40, drafts="off"))
    assert session.stats.decode_passes == 40 and session.stats.tokens_per_pass == 1
    session = NumpySession(drafting)
    drafter = Peeks(np.random.default_rng(0), [*prompt, *plain])
    drafter.rng = None  # never wrong: not asked
    drafter.guess = lambda history, most: Guess(
        tuple(drafter.text[len(history) : len(history) + most]),
        (0,) * min(most, len(drafter.text) - len(history)),
    )
    trace = Trace()
    drafts = Speculation(drafter, fixed=7)
    assert list(generate(session, prompt, max_new_tokens=40, drafts=drafts, trace=trace)) == plain
    assert (trace.passes, trace.drafted, trace.accepted) == (5, 35, 35)
    stats = session.stats
    assert (stats.decode_passes, stats.drafted_tokens, stats.accepted_tokens) == (5, 35, 35)
    assert stats.tokens_per_pass == 8


def test_an_iterator_that_was_left_does_not_touch_what_came_after(drafting):
    """A generation that nobody goes on with ends while the session reads something else."""
    session = NumpySession(drafting)
    prompt = [2, 9, 9, 9, 9, 9]
    left = generate(session, prompt, max_new_tokens=40, drafts=7)
    next(left)
    other = list(range(20, 20 + session.pos))
    session.reset()
    feed(session, other)
    left.close()
    assert list(session.tokens) == other
    left = generate(session, prompt, max_new_tokens=40, drafts=7)
    next(left)
    session.close()
    left.close()


@pytest.mark.parametrize(
    ("drafts", "message"),
    [
        ("aut", "must be auto, off or a number"),
        (8, "8 drafts are outside 0 … 7"),
        ("-1", "-1 drafts are outside 0 … 7"),
    ],
)
def test_drafts_are_checked(drafting, drafts, message):
    with pytest.raises(ConfigError, match=message):
        generate(NumpySession(drafting), [1], max_new_tokens=1, drafts=drafts)


def test_near_choices_are_counted(drafting):
    """Logits closer than the rounding of two programs: the choice is one of two right ones."""

    class Even(NumpySession):
        rounding = 0.1

        def _run_decode(self, ids, pos):
            logits = np.zeros((len(ids), VOCAB), np.float32)
            logits[:, 9] = 1.0
            logits[np.arange(pos, pos + len(ids)) % 5 == 0, 8] = 0.95
            return logits

    trace = Trace()
    out = list(generate(Even(drafting), [9] * 6, max_new_tokens=20, drafts=7, trace=trace))
    assert out == [9] * 20 and trace.ties == 4  # positions 5, 10, 15 and 20
    list(generate(Even(drafting), [9] * 6, max_new_tokens=20, drafts="off", trace=(t := Trace())))
    assert t.ties == 0
