"""Plans and weight rows against published figures: state, traffic, parameters, ratios.

Published totals count a window's rows alone and the rows before the current one in a tail; the
plan has besides one block row that is merely touched, and the current row (see `exact_bytes`).
"""

from __future__ import annotations

from math import isclose

import pytest

from edge_kv import models
from edge_kv.models.model import EXPERT, EXPERT8, TABLE

K = 1024
DEPTHS = {"4k": 4 * K, "32k": 32 * K, "128k": 128 * K, "1m": 1024 * K}


def layout(name, depth, kv="f16"):
    """The state of `name` for single tokens, also beyond the positions it was made for."""
    row = models.get_row(name).config
    if depth > row.max_ctx:
        row = type(row)(**{**vars(row), "max_ctx": depth})
    return models.plan(row, ctx=depth, chunk=1, kv=kv)


def exact_bytes(plan, wide):
    """Bytes as publications count them, `wide` for a value of keys, values and blocks."""
    total = 0
    for t in plan.tables:
        values = t.row[0] * t.row[1]
        if t.exact:
            total += 4 * values * (t.slots - 1)
        else:
            total += wide * values * (t.slots - (t.stride > 1))
    return total


# model: naive and minimal MB in 16 bits, then minimal MB in 8 bits, at 4k, 32k, 128k, 1m
STATE = {
    "e2b": ((176, 1409, 5637, 45100), (31.5, 208, 812, 6449), (15.7, 104, 406, 3224)),
    "e4b": ((411, 3288, 13153, 105200), (88.1, 558, 2168, 17200), (44, 279, 1084, 8600)),
    "26b-a4b": ((923, 7382, 29530, 236000), (294, 881, 2894, 21700), (147, 440, 1447, 10800)),
    "31b": ((3691, 29530, 118100, 945000), (1174, 3523, 11580, 86700), (587, 1762, 5788, 43400)),
    "laguna-xs2": ((671, 5369, 21470, 171800), (231, 1405, 5432, 43000), (115, 703, 2716, 21500)),
    "zaya1-8b": ((168, 1343, 5369, 42950), (168, 1343, 5369, 42950), (84.3, 672, 2685, 21500)),
    "deepseek-v4-flash": (
        (180, 1443, 5771, 46170), (45.7, 243, 919, 7232), (28.8, 127, 466, 3622),
    ),
    "deepseek-v4-pro": (
        (256, 2047, 8187, 65500), (66.6, 349, 1317, 10353), (42.4, 184, 668, 5185),
    ),
}  # fmt: skip


def near(value, published):
    """Equal as far as the published figure goes: three or four digits."""
    return isclose(value, published, rel_tol=6e-3)


@pytest.mark.parametrize("name", STATE)
def test_state_bytes(name):
    naive, minimal, int8 = STATE[name]
    for i, depth in enumerate(DEPTHS.values()):
        plan = layout(name, depth)
        assert near(plan.full_length() / 1e6, naive[i])
        assert near(exact_bytes(plan, 2) / 1e6, minimal[i])
        assert near(exact_bytes(plan, 1) / 1e6, int8[i])
        assert plan.bytes >= exact_bytes(plan, 2)
        assert plan.bytes <= 1.011 * exact_bytes(plan, 2)


# MB of state one decoded token reads, 16 bits, raw rows not counted
READ = {
    "e2b": (73, 484, 1894),
    "e4b": (154, 976, 3795),
    "26b-a4b": (294, 881, 2894),
    "31b": (1174, 3523, 11580),
    "laguna-xs2": (231, 1405, 5432),
    "zaya1-8b": (168, 1342, 5369),
    "deepseek-v4-flash": (23, 66, 214, 1594),
    "deepseek-v4-pro": (48, 110, 324, 2313),
}


@pytest.mark.parametrize("name", READ)
def test_read_traffic(name):
    for published, depth in zip(READ[name], DEPTHS.values(), strict=False):
        plan = layout(name, depth)
        raw = sum(len(t.readers) * t.read_bytes(depth) for t in plan.tables if t.exact)
        value = (plan.read_traffic(depth) - raw) / 1e6
        assert abs(value - published) <= max(0.5, 6e-3 * published)


def test_deepseek_against_v32_as_published():
    """Bytes of a token's share of state at 1M tokens, in the storages that the report assumes.

    V4 blocks: 448 values in 8 bits, 64 in bf16 and scales, 584 bytes; index rows in 4 bits, 68
    bytes. V3.2: a latent of 656 bytes and an index row of 132 in each of 61 layers.
    """
    v32 = 61 * (656 + 132)
    for name, ratio in (("deepseek-v4-flash", 7.3), ("deepseek-v4-pro", 10.5)):
        plan = layout(name, DEPTHS["1m"])
        size = {512: 584, 128: 68}
        share = sum(size[t.row[1]] / t.stride for t in plan.tables if t.stride > 1)
        assert round(100 * share / v32, 1) == ratio
    for name, ratio in (("deepseek-v4-flash", 8.0), ("deepseek-v4-pro", 11.5)):  # all bf16
        plan = layout(name, DEPTHS["1m"])
        share = sum(t.row_bytes / t.stride for t in plan.tables if t.stride > 1)
        assert round(100 * share / (61 * 2 * (576 + 128)), 1) == ratio


# model: billions of parameters; read for a token; of those, experts
PARAMETERS = {
    "e2b": (4.629, 2.280, 0),
    "e4b": (7.463, 4.644, 0),
    "12b": (11.907, 11.907, 0),
    "26b-a4b": (25.233, 3.823, 1.427),
    "31b": (30.697, 30.697, 0),
    "laguna-xs2": (33.443, 2.812, 0.981),
    "zaya1-8b": (8.840, 1.291, 0.503),
    "deepseek-v4-flash": (284.33, 13.27, 6.493),
    "deepseek-v4-pro": (1573.0, 48.85, 24.18),
    "llama3.2-1b": (1.236, 1.236, 0),
    "llama3.2-3b": (3.213, 3.213, 0),
    "qwen3-0.6b": (0.596, 0.596, 0),
    "qwen3-1.7b": (1.721, 1.721, 0),
    "qwen3-4b": (4.022, 4.022, 0),
    "smollm2-135m": (0.1345, 0.1345, 0),
    "smollm2-1.7b": (1.711, 1.711, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    total, streamed, experts = PARAMETERS[name]
    rows = [w for w in models.weights(models.get_row(name).config) if w.kind != TABLE]
    assert isclose(sum(w.elements for w in rows) / 1e9, total, rel_tol=5e-4)
    assert isclose(sum(w.elements * w.share for w in rows) / 1e9, streamed, rel_tol=5e-4)
    chosen = sum(w.elements * w.share for w in rows if w.kind in (EXPERT, EXPERT8)) / 1e9
    assert isclose(chosen, experts, rel_tol=1e-3)


def test_names_are_unique_and_every_weight_can_be_found():
    for name, row in models.ROWS.items():
        rows = models.weights(row.config)
        assert len({w.name for w in rows}) == len(rows), name
        assert all(w.hf for w in rows), name
