"""The plan's promises: no query misses a key, rewinds are honest, published totals are met."""

import dataclasses
import random

import pytest
from fake_artifact import make_config
from hypothesis import given
from hypothesis import strategies as st

from edge_kv.amounts import parse_size
from edge_kv.config import AttentionSpec, ModelConfig
from edge_kv.errors import ConfigError, PlanError
from edge_kv.kv_plan import APPEND, LIVE_STEP, RING, plan_kv, state_elements, state_views
from edge_kv.presets import PRESETS


class Slots:
    """A buffer that remembers which position each slot holds."""

    def __init__(self, plan, kind):
        self.slots = plan.ring_slots if kind == RING else plan.ctx
        self.held = {}

    def write(self, pos, n):
        for p in range(pos, pos + n):
            self.held[p % self.slots] = p

    def has(self, p):
        return self.held.get(p % self.slots) == p


def missing(plan, slots, pos, n):
    """Window positions that some query of the chunk [pos, pos+n) cannot find."""
    return [
        p
        for q in range(pos, pos + n)
        for p in range(max(0, q - plan.window + 1), q + 1)
        if not slots.has(p)
    ]


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 16))  # ctx, chunk, window


@given(sizes, st.randoms(use_true_random=False))
def test_every_key_of_every_query_is_there(size, rng):
    ctx, chunk, window = size
    plan = plan_kv(make_config(window), ctx=ctx, chunk=chunk)
    ring, table = Slots(plan, RING), Slots(plan, APPEND)
    pos = 0
    while pos < ctx:
        n = rng.randint(1, min(plan.chunk, ctx - pos))
        ring.write(pos, n)
        table.write(pos, n)
        assert not missing(plan, ring, pos, n)
        assert all(table.has(p) for p in range(pos + n))
        pos += n


@given(sizes, st.lists(st.tuples(st.sampled_from("wr"), st.integers(1, 20)), max_size=30))
def test_rewind_is_allowed_exactly_when_the_next_query_finds_its_window(size, moves):
    ctx, chunk, window = size
    plan = plan_kv(make_config(window), ctx=ctx, chunk=chunk)
    ring, pos, written = Slots(plan, RING), 0, 0
    for move, n in moves:
        if move == "w":
            n = min(n, plan.chunk, ctx - pos)
            ring.write(pos, n)
            assert not missing(plan, ring, pos, n)
            pos += n
            written = max(written, pos)
            continue
        to = max(0, pos - n)
        # A query at `to` needs the window before it; at 0 nothing is needed
        needed = range(max(0, to - plan.window + 1), to)
        if plan.can_rewind(to, written):
            assert all(ring.has(p) for p in needed) or to == 0
            pos = to
            written = 0 if to == 0 else written
        else:
            # refused: one of the positions down to to-window+1 is gone, or never was
            assert to - plan.window + 1 < plan.oldest_retained(written)
    assert not plan.can_rewind(written + 1, written)
    assert not plan.can_rewind(-1, written)


def test_rewind_limit_is_tight():
    plan = plan_kv(make_config(5), ctx=100, chunk=4)  # rings hold window + chunk - 1 = 8 rows
    assert plan.ring_slots == 8
    assert plan.can_rewind(46, 50) and not plan.can_rewind(45, 50)
    assert plan.can_rewind(0, 50)
    ring = Slots(plan, RING)
    ring.write(0, 50)
    assert all(ring.has(p) for p in range(46 - 4, 46)) and not ring.has(45 - 4)


def test_without_rings_everything_can_be_rewound():
    spec = AttentionSpec(2, 1, 4, 1e4, 2)
    config = ModelConfig("gemma4", 10, 8, "FF", 4, spec, spec, 16, 64)
    plan = plan_kv(config, ctx=64)
    assert plan.ring_slots == 0 and plan.oldest_retained(64) == 0 and plan.can_rewind(1, 64)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_live_rows_cover_and_step(ctx, end):
    plan = plan_kv(make_config(max_ctx=5000), ctx=ctx)
    end = min(end, ctx)
    live = plan.live_rows(end)
    assert end <= live <= ctx
    assert live == ctx or (live % LIVE_STEP == 0 and live - end < LIVE_STEP)


@given(sizes, st.sampled_from(["f32", "f16", "int8"]))
def test_byte_counts_agree_with_shapes(size, kv):
    ctx, chunk, window = size
    plan = plan_kv(make_config(window), ctx=ctx, chunk=chunk, kv=kv)
    total = 0
    for b in plan.buffers:
        n = 1
        for d in b.shape:
            n *= d
        total += n * {"f32": 4, "f16": 2, "int8": 1}[b.dtype]
    assert plan.bytes == total == plan.touched_bytes(ctx)
    assert plan.touched_bytes(0) == 0
    for depth in (1, window, ctx):
        assert plan.touched_bytes(depth) == sum(
            min(depth, b.slots) * b.row_bytes for b in plan.buffers
        )


@pytest.mark.parametrize(
    ("name", "per_token", "fixed", "bf16"),
    [  # elements, and bf16 bytes at 32,768 and 131,072 tokens (architectures.md §6)
        ("e2b", 3_072, 3_145_728, ("0.208", "0.812")),
        ("e4b", 8_192, 10_485_760, ("0.558", "2.168")),
        ("26b-a4b", 10_240, 104_857_600, ("0.881", "2.894")),
        ("31b", 40_960, 419_430_400, ("3.523", "11.58")),
    ],
)
def test_published_totals(name, per_token, fixed, bf16):
    config = PRESETS[name].config
    for ctx, gigabytes in zip((32_768, 131_072), bf16, strict=True):
        elements = state_elements(config, ctx, sharing=True, rings=True)
        assert elements == per_token * ctx + fixed
        digits = len(gigabytes.split(".")[1])
        assert f"{2 * elements / 1e9:.{digits}f}" == gigabytes
        # the plan itself is the reference plus the chunk's slack in each ring
        plan = plan_kv(config, ctx=ctx, chunk=128, kv="f16")
        slack = sum(127 * b.row_bytes for b in plan.buffers if b.kind == RING)
        assert plan.bytes == 2 * elements + slack


@pytest.mark.parametrize(
    ("name", "at_32k", "at_128k"),
    [
        ("e2b", "1.409", "5.637"),
        ("e4b", "3.288", "13.153"),
        ("26b-a4b", "7.382", "29.53"),
        ("31b", "29.53", "118.1"),
    ],
)
def test_naive_baseline_is_every_layer_full_length(name, at_32k, at_128k):
    for ctx, gigabytes in ((32_768, at_32k), (131_072, at_128k)):
        total = 2 * state_elements(PRESETS[name].config, ctx, sharing=False, rings=False) / 1e9
        assert f"{total:.{len(gigabytes.split('.')[1])}f}" == gigabytes


@pytest.mark.parametrize(("ctx", "gigabytes"), [(32_768, "0.484"), (131_072, "1.894")])
def test_read_traffic_counts_every_reader(ctx, gigabytes):
    plan = plan_kv(PRESETS["e2b"].config, ctx=ctx, kv="f16")
    assert f"{plan.read_traffic(ctx) / 1e9:.3f}" == gigabytes


def test_sharers_write_nothing_and_read_the_last_owner_of_their_type():
    config = PRESETS["e2b"].config
    plan = plan_kv(config, ctx=1024)
    assert {b.writer for b in plan.buffers} == set(range(15))
    assert [layer.source for layer in plan.layers[15:20]] == [13, 13, 13, 13, 14]
    assert all(layer.skip_in_prefill for layer in plan.layers[15:])
    assert plan.by_name["k14"].readers == (14, 19, 24, 29, 34)


def test_views_name_every_head_of_append_buffers_once():
    plan = plan_kv(make_config(), ctx=32, kv="int8")
    views = state_views(plan)
    assert [v.name for v in views] == [
        "k0", "v0", "k1.h0", "k1.h1", "k1.scale.h0", "k1.scale.h1",
        "v1.h0", "v1.h1", "v1.scale.h0", "v1.scale.h1",
    ]  # fmt: skip
    assert views[0].shape == (1, 2, plan.ring_slots, 4)
    assert views[2].shape == (1, "live", 4) and views[4].shape == (1, "live")


def broken(plan, name, **changes):
    buffers = tuple(
        dataclasses.replace(b, **changes) if b.name == name else b for b in plan.buffers
    )
    return dataclasses.replace(plan, buffers=buffers)


def test_validate_refuses_plans_that_could_lose_a_key():
    plan = plan_kv(make_config(5), ctx=64, chunk=4)
    plan.validate()
    with pytest.raises(PlanError, match="k0 has 7 slots but a ring needs 8"):
        broken(plan, "k0", shape=(2, 7, 4)).validate()
    with pytest.raises(PlanError, match="v1 has 63 slots but a append needs 64"):
        broken(plan, "v1", shape=(2, 63, 4)).validate()
    with pytest.raises(PlanError, match="k1 is read before layer 1"):
        broken(plan, "k1", readers=(0, 1)).validate()
    with pytest.raises(PlanError, match="k1 is read before"):
        broken(plan, "k1", readers=()).validate()
    with pytest.raises(PlanError, match="planned twice"):
        dataclasses.replace(plan, buffers=(*plan.buffers, plan.buffers[0])).validate()
    with pytest.raises(PlanError, match=r"v1 holds int8 rows but v1\.scale is not planned"):
        dataclasses.replace(plan, buffers=plan.buffers[:-1]).validate()
    with pytest.raises(PlanError, match="Layer 1 reads v1, which no layer writes"):
        dataclasses.replace(plan, buffers=plan.buffers[:-2]).validate()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ctx": 0}, "ctx 0 is outside 1 … 4096"),
        ({"ctx": 5000}, "ctx 5000 is outside"),
        ({"ctx": 16, "chunk": 0}, "chunk 0"),
        ({"ctx": 16, "kv": "int9"}, "Unknown KV storage 'int9'. Did you mean 'int8'"),
    ],
)
def test_requests_no_plan_can_serve(kwargs, message):
    with pytest.raises(PlanError, match=message):
        plan_kv(make_config(), **kwargs)


def test_sizes():
    assert [parse_size(t) for t in ("32768", "32,768", "32k", "1.5k", "128K", " 1m ")] == [
        32_768, 32_768, 32_768, 1536, 131_072, 1 << 20,
    ]  # fmt: skip
    for bad in ("", "k", "0", "-1", "1.5", "1.0001k", "32 kb", "3,2768", "9" * 400, "١k"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(bad)


def test_simulator_can_fail():
    """The oracle of this file notices a ring that is one slot too short."""
    plan = plan_kv(make_config(5), ctx=64, chunk=4)
    ring = Slots(plan, RING)
    ring.slots -= 1
    rng, pos, lost = random.Random(0), 0, 0
    while pos < 60:
        n = rng.randint(1, 4)
        ring.write(pos, n)
        lost += len(missing(plan, ring, pos, n))
        pos += n
    assert lost
