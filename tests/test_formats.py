"""Weight formats: what is stored, where, and how many bytes it takes."""

import numpy as np
import pytest

from edge_kv.errors import ConfigError
from edge_kv.formats import (
    FORMATS,
    GROUP,
    LEVELS,
    LINE,
    Quantised,
    dequantise,
    find_format,
    pack,
    unpack,
)

SHAPES = [(16, 32), (48, 256), (1, 1), (37, 576), (5, 100), (33, 160)]


def random_matrix(fmt, rows, cols, seed=0):
    """Random codes and scales of a format, extremes included."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(fmt.low, fmt.high + 1, (rows, cols)).astype(np.int8)
    blocks = row = None
    if fmt.scale == "s8":
        blocks = rng.integers(-128, 128, (rows, fmt.blocks(cols))).astype(np.int8)
    if fmt.scale == "f16":
        blocks = rng.standard_normal((rows, fmt.blocks(cols))).astype(np.float16)
    if fmt.has_row_scales:
        row = rng.standard_normal(rows).astype(np.float32)
    return Quantised(codes, blocks, row)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_comes_back(name, shape):
    fmt, (rows, cols) = FORMATS[name], shape
    q = random_matrix(fmt, rows, cols)
    packed = pack(fmt, q)
    assert packed.dtype == np.uint8 and packed.shape == fmt.shape(rows, cols)
    assert packed.nbytes == fmt.bytes(rows, cols)
    back = unpack(fmt, packed, rows, cols)
    np.testing.assert_array_equal(back.codes, q.codes)
    for got, want in ((back.block_scales, q.block_scales), (back.row_scales, q.row_scales)):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_lies_where_the_layout_says(name):
    """The words of edge_kv/formats.py, read value by value."""
    fmt, rows, cols = FORMATS[name], 33, 224  # 7 blocks: the last line of scales is not full
    q = random_matrix(fmt, rows, cols, seed=1)
    packed, values = pack(fmt, q), dequantise(fmt, q)
    for r, c in np.random.default_rng(2).integers(0, (rows, cols), (200, 2)):
        group = packed[r // GROUP].reshape(-1, LINE)
        lane, block, scale, at = r % GROUP, c // 32, 1.0, 0
        if fmt.scale in ("s8", "row"):
            scale, at = float(group[0].view(np.float32)[lane]), 1
        if fmt.served:
            at += block // fmt.served * (1 + fmt.served * fmt.bits)
            line = group[at].view(fmt.block_scale).reshape(fmt.served, GROUP)
            scale *= float(line[block % fmt.served, lane])
            at += 1 + block % fmt.served * fmt.bits
        else:
            at += block * fmt.bits
        per_line = 32 // fmt.bits
        at, within = at + c % 32 // per_line, c % per_line
        byte = int(group[at][lane * 4 + within % 4])
        code = (byte >> within // 4 * fmt.bits) % 2**fmt.bits + fmt.low
        value = fmt.levels[code] if fmt.levels else code
        assert value * scale == pytest.approx(float(values[r, c]), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int4-s8", 4.25), ("int4-f16", 4.5), ("code4-s8", 4.25), ("int8-s8", 8.25),
     ("int8-f16", 8.5), ("int2-row", 2), ("int4-row", 4), ("int8-row", 8)],
)  # fmt: skip
def test_bits_a_weight(name, bits):
    fmt = find_format(name)
    row_scale = 32 / 1536 if fmt.has_row_scales else 0
    assert fmt.bits_per_weight(6144, 1536) == bits + row_scale


def test_levels_are_lloyd_max_of_normal_blocks():
    """One step of Lloyd's algorithm leaves every level where it is, but for rounding."""
    blocks = np.random.default_rng(0).standard_normal((100_000, 32))
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    values, levels = (blocks / top * -127).ravel(), np.array(LEVELS) * (125 / 127)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    means = np.bincount(nearest, values) / np.bincount(nearest)
    assert np.abs(means - levels).max() < 1


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"'int4-s9'.*int4-s8"):
        find_format("int4-s9")
