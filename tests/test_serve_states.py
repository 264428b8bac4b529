"""Conversations kept in memory: what they begin with alike is there once, and none loses a row."""

from itertools import accumulate

import numpy as np
import pytest
from fake_artifact import NumpySession, write_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kv.artifact import read_artifact
from edge_kv.memory import TOKEN_BYTES
from edge_kv.plan import Plan, Sizes
from edge_kv.runtime import load
from edge_kv.runtime.chat import Generator
from edge_kv.runtime.generation import feed, generate
from edge_kv.runtime.huge_pages import FilledState
from edge_kv.runtime.session import BLOCK, STORAGE, bytes_of
from edge_kv.serve.states import States

CTX, CHUNK, WINDOW = 640, 16, 5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("states") / "a"
    return read_artifact(write_artifact(root, ctx=CTX, programs=False, verify=False))


class Telling(NumpySession):
    """Every row tells all tokens up to the newest one that it stands for, finished or not."""

    def __init__(self, artifact):
        super().__init__(artifact)
        sizes = Sizes(CTX, CHUNK, "int8")
        kinds = {
            "full": {},
            "ring": {"keep": WINDOW},
            "fours": {"stride": 4},
            "long": {"stride": 96},
        }
        tables = [
            sizes.table(n, (1, 3), layer=i, **kind) for i, (n, kind) in enumerate(kinds.items())
        ]
        self.plan = Plan.of(tables, sizes)
        self.state = {t.name: np.zeros(t.shape, STORAGE[t.dtype]) for t in self.plan.tables}
        self._filled = FilledState(self.plan)

    def _write(self, ids, pos):
        sums = told([*self.tokens, *ids.tolist()])[pos:]
        for t in self.plan.tables:
            rows = np.arange(pos, pos + len(ids)) // t.stride % t.slots
            self.state[t.name][rows] = shown(t, sums)  # of a row that comes twice: the last

    def check(self):
        """All rows that `tokens` need are those of a session that read them from the beginning."""
        sums = told(self.tokens)
        for t in self.plan.tables:
            rows = np.array(t.held(self.pos, self.written), int)
            want = shown(t, sums[(rows + 1) * t.stride - 1])
            assert (self.state[t.name][rows % t.slots] == want).all(), t.name


def told(tokens):
    """A number for each token that follows from all tokens up to it."""
    sums = accumulate(tokens, lambda told, token: (told * 31 + token) % (1 << 24), initial=7)
    return np.array([*sums][1:], int)


def shown(table, told):
    return (told % 251 - 125 if table.dtype == "int8" else told)[:, None, None]


def text(seed, count):
    return [(seed + 7 * i) % 250 + 2 for i in range(count)]


SYSTEM = text(1, 3 * BLOCK + 20)


def block_bytes(plan, blocks=1):
    rows = [(t, BLOCK * blocks // t.stride) for t in plan.tables if not t.keep]
    return sum(t.row_bytes * count for t, count in rows)


def naive_bytes(plan, copies):
    """What `bytes_of` is to find, counted by tokens."""
    pieces = {}
    for copy in copies:
        full = len(copy.tokens) // BLOCK * BLOCK
        for end in range(BLOCK, full + 1, BLOCK):
            pieces[copy.tokens[:end]] = sum(
                t.row_bytes * (end // t.stride - (end - BLOCK) // t.stride)
                for t in plan.tables if not t.keep
            )  # fmt: skip
        pieces[id(copy)] = sum(
            t.row_bytes
            * (
                len(t.held(len(copy.tokens), copy.written))
                - (full // t.stride if not t.keep else 0)
            )
            for t in plan.tables
        )
        for point in copy.checkpoints:
            pieces[id(point)] = sum(map(len, point.rows))
    return sum(pieces.values())


moves = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "go on", "copy", "put back", "drop", "rewind"]),
        st.integers(0, 5),
        st.integers(1, 2 * BLOCK + 9),
    ),
    min_size=4,
    max_size=16,
)


@settings(deadline=None, max_examples=40)
@given(moves)
def test_shared_copies_are_as_good_as_plain_ones(artifact, moves):
    session, kept = Telling(artifact), []
    for move, which, count in moves:
        other = kept[which % len(kept)] if kept else None
        if move == "read":
            session.resume(ids := [*SYSTEM[: which * 50], *text(which + count, count)])
            feed(session, ids, [which * 50])
        elif move == "go on" and session.pos + count <= CTX:
            session.prefill(text(count, count))
        elif move == "rewind":
            session.rewind(min(which, session.max_rewind))
        elif move == "copy":
            want = bytes_of(kept) + session.copy_bytes(kept)
            kept.append(session.copy(kept))
            assert bytes_of(kept) == want == naive_bytes(session.plan, kept)
        elif move == "put back" and other:
            session.put_back(other)
            assert (session.tokens, session.written) == (other.tokens, other.written)
            assert session.own_checkpoints() == other.checkpoints
        elif move == "drop" and other:
            kept.remove(other)
        session.check()
    for copy in kept:  # whatever was dropped between
        session.reset()
        session.put_back(copy)
        session.check()
        for point in copy.checkpoints:
            session.put_back(copy)
            assert session.resume(point.tokens) == len(point.tokens)
            session.check()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=3, max_size=12),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(2_000, 30_000)),
)
def test_any_order_of_conversations_within_any_ram(artifact, order, most, ram):
    session = Telling(artifact)
    states = States(Generator(session), None, most, ram)
    copy, peaks = session.copy, [0]

    def watched(beside):
        made = copy(beside)
        peaks.append(
            bytes_of([*beside, made]) + sum(TOKEN_BYTES * len(c.tokens) for c in (*beside, made))
        )
        return made

    session.copy = watched
    for system, user in order:
        begins = SYSTEM[: system * 70]
        ids = [*begins, *text(10 * system + user, 90)]
        states.enter(ids)
        session.check()
        feed(session, ids, [len(begins)])
        session.check()
        assert states.count <= most and states.ram == states.bytes
        assert ram is None or max(peaks) <= ram


def test_a_system_prompt_is_in_memory_once(artifact):
    session = Telling(artifact)
    states = States(Generator(session))
    talks = [[*SYSTEM, *text(seed, 100)] for seed in range(20, 24)]
    for talk in talks:
        states.enter(talk)
        feed(session, talk, [len(SYSTEM)])
    assert states.count == 3
    rings = sum(t.bytes for t in session.plan.tables if t.keep)
    own = block_bytes(session.plan, 3)  # of 120 tokens that no other has, at most
    shared = block_bytes(session.plan, 3)
    assert shared < states.bytes - 3 * TOKEN_BYTES * len(talks[0]) < shared + 3 * (own + 2 * rings)
    before = states.bytes
    states._drop(states._kept[0])
    assert block_bytes(session.plan) < before - states.bytes < before // 3
    for talk in (*talks[1:], talks[0]):
        states.enter(talk)
        assert len(SYSTEM) <= session.pos
        feed(session, talk, [len(SYSTEM)])
        session.check()
    assert states.restored == 3  # the one that was dropped began where the others do


def test_what_the_session_holds_stays_where_it_is(artifact):
    session = Telling(artifact)
    feed(session, [*SYSTEM, *text(30, 90)])
    kept = session.copy()
    session.reset()
    feed(session, [*SYSTEM, *text(40, 90)])
    session.state["full"][0] += 1  # it shows who wrote it
    session.put_back(kept)
    with pytest.raises(AssertionError, match="full"):
        session.check()
    session.state["full"][0] -= 1
    session.check()
    session.reset()  # nothing is known to be there
    session.state["full"][:] = 0
    session.put_back(kept)
    session.check()


def test_an_interrupt_leaves_nothing_half_put_back(artifact, monkeypatch):
    session = Telling(artifact)
    feed(session, text(30, 200), [150])
    kept = session.copy()
    session.reset()
    feed(session, text(40, 200), [150])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_kv.runtime.snapshot.ring_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.put_back(kept)
    assert session.resume(text(40, 200)) == 0 == session.pos  # its rows were written over
    session.put_back(kept)
    session.check()


def test_one_system_prompt_gives_every_conversation_its_own_reply(exact_artifact):
    system = text(1, 2 * BLOCK + 5)
    with load(exact_artifact, "onnx") as session, load(exact_artifact, "onnx") as fresh:
        states = States(Generator(session))
        talks = [[*system, *text(seed, BLOCK + 3)] for seed in (20, 30, 40)]
        for question in ([], [9, 8, 7], [6, 5]):
            for talk in talks:
                talk += question
                states.enter(talk)
                feed(session, talk[:-1], [len(system)])
                reply = list(generate(session, talk, max_new_tokens=6))
                fresh.reset()
                assert reply == list(generate(fresh, talk, max_new_tokens=6))
                talk += reply
        assert states.restored == 6
