"""The operators of runtime/native/ops.h against float64: instruction sets, storage, edges."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz_operators import FLAGS, preloaded, run_sanitized
from kernel_library import ALL_ISAS, MACHINE_ISAS
from native_call import KINDS, Operators, Refused

from edge_kv import heap
from edge_kv.formats import FORMATS, Quantised, dequantise, pack
from edge_kv.runtime.native_library import build_kernels

STORAGES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
FLOATING = ("scalar", "neon")  # these multiply int8 rows in floats, the others in 16-bit integers
PLAIN = {"step": 0.0, "out_step": 0.0, "cap": 0.0}  # of linear_q: nothing but the product
GLU_STEPS = dict.fromkeys(("step", "gate_step", "up_step", "down_step", "out_step"), 0.0)
LARGEST = 127 * 256  # of those integers
SHARED = 64  # see `coarse`


@pytest.fixture(scope="module")
def operators():
    made = Operators()
    yield made
    made.close()


class Table:
    """A table as a session holds it, and its rows as float64."""

    def __init__(self, storage, slots, heads, dim, *, stride=1, keep=0):
        self.rows = np.zeros((slots, heads, dim), STORAGES[storage])
        self.rows.view(np.uint8)[:] = 0x7E if storage != "int8" else 0x7F  # poison
        self.scales = np.full((slots, heads, 1), np.nan, np.float32) if storage == "int8" else None
        self.stride, self.keep = stride, keep

    @property
    def inputs(self):
        return [self.rows, self.scales]

    def exact(self):
        rows = self.rows.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return rows if self.scales is None else rows * self.scales

    def put(self, operators, rows, start, **how):
        operators.run("put", [*self.inputs, rows, np.array([start])], **how)

    def visible(self, at):
        """Row indices that a query at position `at` sees."""
        end = (at + 1) // self.stride
        return np.arange(max(0, end - self.keep) if self.keep else 0, end)


def attention(q, pos, reads, scale, sink=None):
    """Float64 attention of q [T, H, D] over reads (keys, values, picked [T, k] or None)."""
    out = np.zeros(q.shape)
    for t, queries in enumerate(q.astype(np.float64)):
        for h, query in enumerate(queries):
            logits, values = [], []
            for keys, rows, picked in reads:
                seen = keys.visible(pos + t)
                if picked is not None:
                    seen = np.intersect1d(seen, picked[t])
                head = h * keys.rows.shape[1] // q.shape[1]
                slots = seen % len(keys.rows)
                logits.append(keys.exact()[slots, head] @ query * scale)
                values.append(rows.exact()[slots, head])
            if sink is not None:
                logits.append(sink[h : h + 1].astype(np.float64))
                values.append(np.zeros((1, q.shape[2])))
            logits, values = np.concatenate(logits), np.concatenate(values)
            if len(logits):
                weights = np.exp(logits - logits.max())
                out[t, h] = weights @ values / weights.sum()
    return out


def check_attention(got, q, pos, reads, scale, sink, isa, tolerance=4e-6):
    """Hold `got` against float64; integer kernels may add what rounding to 16 bits does.

    Rounding a query moves each score by half a step times the root of the summed squares of a key,
    over sqrt(3) and five deviations of it; rounding a weight, by half a step of the largest.
    """
    want = attention(q, pos, reads, scale, sink)
    largest = max(np.abs(np.nan_to_num(values.exact())).max() for _, values, _ in reads)
    allowed = tolerance * max(np.abs(want).max(), 0.1 * largest)
    if isa.rpartition(":")[2] not in FLOATING and any(k.scales is not None for k, _, _ in reads):
        half_step = np.abs(q).max() * scale / LARGEST / 2
        norm = max(np.sqrt((np.nan_to_num(k.exact()) ** 2).sum(-1)).max() for k, _, _ in reads)
        allowed += (5 * half_step * norm / 3**0.5 + 1 / LARGEST) * largest
        if coarse(isa, q, reads[0][0]):
            allowed += (5 * half_step * 256 * norm / 3**0.5 / SHARED**0.5 + 3e-3) * largest
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= allowed


def coarse(isa, q, keys):
    """Whether kernels may take a key's 8 higher bits where its weight is below 1 / SHARED.

    The errors of such keys are independent and add up by squares of weights: at most 1 / SHARED.
    Their weights are rounded to 8 bits of the largest of a tile.
    """
    rows, dim = q.shape[0] * q.shape[1] // keys.rows.shape[1], q.shape[2]
    return isa == "avx512vnni" and dim % 64 == 0 and rows >= (4 if dim >= 256 else 8)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def attend(operators, q, pos, reads, scale, sink=None, **how):
    inputs = [q, np.array([pos]), sink]
    for keys, values, picked in reads:
        inputs += [*keys.inputs, *values.inputs, picked]
    return operators.run(
        "attend", inputs, **how, scale=float(scale),
        strides=[k.stride for k, _, _ in reads], keeps=[k.keep for k, _, _ in reads],
    )  # fmt: skip


def filled(operators, rng, storage, slots, heads, dim, rows, isa="scalar", **kind):
    """A table into which rows 0 … rows - 1 were put."""
    table = Table(storage, slots, heads, dim, **kind)
    for start in range(0, rows, slots):
        n = min(slots, rows - start)
        table.put(operators, normal(rng, n, heads, dim), start, isa=isa)
    return table


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
def test_rows_are_put_where_they_belong(operators, isa, storage):
    rng = np.random.default_rng(0)
    table = Table(storage, 7, 3, 37)
    before = table.rows.copy()
    rows = normal(rng, 4, 3, 37) * 10
    table.put(operators, rows, 12, isa=isa)  # slots 5, 6, 0, 1
    np.testing.assert_array_equal(table.rows[2:5], before[2:5])
    got = table.exact()[[5, 6, 0, 1]]
    steps = np.abs(rows).max(-1, keepdims=True) / 127
    if storage == "f32":
        np.testing.assert_array_equal(got, rows)
    elif storage == "f16":
        np.testing.assert_array_equal(got, rows.astype(np.float16))
    else:
        np.testing.assert_allclose(table.scales[[5, 6, 0, 1]], steps, rtol=1e-6)
        assert np.abs(got - rows).max() <= steps.max() * 0.501
    rows[0, 0, :2] = np.nan, np.inf  # no undefined conversion, and no trace in other rows
    table.put(operators, rows, 12, isa=isa)
    np.testing.assert_array_equal(table.exact()[[6, 0, 1]], got[1:])


SHAPES = [(1, 1, 64), (1, 8, 512), (2, 4, 32), (3, 1, 20), (1, 16, 48), (1, 3, 576), (2, 5, 320)]


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("heads", "group", "dim"), SHAPES)
def test_attend_to_everything(operators, isa, storage, heads, group, dim):
    rng = np.random.default_rng(1)
    scale = dim**-0.5
    keys, values = (
        filled(operators, rng, storage, 330, heads, dim, 300, isa) for _ in ("keys", "values")
    )
    for pos, tokens in ((0, 1), (0, 5), (126, 4), (299, 1), (263, 37)):
        q = normal(rng, tokens, heads * group, dim) * 3
        got = attend(operators, q, pos, [(keys, values, None)], scale, isa=isa, threads=2)
        check_attention(got, q, pos, [(keys, values, None)], scale, None, isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", ["f32", "int8"])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e4])
def test_attend_to_extremes(operators, isa, storage, size):
    """Equal scores, and one key that outweighs all others, over rows of any size."""
    rng = np.random.default_rng(4)
    tables = []
    for of in (1.0, size):
        table = filled(operators, rng, storage, 300, 1, 64, 0, isa)
        for at in range(0, 300, 50):
            table.put(operators, normal(rng, 50, 1, 64) * np.float32(of), at, isa=isa)
        tables.append(table)
    keys, values = tables
    for q in (np.zeros((2, 8, 64)), np.tile(keys.exact()[7] * 100, (2, 8, 1))):
        q = q.astype(np.float32)
        reads = [(keys, values, None)]
        got = attend(operators, q, 298, reads, 0.125, isa=isa, threads=2)
        check_attention(got, q, 298, reads, 0.125, None, isa, 3e-4)


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 8, 512), (2, 4, 256), (8, 2, 128)])
def test_deep_contexts(operators, isa, heads, group, dim):
    """Thousands of keys, a few of which take most of some softmaxes."""
    rng = np.random.default_rng(6)
    keys, values = (
        filled(operators, rng, "int8", 3000, heads, dim, 3000, isa) for _ in ("keys", "values")
    )
    for tokens in (1, 5):
        q = normal(rng, tokens, heads * group, dim)
        near = rng.integers(0, 2990, heads * group)
        for h in range(0, heads * group, 2):  # these look for one key
            q[:, h] = keys.exact()[near[h], h // group] * rng.uniform(0.2, 1.5)
        reads = [(keys, values, None)]
        got = attend(operators, q, 3000 - tokens, reads, dim**-0.5, isa=isa, threads=2)
        check_attention(got, q, 3000 - tokens, reads, dim**-0.5, None, isa)
        want = attention(q, 3000 - tokens, reads, dim**-0.5)
        error = np.sqrt(((got - want) ** 2).mean(-1) / (want**2).mean(-1))
        assert error.max() < (0.015 if coarse(isa, q, keys) else 5e-4)
        assert error.mean() < 0.005


@pytest.mark.parametrize("isa", MACHINE_ISAS)
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_a_query_is_alone_among_others(operators, isa, tokens):
    """What a head gets is the same to the bit, whatever the others of a step look for."""
    rng = np.random.default_rng(8)
    keys, values = (
        filled(operators, rng, "int8", 700, 1, 256, 700, isa) for _ in ("keys", "values")
    )
    reads = [(keys, values, None)]
    q = normal(rng, tokens, 8, 256)
    others = q.copy()
    others[:, 1:] = keys.exact()[rng.integers(0, 690, 7), 0] * 1.2
    first = []
    for of in (q, others):
        got = attend(operators, of, 700 - tokens, reads, 1 / 16, isa=isa, threads=2)
        check_attention(got, of, 700 - tokens, reads, 1 / 16, None, isa)
        first.append(got[:, 0])
    np.testing.assert_array_equal(*first)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", [1, 3])
def test_attend_to_rings(operators, isa, storage, threads):
    """Every place of a wrap within the window, for one token and for chunks."""
    rng = np.random.default_rng(2)
    window, chunk = 24, 9
    keys, values = (
        filled(operators, rng, storage, window + chunk - 1, 2, 32, 0, isa, keep=window)
        for _ in ("keys", "values")
    )
    pos = 0
    for tokens in (9, 1, 1, 9, 7, 9, 1, 9, 2, 9, 9, 1):
        for table in (keys, values):
            table.put(operators, normal(rng, tokens, 2, 32), pos, isa=isa)
        q = normal(rng, tokens, 6, 32) * 2
        how = {"isa": isa, "threads": threads}
        got = attend(operators, q, pos, [(keys, values, None)], 0.25, **how)
        check_attention(got, q, pos, [(keys, values, None)], 0.25, None, isa)
        pos += tokens


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sunk", [False, True])
def test_attend_to_two_tables(operators, isa, storage, threads, sunk):
    """A ring and closed blocks of four, read as keys and values at once, all or picked."""
    rng = np.random.default_rng(3)
    heads, dim, window = 12, 64, 16
    ring = filled(operators, rng, "f16", window + 8, 1, dim, 200, isa, keep=window)
    blocks = filled(operators, rng, storage, 60, 1, dim, 50, isa, stride=4)
    sink = normal(rng, heads) * 4 if sunk else None
    for pos, tokens in ((199, 1), (192, 8), (195, 5)):
        q = normal(rng, tokens, heads, dim)
        picked = rng.integers(-1, 52, (tokens, 30))  # some twice, some not yet in view
        for picks in (None, picked, np.full((tokens, 2), -1)):
            reads = [(ring, ring, None), (blocks, blocks, picks)]
            how = {"isa": isa, "threads": threads}
            got = attend(operators, q, pos, reads, 0.3, sink, **how)
            check_attention(got, q, pos, reads, 0.3, sink, isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_queries_that_see_nothing(operators, isa):
    """Before the first block is closed: zeros, or what the other read and the sink leave."""
    rng = np.random.default_rng(4)
    blocks = Table("int8", 4, 1, 32, stride=8)
    blocks.put(operators, normal(rng, 2, 1, 32), 0, isa=isa)
    ring = filled(operators, rng, "f32", 20, 1, 32, 10, isa, keep=8)
    sink = normal(rng, 4)
    for pos, tokens in ((0, 1), (3, 2), (4, 6)):
        q = normal(rng, tokens, 4, 32)
        for reads in ([(blocks, blocks, None)], [(ring, ring, None), (blocks, blocks, None)]):
            for s in (None, sink):
                got = attend(operators, q, pos, reads, 1.0, s, isa=isa)
                check_attention(got, q, pos, reads, 1.0, s, isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
def test_long_lists_of_picks(operators, isa, storage):
    rng = np.random.default_rng(5)
    keys, values = (
        filled(operators, rng, storage, 2000, 2, 32, 2000, isa) for _ in ("keys", "values")
    )
    for tokens in (1, 3):
        q = normal(rng, tokens, 4, 32)
        picked = np.stack([rng.permutation(2000)[:700] for _ in range(tokens)])
        reads = [(keys, values, picked)]
        got = attend(operators, q, 1990, reads, 0.4, isa=isa, threads=2)
        check_attention(got, q, 1990, reads, 0.4, None, isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 5, 64), (6, 8, 37), (1, 64, 128)])
def test_select_takes_the_best(operators, isa, storage, tokens, heads, dim):
    rng = np.random.default_rng(6)
    table = filled(operators, rng, storage, 400, 1, dim, 380, isa, stride=4)
    q, weight = normal(rng, tokens, heads, dim), normal(rng, tokens, heads)
    for pos, k in ((1400, 16), (1400, 400), (2, 8), (39, 12)):
        inputs = [q, weight, np.array([pos]), *table.inputs]
        got = operators.run("select", inputs, isa=isa, threads=2, k=k, stride=4)
        assert got.shape == (tokens, k)
        for t in range(tokens):
            seen = table.visible(pos + t)
            products = np.maximum(table.exact()[seen, 0] @ q[t].T.astype(np.float64), 0)
            scores = products @ weight[t].astype(np.float64)
            chosen = got[t][got[t] >= 0]
            assert len(set(chosen)) == len(chosen) == min(k, len(seen))
            assert set(chosen) <= set(seen)
            if len(chosen) < len(seen):  # none left out is better than one that was taken
                left = np.delete(scores, chosen)
                assert scores[chosen].min() >= left.max() - 1e-4 * np.abs(scores).max()


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("style", ["halves", "pairs_last"])
@pytest.mark.parametrize(
    ("heads", "dim", "angles"), [(8, 512, 256), (3, 36, 18), (2, 65, 7), (1, 16, 0)]
)
def test_norm_rope(operators, isa, style, heads, dim, angles):
    rng = np.random.default_rng(7)
    tokens = 5
    x, weight = normal(rng, tokens, heads, dim) * 3, normal(rng, dim)
    at = rng.uniform(0, 6, (tokens, angles))
    cos, sin = np.cos(at).astype(np.float32), np.sin(at).astype(np.float32)
    turn = [cos, sin] if angles else [None, None]
    for eps, w in ((1e-6, weight), (0.5, None), (-1.0, None), (-1.0, weight)):
        got = operators.run("norm_rope", [x, w, *turn], isa=isa, threads=2, eps=eps, style=style)
        y = x.astype(np.float64)
        if eps >= 0:
            y /= np.sqrt((y**2).mean(-1, keepdims=True) + eps)
        y = y if w is None else y * w
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        if style == "halves":
            a, b = y[..., :angles].copy(), y[..., angles : 2 * angles].copy()
            y[..., :angles], y[..., angles : 2 * angles] = a * c - b * s, b * c + a * s
        else:
            a, b = y[..., dim - 2 * angles :: 2].copy(), y[..., dim - 2 * angles + 1 :: 2].copy()
            if angles:
                y[..., dim - 2 * angles :: 2] = a * c - b * s
                y[..., dim - 2 * angles + 1 :: 2] = b * c + a * s
        np.testing.assert_allclose(got, y, rtol=0, atol=2e-6 * np.abs(y).max())
    flat = operators.run("norm_rope", [x[:, 0], weight, *turn], isa=isa, eps=1e-6, style=style)
    whole = operators.run("norm_rope", [x, weight, *turn], isa=isa, eps=1e-6, style=style)
    np.testing.assert_array_equal(flat, whole[:, 0])


def test_sinkhorn(operators):
    rng = np.random.default_rng(8)
    x = normal(rng, 9, 4, 4) * 2
    for iters, eps in ((1, 1e-6), (20, 1e-6), (3, 0.1)):
        m = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        m = m / m.sum(-1, keepdims=True) + eps
        m /= m.sum(1, keepdims=True) + eps
        for _ in range(iters - 1):
            m /= m.sum(2, keepdims=True) + eps
            m /= m.sum(1, keepdims=True) + eps
        got = operators.run("sinkhorn", [x], threads=2, iters=iters, eps=eps)
        np.testing.assert_allclose(got, m, rtol=5e-6)


def stored(rng, name, rows, cols):
    """A random matrix [rows, cols] of a format: as it is stored, and in floats."""
    fmt = FORMATS[name]
    codes = rng.integers(fmt.low, fmt.high + 1, (rows, cols)).astype(np.int8)
    blocks = row = None
    if fmt.block_scale is not None:
        blocks = rng.integers(20, 100, (rows, fmt.blocks(cols))).astype(fmt.block_scale)
    if fmt.has_row_scales:
        row = rng.uniform(1e-4, 2e-4, rows).astype(np.float32)
    matrix = Quantised(codes, blocks, row)
    return pack(fmt, matrix), dequantise(fmt, matrix)


def close(got, want):
    """Within what rounding activations to 8 bits does."""
    error = np.abs(got - want)
    assert error.max() <= 0.05 * np.abs(want).max()
    assert error.mean() <= 0.025 * np.abs(want).mean()


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_q_and_embed_q(operators, isa, name):
    rng = np.random.default_rng(10)
    packed, matrix = stored(rng, name, 37, 100)
    x = normal(rng, 3, 100)
    product = operators.run("linear_q", [x, packed], isa=isa, rows=37, format=name, **PLAIN)
    close(product, x.astype(np.float64) @ matrix.T)
    ids = np.array([36, 0, 17])
    found = operators.run("embed_q", [ids, packed], isa=isa, width=100, format=name)
    np.testing.assert_allclose(found, matrix[ids], rtol=1e-6)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("names", [("code4-s8", "int8-s8"), ("int4-f16", "int2-row"), None])
@pytest.mark.parametrize(("act", "limit"), [("silu", 0.0), ("gelu_tanh", 0.0), ("silu", 0.8)])
def test_experts_q(operators, isa, names, act, limit):
    """One token and chunks, experts that nobody or everybody chose, choices that name none."""
    rng = np.random.default_rng(11)
    experts, dim, width = 6, 68, 40
    into, back, stacks = [], [], ([], [])
    for _ in range(experts):
        for name, (rows, cols), matrices, packed in zip(
            names or ("", ""), ((2 * width, dim), (dim, width)), (into, back), stacks, strict=True
        ):
            matrix = normal(rng, rows, cols) / cols**0.5
            if name:
                kept, matrix = stored(rng, name, rows, cols)
                packed.append(kept)
            else:
                packed.append(matrix)
            matrices.append(matrix.astype(np.float64))
    gate_up, down = (np.stack(s) for s in stacks)
    spread = np.abs(np.stack(into)).mean() * dim**0.5
    for tokens, threads in ((1, 1), (1, 4), (19, 2)):
        x = normal(rng, tokens, dim) / np.float32(spread) * 3
        index = rng.integers(-1, experts, (tokens, 3))
        index[:, 0] = 2
        index[index == 4] = experts  # no such expert: adds nothing
        weight = rng.uniform(0.1, 1, (tokens, 3)).astype(np.float32)
        want = np.zeros((tokens, dim))
        for t in range(tokens):
            for e, share in zip(index[t], weight[t], strict=True):
                if not 0 <= e < experts:
                    continue
                gate, up = np.split(into[e] @ x[t].astype(np.float64), 2)
                if limit:
                    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                z = gate if act == "silu" else 1.5957691216 * (gate + 0.044715 * gate**3)
                want[t] += share * (back[e] @ (gate / (1 + np.exp(-z)) * up))
        got = operators.run(
            "experts_q", [x, index, weight, gate_up, down], isa=isa, threads=threads, width=width,
            format=names[0] if names else "", down_format=names[1] if names else "", act=act,
            limit=limit,
        )  # fmt: skip
        if names:
            close(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1536), (5, 37), (70, 1000)])
def test_norm_add(operators, isa, tokens, dim):
    rng = np.random.default_rng(12)
    x, residual = normal(rng, tokens, dim) * 30, normal(rng, tokens, dim)
    weight = normal(rng, dim)
    for scale in (None, np.float32([0.3])):
        got = operators.run("norm_add", [x, weight, residual, scale], isa=isa, threads=3, eps=1e-6)
        exact = x.astype(np.float64)
        want = residual + exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * weight
        want *= 1.0 if scale is None else scale
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize(("tokens", "count"), [(1, 70_001), (5, 37)])
def test_softcap(operators, isa, tokens, count):
    x = normal(np.random.default_rng(14), tokens, count) * 40
    got = operators.run("softcap", [x], isa=isa, threads=3, cap=30.0)
    want = 30 * np.tanh(x.astype(np.float64) / 30)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("names", [("code4-s8", "code4-s8", "int8-s8"), ("int2-row", "int4-f16")])
@pytest.mark.parametrize(("act", "limit"), [("silu", 0.8), ("gelu_tanh", 0.0)])
def test_glu_q(operators, isa, names, act, limit):
    """With a second matrix or with given factors; tasks of one group of rows and of several."""
    rng = np.random.default_rng(13)
    for tokens, threads, dim, width in ((1, 1, 68, 40), (1, 4, 300, 500), (19, 2, 64, 333)):
        shapes = [(width, dim)] * (len(names) - 1) + [(dim, width)]
        kept, exact = zip(*(stored(rng, n, *s) for n, s in zip(names, shapes, strict=True)),
                          strict=True)  # fmt: skip
        x = normal(rng, tokens, dim) / np.float32(np.abs(exact[0]).mean() * dim**0.5) * 3
        gate = x.astype(np.float64) @ exact[0].T
        factor = None if len(names) == 3 else normal(rng, tokens, width)
        up = x.astype(np.float64) @ exact[1].T if factor is None else factor
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        z = gate if act == "silu" else 1.5957691216 * (gate + 0.044715 * gate**3)
        got = operators.run(
            "glu_q", [x, kept[0], kept[1] if factor is None else None, factor, kept[-1]],
            isa=isa, threads=threads, width=width, format=names[0],
            up_format=names[1] if factor is None else "", down_format=names[-1], act=act,
            limit=limit, **GLU_STEPS,
        )  # fmt: skip
        close(got, (gate / (1 + np.exp(-z)) * up) @ exact[-1].T)


def to_steps(x, step):
    return np.clip(np.rint(x / step), -128, 127) * step


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("name", ["code4-s8", "int8-f16", "int2-row", "int4-row"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 40])
def test_products_are_rounded_and_bounded(operators, isa, name, tokens):
    """Inputs and results in steps, then a soft cap: what a head of a quantised model does."""
    rng = np.random.default_rng(tokens)
    packed, matrix = stored(rng, name, 300, 100)
    x, step = normal(rng, tokens, 100), float(np.float32(0.02))
    want = to_steps(x, np.float32(step)).astype(np.float64) @ matrix.T
    most = np.abs(want).max()
    out_step, cap = (float(np.float32(most / n)) for n in (150, 2))  # the largest are cut off

    def run(**given):
        attributes = {"rows": 300, "format": name, **PLAIN, "step": step, **given}
        return operators.run("linear_q", [x, packed], isa=isa, threads=3, **attributes)

    np.testing.assert_allclose(run(), want, rtol=0, atol=1e-5 * most)
    rounded = run(out_step=out_step)
    np.testing.assert_allclose(rounded / out_step, np.rint(rounded / out_step), atol=1e-4)
    bounded = np.clip(want, -128 * out_step, 127 * out_step)
    assert np.abs(rounded - bounded).max() <= out_step / 2 + 1e-5 * most
    capped = cap * np.tanh(rounded.astype(np.float64) / cap)
    np.testing.assert_allclose(run(out_step=out_step, cap=cap), capped, atol=1e-6 * cap)
    np.testing.assert_allclose(run(cap=cap), cap * np.tanh(want / cap), atol=1e-5 * most)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("given", [False, True])
def test_glu_q_in_steps(operators, isa, given):
    """A gated unit whose activations all have steps is its products and what lies between them."""
    rng = np.random.default_rng(17)
    names, dim, width = ("int2-row", "int4-row", "int8-row"), 68, 333
    for tokens, threads in ((1, 1), (1, 4), (19, 2)):
        shapes = ((width, dim), (width, dim), (dim, width))
        kept, exact = zip(*(stored(rng, n, *s) for n, s in zip(names, shapes, strict=True)),
                          strict=True)  # fmt: skip
        x, steps = normal(rng, tokens, dim), {}

        def rounded(values, name, steps=steps):
            steps[name] = float(np.float32(np.abs(values).max() / 100))
            return to_steps(values, steps[name])

        into = rounded(x, "step").astype(np.float64)
        gate = rounded(into @ exact[0].T, "gate_step")
        factor = normal(rng, tokens, width) if given else None
        up = factor if given else rounded(into @ exact[1].T, "up_step")
        hidden = rounded(gate / (1 + np.exp(-gate)) * up, "down_step")
        want = hidden @ exact[2].T
        steps.setdefault("up_step", 0.0)
        rounded(want, "out_step")
        got = operators.run(
            "glu_q", [x, kept[0], None if given else kept[1], factor, kept[2]], isa=isa,
            threads=threads, width=width, format=names[0], up_format="" if given else names[1],
            down_format=names[2], act="silu", limit=0.0, **{n: steps[n] for n in GLU_STEPS},
        )  # fmt: skip
        # A value at a half may fall on the other side: a step of few of the values between.
        assert np.abs(got - want).max() <= 2 * steps["out_step"]
        assert np.abs(got - want).mean() <= 0.35 * steps["out_step"]


def test_what_a_prompt_worked_in_is_given_back(operators):
    def anonymous():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Anonymous:"))) << 10

    rng = np.random.default_rng(2)
    packed, _ = stored(rng, "int8-row", 16, 4096)
    x, attributes = normal(rng, 4096, 4096), {"rows": 16, "format": "int8-row", **PLAIN}
    isa = MACHINE_ISAS[-1]
    first = operators.run("linear_q", [x, packed], isa=isa, **attributes)
    held = anonymous()
    heap.release(operators.native)
    assert held - anonymous() > 4096 * 4096  # a byte a value, and what belongs to its blocks
    again = operators.run("linear_q", [x, packed], isa=isa, **attributes)
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("isa", MACHINE_ISAS)
def test_steps_do_not_hide_what_is_no_number(operators, isa):
    packed, _ = stored(np.random.default_rng(1), "int4-f16", 40, 64)
    packed[1, :32] = 0xFF  # scales of rows 16 … 31 that are no numbers
    attributes = {"rows": 40, "format": "int4-f16", **PLAIN, "out_step": 0.1, "cap": 3.0}
    got = operators.run("linear_q", [np.ones((2, 64), np.float32), packed], isa=isa, **attributes)
    assert np.isnan(got[:, 16:32]).all() and np.isfinite(np.delete(got, range(16, 32), 1)).all()


def good_calls():
    """A call of each operator that runs: name, inputs, attributes."""
    rng = np.random.default_rng(9)
    f, i64 = np.float32, np.int64
    table, scales = np.zeros((6, 2, 8), np.int8), np.ones((6, 2, 1), f)
    blocks = np.zeros((3, 2, 8), f)
    return {
        "put": ([table, scales, normal(rng, 3, 2, 8), np.array([4])], {}),
        "attend": (
            [normal(rng, 2, 4, 8), np.array([4]), normal(rng, 4), table, scales, table, scales,
             None, blocks, None, blocks, None, np.zeros((2, 3), i64)],
            {"scale": 0.5, "strides": [1, 2], "keeps": [0, 0]},
        ),
        "select": (
            [normal(rng, 2, 4, 8), normal(rng, 2, 4), np.array([3]), np.zeros((6, 1, 8), f), None],
            {"k": 3, "stride": 1},
        ),
        "norm_rope": (
            [normal(rng, 2, 4, 8), normal(rng, 8), normal(rng, 2, 3), normal(rng, 2, 3)],
            {"eps": 1e-6, "style": "halves"},
        ),
        "norm_add": (
            [normal(rng, 2, 8), normal(rng, 8), normal(rng, 2, 8), normal(rng, 1)], {"eps": 1e-6}
        ),
        "glu_q": (
            [normal(rng, 2, 40), stored(rng, "code4-s8", 24, 40)[0],
             stored(rng, "int4-f16", 24, 40)[0], None, stored(rng, "int8-row", 40, 24)[0]],
            {"width": 24, "format": "code4-s8", "up_format": "int4-f16",
             "down_format": "int8-row", "act": "silu", "limit": 0.0, **GLU_STEPS},
        ),
        "sinkhorn": ([normal(rng, 2, 4, 4)], {"iters": 4, "eps": 1e-6}),
        "softcap": ([normal(rng, 2, 8)], {"cap": 30.0}),
        "linear_q": (
            [normal(rng, 2, 40), stored(rng, "int4-s8", 20, 40)[0]],
            {"rows": 20, "format": "int4-s8", **PLAIN},
        ),
        "embed_q": (
            [np.array([3, 31]), stored(rng, "int8-f16", 20, 40)[0]],
            {"width": 40, "format": "int8-f16"},
        ),
        "experts_q": (
            [normal(rng, 2, 40), np.array([[0, 1], [2, -1]]), normal(rng, 2, 2),
             np.stack([stored(rng, "code4-s8", 48, 40)[0] for _ in range(3)]),
             np.stack([stored(rng, "int8-row", 40, 24)[0] for _ in range(3)])],
            {"width": 24, "format": "code4-s8", "down_format": "int8-row", "act": "silu",
             "limit": 0.0},
        ),
    }  # fmt: skip


HIGHEST = 2**63 - 1
BAD = [  # operator, changed inputs, changed attributes, what the sentence says
    ("put", {3: np.array([-1])}, {}, "start is -1; it must be 0 or more"),
    ("put", {3: np.array([HIGHEST])}, {}, r"below 2\^48"),
    ("put", {3: np.array([1, 2])}, {}, r"start is int64 \[2\]; it must hold one number"),
    ("put", {3: np.float32([1])}, {}, "start is f32; it must be int64"),
    ("put", {1: None}, {}, "its scales are nothing; int8 rows have scales"),
    ("put", {1: np.ones((6, 1, 1), np.float32)}, {}, r"must be \[6, 2, 1\]"),
    ("put", {0: np.zeros((6, 2, 8), np.uint8)}, {}, "must be f32, f16 or int8"),
    ("put", {0: np.zeros((6, 16), np.int8)}, {}, r"must be \[slots, heads, dim\]"),
    ("put", {2: np.zeros((7, 2, 8), np.float32)}, {}, "at most 6"),
    ("put", {2: np.zeros((3, 2, 7), np.float32)}, {}, "at most 6, 2, 8"),
    ("put", {2: np.zeros((0, 2, 8), np.float32)}, {}, "no axis may be empty"),
    ("attend", {1: np.array([5])}, {}, "holds 6 rows; the step at 5 with 2 tokens looks at 7"),
    ("attend", {1: np.array([HIGHEST])}, {}, r"below 2\^48"),
    ("attend", {2: np.ones(3, np.float32)}, {}, "there are 4 query heads"),
    ("attend", {0: np.ones((2, 3, 8), np.float32)}, {}, "a multiple of those of keys1"),
    ("attend", {0: np.ones((2, 4, 7), np.float32)}, {}, "the step reads 2 heads of 7"),
    ("attend", {4: None}, {}, "int8 rows have scales"),
    ("attend", {5: np.zeros((5, 2, 8), np.int8), 6: np.ones((5, 2, 1), np.float32)}, {}, "alike"),
    ("attend", {8: None}, {}, "There are 1 reads, 2 strides"),
    ("attend", {8: None}, {"strides": [1], "keeps": [0]}, "keys2 is missing"),
    ("attend", {10: None}, {}, "keys2 is given without values2"),
    ("attend", {12: np.zeros((3, 3), np.int64)}, {}, r"must be \[2, picks\]"),
    ("attend", {12: np.full((2, 3), -2)}, {}, "a pick is a row, or -1"),
    ("attend", {12: np.full((2, 3), -(2**63))}, {}, "a pick is a row, or -1"),
    ("attend", {}, {"strides": [1, 0]}, "out of range"),
    ("attend", {}, {"strides": [1, HIGHEST]}, "out of range"),
    ("attend", {}, {"keeps": [-1, 0]}, "out of range"),
    ("attend", {}, {"keeps": [0, 2]}, "only a stride of 1 has a keep"),
    ("attend", {}, {"strides": [1]}, "2 reads, 1 strides"),
    ("attend", {}, {"strides": [1, 1]}, "keys2 holds 3 rows"),
    ("select", {}, {"k": 0}, "k is 0"),
    ("select", {}, {"k": HIGHEST}, "it must be 1 …"),
    ("select", {}, {"stride": 0}, "stride is 0"),
    ("select", {1: np.ones((2, 5), np.float32)}, {}, r"must be \[2, 4\]"),
    ("select", {2: np.array([9])}, {}, "rows holds 6 rows"),
    ("select", {3: np.zeros((6, 2, 8), np.float32)}, {}, "one head"),
    ("norm_rope", {2: None}, {}, "both or neither"),
    ("norm_rope", dict.fromkeys((2, 3), np.ones((2, 5), np.float32)), {}, "at most 4"),
    ("norm_rope", {3: np.ones((2, 2), np.float32)}, {}, "both must be"),
    ("norm_rope", {1: np.ones(7, np.float32)}, {}, "has 8 values"),
    ("norm_rope", {}, {"style": "half"}, 'style is "half"'),
    ("norm_rope", {}, {"eps": float("nan")}, "eps is nan"),
    ("norm_add", {0: np.ones(8, np.float32)}, {}, r"must be \[tokens, values\]"),
    ("norm_add", {1: np.ones(7, np.float32)}, {}, "has 8 values"),
    ("norm_add", {2: np.ones((1, 8), np.float32)}, {}, "the same shape"),
    ("norm_add", {3: np.ones(2, np.float32)}, {}, "must hold one number"),
    ("norm_add", {}, {"eps": -1.0}, "eps is -1"),
    ("glu_q", {}, {"width": 33}, r"gate is uint8 \[2, "),
    ("glu_q", {}, {"width": HIGHEST}, "width is"),
    ("glu_q", {}, {"act": "relu"}, 'act is "relu"'),
    ("glu_q", {}, {"limit": -1.0}, "limit is -1"),
    ("glu_q", {}, {"up_format": "int3"}, 'up is "int3"'),
    ("glu_q", {}, {"down_format": "int8-s8"}, "in int8-s8 is"),
    ("glu_q", {2: None}, {}, "up or factor must be given"),
    ("glu_q", {3: np.ones((2, 24), np.float32)}, {}, "not both"),
    ("glu_q", {2: None, 3: np.ones((2, 23), np.float32)}, {}, r"must be \[2, 24\]"),
    ("sinkhorn", {0: np.ones((2, 4, 5), np.float32)}, {}, r"must be \[tokens, k, k\]"),
    ("sinkhorn", {}, {"iters": 0}, "iters is 0"),
    ("sinkhorn", {}, {"eps": -1.0}, "eps is -1"),
    ("softcap", {}, {"cap": 0.0}, "cap is 0; it must be above 0"),
    ("softcap", {}, {"cap": math.nan}, "cap is nan"),
    ("linear_q", {}, {"rows": 0}, "is to hold 0 rows"),
    ("linear_q", {}, {"rows": 33}, r"is \[3, "),
    ("linear_q", {}, {"rows": HIGHEST}, "out of range"),
    ("linear_q", {}, {"format": "int3"}, 'format is "int3"'),
    ("linear_q", {}, {"format": "int8-s8"}, "in int8-s8 is"),
    ("linear_q", {}, {"step": -1.0}, "step is -1"),
    ("linear_q", {}, {"out_step": math.nan}, "out_step is nan"),
    ("linear_q", {}, {"cap": -1.0}, "cap is -1"),
    ("glu_q", {}, {"down_step": math.inf}, "down_step is inf"),
    ("linear_q", {0: np.ones((2, 65), np.float32)}, {}, "65 columns"),
    ("linear_q", {1: np.zeros((2, 3), np.int8)}, {}, "packed is int8; it must be uint8"),
    ("embed_q", {0: np.array([32])}, {}, "ids holds 32; there are 32 rows"),
    ("embed_q", {0: np.array([-1])}, {}, "ids holds -1"),
    ("embed_q", {}, {"width": -(2**63)}, "out of range"),
    ("embed_q", {}, {"width": HIGHEST}, "out of range"),
    ("experts_q", {}, {"width": 25}, "gate_up is uint8"),
    ("experts_q", {}, {"width": HIGHEST}, "width is"),
    ("experts_q", {}, {"act": "relu"}, 'act is "relu"'),
    ("experts_q", {}, {"limit": float("nan")}, "limit is nan"),
    ("experts_q", {1: np.zeros((3, 2), np.int64)}, {}, r"must be \[2, choices\]"),
    ("experts_q", {2: np.ones((2, 3), np.float32)}, {}, "the same shape"),
    ("experts_q", {3: np.zeros((3, 48, 39), np.float32)}, {}, r"\[experts, 48, 40\]"),
    ("experts_q", {3: np.zeros((3, 48, 40), np.float16)}, {}, "f32 or uint8"),
    ("experts_q", {3: np.zeros((2, 48, 40), np.float32)}, {}, "as many experts"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inputs", "attributes", "says"), BAD)
def test_what_does_not_fit_is_one_sentence(operators, name, inputs, attributes, says):
    arrays, values = good_calls()[name]
    operators.run(name, arrays, **values)
    arrays = [inputs.get(i, a) for i, a in enumerate(arrays)]
    with pytest.raises(Refused, match=says) as refused:
        operators.run(name, arrays, **{**values, **attributes})
    assert str(refused.value).startswith(f"{name}: ") and str(refused.value).endswith(".")


def test_sanitizers_find_nothing():
    """The tests above in a process built with AddressSanitizer and UBSan."""
    path = build_kernels(*FLAGS)
    code = f"""
import ctypes, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_native_operators as t
from kernel_library import MACHINE_ISAS
operators = t.Operators(ctypes.CDLL({str(path)!r}))
for isa in MACHINE_ISAS:
    for storage in t.STORAGES:
        t.test_rows_are_put_where_they_belong(operators, isa, storage)
        for shape in ((2, 4, 32), (3, 1, 20), (1, 8, 64)):
            t.test_attend_to_everything(operators, isa, storage, *shape)
        t.test_attend_to_rings(operators, isa, storage, 3)
        t.test_attend_to_two_tables(operators, isa, storage, 2, True)
        t.test_select_takes_the_best(operators, isa, storage, 6, 8, 37)
    t.test_queries_that_see_nothing(operators, isa)
    t.test_deep_contexts(operators, isa, 2, 4, 256)
    for style in ("halves", "pairs_last"):
        t.test_norm_rope(operators, isa, style, 2, 65, 7)
t.test_sinkhorn(operators)
for isa in MACHINE_ISAS:
    t.test_linear_q_and_embed_q(operators, isa, "int4-s8")
    t.test_products_are_rounded_and_bounded(operators, isa, "int4-row", 5)
    t.test_glu_q_in_steps(operators, isa, False)
    for names in (("code4-s8", "int8-s8"), None):
        t.test_experts_q(operators, isa, names, "silu", 0.8)
    t.test_norm_add(operators, isa, 5, 37)
    t.test_glu_q(operators, isa, ("code4-s8", "code4-s8", "int8-s8"), "silu", 0.8)
for case in t.BAD:
    t.test_what_does_not_fit_is_one_sentence(operators, *case)
print("clean")
"""
    environment = {**os.environ, **preloaded()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[:2000]


def test_random_and_broken_calls():
    """A few of what `python tests/fuzz_operators.py` runs, under the sanitizers."""
    result = run_sanitized(3000, seed=1)
    assert result.returncode == 0, result.stderr[:2000]
    assert "3000 calls, nothing found" in result.stdout
    counts = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines()[:-1])
    assert len(counts) == 2 * len(KINDS) and min(map(int, counts.values())) > 50
