"""Session rules that no engine decides: chunks, rewinds, interrupts, refusals."""

import json

import numpy as np
import pytest
from fake_artifact import VOCAB, NumpySession, edit_manifest, oracle, write_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kv.artifact import read_artifact
from edge_kv.errors import ContextFullError, PromptError, RewindError, RuntimeFault


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    base = tmp_path_factory.mktemp("artifacts")
    return {
        kv: read_artifact(write_artifact(base / kv, kv=kv, programs=False, verify=False))
        for kv in ("f32", "f16", "int8")
    }


@pytest.fixture
def session(artifacts):
    with NumpySession(artifacts["f32"]) as session:
        yield session


moves = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.lists(st.integers(0, VOCAB - 1), max_size=12)),
        st.tuples(st.just("decode"), st.integers(0, VOCAB - 1)),
        st.tuples(
            st.just("decode_many"), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3)
        ),
        st.tuples(st.just("rewind"), st.integers(0, 30)),
        st.tuples(
            st.just("interrupt"), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
        ),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(moves, st.sampled_from(["f32", "int8"]))
def test_any_history_gives_the_logits_of_its_tokens(artifacts, moves, kv):
    """Whatever was fed, rewound, interrupted: logits depend on `tokens` alone."""
    session = NumpySession(artifacts[kv])
    fed: list[int] = []
    for move, value in moves:
        room = session.plan.ctx - session.pos
        if move == "prefill" and len(value) <= room:
            session.prefill(value)
            fed += value
        elif move == "decode" and room:
            got = session.decode(value)
            fed.append(value)
            want = oracle(session.toy, session.plan, fed)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        elif move == "decode_many" and len(value) <= room:
            for token, got in zip(value, session.decode_many(value), strict=True):
                fed.append(token)
                want = oracle(session.toy, session.plan, fed)
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        elif move == "rewind" and value <= session.max_rewind:
            session.rewind(value)
            fed = fed[: len(fed) - value]
        elif move == "rewind" and value != session.pos:
            with pytest.raises(RewindError):
                session.rewind(value)
        elif move == "interrupt" and len(value) <= room:
            session.fail = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                session.prefill(value)
            session.fail = None
        elif move == "reset":
            session.reset()
            fed = []
        assert session.tokens == tuple(fed) and session.pos == len(fed)
        assert session.pos <= session.written <= session.plan.ctx


def test_prefill_splits_into_chunks_and_takes_any_length(artifacts):
    seen = []

    class Spy(NumpySession):
        def _run_prefill(self, ids, pos):
            seen.append((pos, len(ids)))
            super()._run_prefill(ids, pos)

    session = Spy(artifacts["f32"])
    session.prefill([])
    session.prefill(np.arange(7, dtype=np.int32))
    session.prefill(iter([1]))
    assert seen == [(0, 3), (3, 3), (6, 1), (7, 1)]
    assert session.stats.prefill_tokens == 8


def test_interrupt_keeps_the_finished_chunks(artifacts):
    session = NumpySession(artifacts["f32"])
    real = session._write

    def interrupted(ids, pos):
        real(ids, pos)
        if pos >= 3:
            raise KeyboardInterrupt

    session._write = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.prefill(range(9))
    assert session.tokens == (0, 1, 2)
    session._write = real
    session.prefill(range(3, 20))
    np.testing.assert_allclose(
        session.decode(5), oracle(session.toy, session.plan, [*range(20), 5]), rtol=1e-4, atol=1e-4
    )


def test_rewind_says_how_far_it_can_go(session):
    session.prefill(range(20))  # rings: 5 + 3 - 1 = 7 slots, so 3 back
    assert session.max_rewind == 3
    with pytest.raises(RewindError, match=r"Cannot rewind 4 tokens from position 20.*reach back 3"):
        session.rewind(4)
    with pytest.raises(RewindError):
        session.rewind(-1)
    session.rewind(3)
    assert session.pos == 17 and session.written == 20 and session.max_rewind == 0
    session.prefill([1, 2])
    assert session.max_rewind == 2
    session.rewind(19)  # to 0: a fresh start, always possible
    assert session.written == 0


def test_a_refused_draft_is_taken_back_after_any_pass(session):
    session.prefill(range(20))
    passes, fed = session.stats.decode_passes, list(range(20))
    for token in range(30, 45):
        session.decode_many([token, 1, 2])  # 7 slots for a window of 5: two may be other rows
        session.rewind(2)
        fed.append(token)
    np.testing.assert_allclose(
        session.decode(5), oracle(session.toy, session.plan, [*fed, 5]), rtol=1e-4, atol=1e-4
    )
    assert session.stats.decode_passes - passes == 16 and session.stats.decode_tokens == 46


def test_what_rounding_may_turn_round_is_what_the_gate_measured(tmp_path):
    root = write_artifact(tmp_path / "a", programs=False)
    stored = json.loads((root / "manifest.json").read_text())["parity"]
    stored["onnx"]["lowering"]["max_abs"] = 0.25
    for change, rounding in (({}, 0.5), ({"lead_change": 0.75}, 2.25), ({"lead_change": 0.0}, 0.0)):
        edit_manifest(root, parity={"onnx": {**stored["onnx"], **change}})
        with NumpySession(read_artifact(root)) as session:
            assert session.rounding == rounding
    edit_manifest(root, parity={})
    with NumpySession(read_artifact(root)) as session:
        assert session.rounding == 0.0


def test_a_pass_takes_as_many_tokens_as_were_exported(session):
    for ids in ([], [1, 2, 3, 4]):
        with pytest.raises(PromptError, match=f"A pass takes 1 … 3 tokens, not {len(ids)}"):
            session.decode_many(ids)
    session.prefill([1] * 62)
    with pytest.raises(ContextFullError):
        session.decode_many([1, 2, 3])
    assert session.pos == 62


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([VOCAB], f"Token id {VOCAB} at index 0 is outside 0 … {VOCAB - 1}"),
        ([3, -1], "Token id -1 at index 1"),
        ([1.5], "whole numbers"),
        ([[1, 2]], "flat list"),
        (["a"], "whole numbers"),
        ([True], "whole numbers"),
    ],
)
def test_ids_that_are_no_ids(session, ids, message):
    with pytest.raises(PromptError, match=message):
        session.prefill(ids)
    assert session.pos == 0 and session.written == 0


def test_context_full_names_ctx_and_leaves_the_session_usable(session):
    session.prefill(range(60))
    with pytest.raises(ContextFullError, match=r"5 more tokens .* position 60 .* context of 64"):
        session.prefill(range(5))
    session.prefill(range(3))
    session.decode(1)
    with pytest.raises(ContextFullError, match="--ctx"):
        session.decode(1)
    session.rewind(1)
    session.decode(2)


def test_closed_session_refuses_everything(artifacts):
    session = NumpySession(artifacts["f32"])
    session.close()
    for use in (
        lambda: session.prefill([1]),
        lambda: session.decode(1),
        lambda: session.rewind(0),
        session.reset,
        lambda: session.snapshot("x"),
        lambda: session.restore("x"),
    ):
        with pytest.raises(RuntimeFault, match="closed"):
            use()
    assert session.closed and not session.state


def test_state_has_the_plans_shapes_and_is_page_aligned_and_zero(artifacts):
    for kv, dtype in (("f32", np.float32), ("f16", np.float16), ("int8", np.int8)):
        session = NumpySession(artifacts[kv])
        assert list(session.state) == [b.name for b in session.plan.tables]
        for b in session.plan.tables:
            array = session.state[b.name]
            assert array.shape == b.shape and array.nbytes == b.bytes
            assert array.ctypes.data % 4096 == 0 and not array.any()
        assert session.state["l1.k"].dtype == dtype


def test_stats_count_steps(session):
    session.prefill(range(4))
    session.decode(1)
    session.decode(2)
    stats = session.stats
    assert (stats.prefill_tokens, stats.decode_tokens, len(stats.latencies)) == (4, 2, 2)
    assert 0 < stats.latency(50) <= stats.latency(95) <= stats.decode_seconds
    assert stats.decode_rate == 2 / stats.decode_seconds and stats.kv_bytes == session.plan.bytes
