"""Tables of state: no query misses a row, rewinds are honest, bytes are what the shapes say."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_kv.errors import PlanError
from edge_kv.plan import LIVE_STEP, Plan, Sizes

sizes = st.builds(
    lambda ctx, chunk, kv: Sizes(ctx, min(ctx, chunk), kv),
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from(("f32", "f16", "int8")),
)
kinds = st.one_of(
    st.tuples(st.just(1), st.sampled_from((0, 2, 3, 5, 8, 20))),
    st.tuples(st.sampled_from((2, 4, 7)), st.just(0)),
)  # (stride, keep)


def lay_out(sizes, kinds):
    tables = [
        sizes.table(f"t{i}", (1, 3), layer=i, stride=stride, keep=keep)
        for i, (stride, keep) in enumerate(kinds)
    ]
    return Plan.of(tables, sizes)


class Memory:
    """Which row each slot of a table holds, and how complete it was when it was written."""

    def __init__(self, table):
        self.table, self.held = table, {}

    def step(self, pos, n):
        """Write what a step of n tokens at pos writes, inside the bound slots."""
        first = pos // self.table.stride
        for row in range(first, first + (n + self.table.stride - 2) // self.table.stride + 1):
            slot = row % self.table.slots
            assert slot < self.table.live(pos + n)
            self.held[slot] = (row, min(pos + n, (row + 1) * self.table.stride))

    def sees(self, p):
        """The rows a query at p may see, by the definition of a table."""
        t = self.table
        rows = range((p + 1) // t.stride)
        return [r for r in rows if not t.keep or p - r < t.keep]

    def has(self, row):
        slot = row % self.table.slots
        return self.held.get(slot) == (row, (row + 1) * self.table.stride)


moves = st.lists(st.tuples(st.sampled_from("wwr"), st.integers(1, 20)), max_size=25)


@given(sizes, st.lists(kinds, min_size=1, max_size=4), moves)
def test_every_query_finds_its_rows_and_rewinds_are_allowed_exactly_then(sizes, kinds, moves):
    plan = lay_out(sizes, kinds)
    memories = [Memory(t) for t in plan.tables]
    pos = written = 0
    for move, n in moves:
        if move == "r":
            to = max(0, pos - n)
            found = all(m.has(r) for m in memories for r in m.sees(to) if r < to // m.table.stride)
            allowed = plan.can_rewind(to, written)
            # Rows rewritten after a rewind may be there again; that is not relied upon.
            assert allowed == found if pos == written else found or not allowed
            pos = to if allowed else pos
        else:
            n = min(n, plan.chunk, plan.ctx - pos)
            if n == 0:
                continue
            for m in memories:
                m.step(pos, n)
                for p in range(pos, pos + n):
                    # rows of the prompt before a rewind are rewritten as they are passed again
                    assert all(m.has(r) for r in m.sees(p))
            pos += n
            written = max(written, pos)
    for m in memories:
        for row in m.table.held(pos, written):
            assert m.has(row) and (row + 1) * m.table.stride <= pos


@given(sizes, kinds)
def test_live_rows_are_steps_up_to_all_slots(sizes, kind):
    table = lay_out(sizes, [kind]).tables[0]
    lives = [table.live(end) for end in range(1, sizes.ctx + 1)]
    assert lives == sorted(lives)
    assert all(n == table.slots or n % LIVE_STEP == 0 for n in lives)


@given(sizes, kinds, st.integers(1, 60))
def test_bytes_follow_from_shapes(sizes, kind, depth):
    plan = lay_out(sizes, [kind])
    table = plan.tables[0]
    depth = min(depth, sizes.ctx)
    size = {"f32": 4, "f16": 2, "int8": 1}[table.dtype]
    scale = 4 if table.dtype == "int8" else 0
    assert (table.dtype == "int8") == (sizes.kv == "int8" and not table.keep)
    assert plan.bytes == table.slots * (3 * size + scale)
    rows = min(-(-depth // table.stride), table.slots)
    assert plan.touched(depth) == rows * (3 * size + scale)
    seen = len(Memory(table).sees(depth - 1))
    assert plan.read_traffic(depth) == seen * (3 * size + scale)


def test_picked_rows_bound_what_is_read():
    sizes = Sizes(1024, 8, "f32")
    plan = Plan.of([sizes.table("t", (1, 2), layer=0, stride=4, picks=16, readers=(0, 2))], sizes)
    assert plan.read_traffic(1024) == 2 * 16 * 8
    assert plan.read_traffic(32) == 2 * 8 * 8


def test_full_length_baselines_undo_sharing_and_rings():
    sizes = Sizes(100, 1, "f16")
    tables = [
        sizes.table("k", (1, 4), layer=0, readers=(0, 1)),
        sizes.table("w", (2, 4), layer=1, keep=10),
        sizes.table("raw", (1, 4), layer=1, keep=3, exact=True),
        sizes.table("blocks", (1, 4), layer=1, stride=4),
    ]
    plan = Plan.of(tables, sizes)
    assert plan.full_length() == 2 * 100 * 8 + 100 * 16
    assert plan.full_length(sharing=True) == 100 * 8 + 100 * 16
    assert plan.full_length(rings=True) == 2 * 100 * 8 + 10 * 16 + 26 * 8


BROKEN = [
    ({"slots": 7}, "has 7 slots"),
    ({"stride": 4, "keep": 2}, "stride 1"),
    ({"row": (0, 3)}, "positive"),
    ({"dtype": "f8"}, "unknown type"),
    ({"readers": ()}, "before layer 3 writes"),
    ({"readers": (2,)}, "before layer 3 writes"),
]


@pytest.mark.parametrize("change, message", BROKEN, ids=[m for _, m in BROKEN])
def test_a_plan_that_could_lose_rows_is_refused(change, message):
    sizes = Sizes(20, 4, "f32")
    table = sizes.table("t", (1, 3), layer=3, keep=5)
    assert table.slots == 8
    with pytest.raises(PlanError, match=message):
        Plan.of([dataclasses.replace(table, **change)], sizes)


def test_other_faults_of_plans_are_refused():
    sizes = Sizes(20, 4, "int8")
    table = sizes.table("t", (1, 3), layer=0)
    with pytest.raises(PlanError, match="planned twice"):
        Plan.of([table, table], sizes)
    with pytest.raises(PlanError, match=r"t\.scale is missing"):
        Plan(20, 4, "int8", (table,)).validate()
    with pytest.raises(PlanError, match="chunk 21"):
        Plan.of([], Sizes(20, 21, "f32"))
    with pytest.raises(PlanError, match="Did you mean 'int8'"):
        Sizes(20, 4, "int9")
